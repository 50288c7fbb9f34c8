"""What the tests of the Python face share: the fake engine, in this process or in another one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fake_native
import ferrotune

TESTS = Path(__file__).parent
PACKAGE = Path(ferrotune.__file__).parent.parent
RUN = (
    "import sys; import fake_native; sys.modules['ferrotune._native'] = fake_native; "
    "from ferrotune.cli import main; sys.exit(main())"
)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """Puts the fake engine in place of the native one; returns the list of its calls."""
    monkeypatch.setitem(sys.modules, "ferrotune._native", fake_native)
    monkeypatch.setattr(ferrotune, "_native", fake_native, raising=False)
    fake_native.calls.clear()
    return fake_native.calls


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(PACKAGE), str(TESTS)])
    return {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8", **more}


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", RUN, *map(str, words)]


def ferrotune_cli(
    *words: object, cwd: Path | None = None, **more: str
) -> "subprocess.CompletedProcess[str]":
    """Runs the command line over the fake engine in a process of its own, without a terminal."""
    return subprocess.run(
        command(*words), cwd=cwd, env=environment(**more), capture_output=True, text=True,
        timeout=120, stdin=subprocess.DEVNULL, check=False, encoding="utf-8",
    )  # fmt: skip


def interruptible() -> None:
    """For a child before its program: Ctrl-C is not ignored, as it is in a shell's background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
