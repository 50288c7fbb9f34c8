# What people do here; `.ci/run` does all of it from a clean clone.
python ?= .venv/bin/python

.PHONY: build test test-rust test-python test-slow lint bench wheel demo

build: ## an optimised build in .venv, with all that the rest here needs
	test -x $(python) || python3 -m venv .venv
	$(python) -m pip install -q maturin
	NVCC=$$(.ci/nvcc $(python)) VIRTUAL_ENV=$(abspath .venv) $(python) -m maturin develop --release --extras test,dev

test: test-rust test-python

test-rust:
	cargo test --no-default-features --features engine

test-python:
	$(python) -m pytest

test-slow:
	$(python) -m pytest -m slow

lint:
	.ci/lint $(python)

bench: build
	for script in benches/*_cpu.py; do $(python) $$script || exit 1; done

wheel: ## manylinux_2_28, into dist/
	NVCC=$$(.ci/nvcc $(python)) PATH="$(abspath $(dir $(python))):$$PATH" $(python) -m maturin build --release --zig --compatibility manylinux_2_28 --compression-level 9 --out dist

demo:
	$(python) -m ferrotune demo
