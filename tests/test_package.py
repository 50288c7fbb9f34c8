"""The package's top level: its names, and what an import costs."""

import inspect
import statistics
import subprocess
import sys

import pytest

import ferrotune
from ferrotune.options import settings_of
from python_face import environment


def test_public_names_exist() -> None:
    for name in ferrotune.__all__:
        if name != "FormatError":  # needs the extension
            assert getattr(ferrotune, name) is not None
    assert ferrotune.eval is ferrotune.evaluate
    assert set(ferrotune.__all__) <= set(dir(ferrotune))
    assert ferrotune.__version__
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        ferrotune.tran  # noqa: B018


def test_without_torch() -> None:
    """Everything but the drop-in works, and that says what to install."""
    code = """
import sys
sys.modules["torch"] = None  # an import of it fails
from ferrotune import *
import ferrotune
assert callable(train) and callable(quantize_4bit)
for name in ("patch", "verify", "ops", "nn"):
    try:
        getattr(ferrotune, name)
    except ImportError as error:
        print(error)
    else:
        raise SystemExit(name)
"""
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert len(lines) == 4
    assert all("pip install 'ferrotune[torch]'" in line for line in lines)


def test_import_is_light() -> None:
    code = "import sys, ferrotune; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "matplotlib", "rich", "numpy", "IPython", "argparse"} & set(found)


def test_import_takes_under_100_ms() -> None:
    """Typically under 2 ms; the median of five is generous to a busy machine."""
    times = []
    for _ in range(5):
        lines = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import ferrotune"],
            env=environment(), capture_output=True, text=True, check=True,
        ).stderr.splitlines()  # fmt: skip
        mine = next(line for line in lines if line.split("|")[-1].strip() == "ferrotune")
        times.append(int(mine.split("|")[1]))
    assert statistics.median(times) < 100_000, times


def test_help_needs_neither_extension_nor_heavy_imports() -> None:
    code = (
        "import sys; sys.modules['ferrotune._native'] = None; from ferrotune.cli import main; "
        "code = main([]); "
        "print(code, *{'rich', 'matplotlib', 'numpy', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert "commands:" in done.stdout


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "merge", "demo"])
def test_every_parameter_is_a_setting_and_typed(name: str) -> None:
    function = getattr(ferrotune, name)
    settings = settings_of(function)
    callbacks = {"on_event", "on_text"}
    assert set(inspect.signature(function).parameters) - callbacks == set(settings)
    assert function.__doc__
    for setting in settings.values():
        assert setting.option.help
        assert not setting.option.help.endswith(".")
        if not setting.required:  # a default passes its own check
            assert setting.accept(setting.default) == setting.default
