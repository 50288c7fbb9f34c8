"""Runs of the torch engine on a GPU, which is what `engine="auto"` takes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ferrotune
import methods
from runs import base, column, metrics, settings

pytest.importorskip("transformers")
pytest.importorskip("peft")

_ = base  # a fixture
METHODS: list[dict[str, Any]] = [
    {"method": "lora", "packing": True},
    {"method": "full", "learning_rate": 1e-3},
    {"method": "freeze", "trained_layers": 1},
    {"method": "ia3"},
    {"method": "prompt", "num_virtual_tokens": 4},
    {"method": "prefix", "num_virtual_tokens": 4},
    {"method": "adapter", "adapter_variant": "houlsby"},
]


@pytest.mark.parametrize("changes", METHODS, ids=lambda changes: str(changes["method"]))
def test_runs_are_in_bfloat16_on_the_gpu(
    changes: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    compared(base, tmp_path, settings(base, **changes))


def test_qlora(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = compared(base, tmp_path, settings(base, method="qlora"))
    assert found.model["quantized_bytes"] > 0


@pytest.mark.parametrize("method", ["lora", "full", "prompt"])
def test_classifiers(method: str, tmp_path: Path) -> None:
    model = methods.with_data(("bert", "ForSequenceClassification"), tmp_path)
    compared(model, tmp_path, methods.settings(model, tmp_path, method))


def test_a_resumed_run_ends_at_the_unbroken_runs_numbers(base: Path, tmp_path: Path) -> None:
    changes = {"engine": "torch", "lora_dropout": 0.1, "checkpoint_every": 2}
    ferrotune.train(**settings(base, output=tmp_path / "whole", **changes))
    broken = settings(base, output=tmp_path / "broken", **changes)
    with pytest.raises(ferrotune.TrainInterrupted):
        ferrotune.train(**broken, on_event=lambda event: event.get("step") != 3)
    ferrotune.train(**broken, resume=True)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


def compared(model: Path, folder: Path, given: dict[str, Any]) -> ferrotune.TrainResult:
    """The run on the GPU, whose losses are the embedded engine's but for bfloat16."""
    results = []
    for engine in ("auto", "embedded"):
        output = folder / f"run-{engine}"
        results.append(ferrotune.train(**{**given, "engine": engine, "output": output}))
    said = results[0].model["engine"]
    assert (said["name"], said["dtype"]) == ("torch", "bfloat16")
    assert said["why"].startswith("PyTorch found a GPU")
    for event in ("step", "eval"):
        ours, theirs = (
            column(folder / f"run-{engine}", event, "loss") for engine in ("auto", "embedded")
        )
        assert ours == pytest.approx(theirs, rel=0.03), event
    return results[0]
