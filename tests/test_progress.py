"""What a run shows while it goes: lines, a bar in a terminal, a live curve in Jupyter."""

import io
import math
import os
import pty
import re
import select
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferrotune
from ferrotune import progress
from ferrotune.history import Smoothed, smooth_both_ways
from ferrotune.progress import BarDisplay, Display, LineDisplay, open_display
from ferrotune.status import Status, sentence
from ferrotune.tables import clock, compact, duration, size
from python_face import command, engine, environment, ferrotune_cli

__all__ = ["engine"]


def step(number: int, total: int | None = 100, **more: Any) -> dict[str, Any]:
    event = {
        "event": "step", "step": number, "total_steps": total, "loss": 4.0, "grad_norm": 1.0,
        "learning_rate": 1e-3, "tokens": 2048 * number, "tokens_per_second": 12_400.0,
        "elapsed_seconds": float(number), "remaining_seconds": 100.0 - number,
    }  # fmt: skip
    return {**event, **more}


# Numbers and sentences


def test_status() -> None:
    status = Status()
    assert (status.fraction, status.numbers()) == (0.0, [])
    assert math.isnan(status.loss)
    status.add(step(25))
    assert status.fraction == 0.25
    assert status.steps_text() == "step 25/100"
    assert status.left_text() == "1:15 left"
    status.add(step(30, None, elapsed_seconds=90.0, remaining_seconds=10.0, loss=None))
    assert status.fraction == 0.9
    assert status.steps_text() == "step 30"
    assert status.loss == 4.0
    status.add({"event": "eval", "step": 30, "loss": 3.5})
    status.add({"event": "eval", "step": 40, "loss": 3.75})
    assert (status.heldout, status.best) == (3.75, 3.5)
    assert status.numbers() == [
        ("loss", "4.000"), ("held-out", "3.750"), ("lr", "1.00e-03"), ("speed", "12.4k tokens/s")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "fraction"), [("finished", 1.0), ("max_seconds", 1.0), ("interrupted", 0.25)]
)
def test_status_of_a_run_that_has_ended(reason: str, fraction: float) -> None:
    status = Status()
    status.add(step(25))
    status.add({"event": "stop", "reason": reason, "step": 25, "best_step": 25})
    assert status.fraction == fraction
    assert status.left_text() == "took 0:25"


def test_sentences() -> None:
    skipped = {"file": "a.jsonl", "record": 17, "reason": "empty text"}
    data = {
        "event": "data", "train_records": 9500, "train_tokens": 1_234_567, "heldout_records": 500,
        "heldout_tokens": 64_000, "truncated": 2, "skipped_total": 3, "skipped": [skipped],
    }  # fmt: skip
    assert sentence(data) == (
        "data: 9,500 records to train on (1.23M tokens); 500 held out (64.0k tokens); "
        "2 truncated; 3 skipped, first a.jsonl:17: empty text"
    )
    model = {"event": "model", "architecture": "Llama", "parameters": 1_070_000}
    assert sentence(model) == "model: Llama, 1.07M parameters"
    assert sentence({"event": "eval", "step": 5, "loss": 2.0, "best": True}) == (
        "held-out loss at step 5: 2.000 nats per token, best so far"
    )
    assert sentence({"event": "warning", "message": "x"}) == "warning: x"
    assert sentence(step(1)) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (compact(0), "0"), (compact(999.4), "999"), (compact(999.6), "1.00k"),
        (compact(12_400), "12.4k"), (compact(999_900), "1.00M"), (compact(8.03e9), "8.03B"),
        (size(500), "500 B"), (size(1_500_000), "1.50 MB"), (duration(4.21), "4.2 s"),
        (duration(59.97), "1 min 00 s"), (duration(3725), "1 h 02 min"), (clock(65), "1:05"),
        (clock(7389), "2:03:09"), (clock(None), "-:--"), (clock(math.nan), "-:--"),
    ],
)  # fmt: skip
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected


finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(1, 50))
def test_smoothing_stays_between_the_extremes(values: list[float], span: float) -> None:
    low, high = min(values) - 1e-6, max(values) + 1e-6
    mean = Smoothed(span)
    for value in values:
        mean.add(value)
        assert low <= mean.value <= high
    both = smooth_both_ways(values, span)
    assert len(both) == len(values)
    assert all(low <= value <= high for value in both)
    backwards = smooth_both_ways(values[::-1], span)[::-1]
    assert both == pytest.approx(backwards, rel=1e-9, abs=1e-6)


def test_smoothing_is_unbiased_and_skips_nan() -> None:
    assert smooth_both_ways([3.0, math.nan, 3.0], 5.0) == pytest.approx([3.0] * 3)
    mean = Smoothed(10.0)
    mean.add(7.0)
    assert mean.value == pytest.approx(7.0)


# Lines


def test_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    display = LineDisplay("title", stream, every=5.0)
    for number in range(1, 13):
        now[0] += 1.0
        display.event(step(number))
    display.close()
    display.close()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "title",
        "step 5/100, loss 4.000, lr 1.00e-03, speed 12.4k tokens/s, 1:35 left",
        "step 10/100, loss 4.000, lr 1.00e-03, speed 12.4k tokens/s, 1:30 left",
        "step 12/100, loss 4.000, lr 1.00e-03, speed 12.4k tokens/s, 1:28 left",
    ]


def train_words(tmp_path: Path, *more: object) -> list[object]:
    (tmp_path / "d.txt").write_text("text")
    return ["train", "--model", "m", "--data", "d.txt", "--output", "run", *more]


def test_without_a_terminal(tmp_path: Path) -> None:
    done = ferrotune_cli(*train_words(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "qlora fine-tuning of m"
    assert lines[1].startswith("data: 950 records to train on")
    assert lines[2].startswith("model: LlamaForCausalLM, 1.07M parameters")
    assert lines[3] == "held-out loss at step 0: 5.580 nats per token, best so far"
    assert lines[-1].startswith("step 120/120, loss ")
    assert len(lines) < 12
    assert "trained parameters" in done.stdout


def test_no_progress(tmp_path: Path) -> None:
    done = ferrotune_cli(*train_words(tmp_path, "--no-progress"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# A terminal


def in_terminal(words: list[str], cwd: Path, columns: int = 100) -> tuple[int, str]:
    """Runs a process whose stdout and stderr are one pseudo-terminal; exit code and output."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        words, cwd=cwd, stdin=follower, stdout=follower, stderr=follower,
        env=environment(TERM="xterm-256color", COLUMNS=str(columns), LINES="40"),
    )  # fmt: skip
    os.close(follower)
    output, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([leader], [], [], 1.0)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    os.close(leader)
    return process.wait(timeout=60), output.decode()


def test_in_a_terminal(tmp_path: Path) -> None:
    words = train_words(tmp_path, "--max-steps", 120)
    words[2] = "slow"
    code, output = in_terminal(command(*words), tmp_path)
    assert code == 0, output
    assert output.count("\x1b[2K") > 5  # lines erased to be drawn again
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    steps = {int(found) for found in re.findall(r"step (\d+)/120", plain)}
    assert 120 in steps
    assert len(steps) > 5
    assert re.search(r"loss \d\.\d{3}  held-out \d\.\d{3}  lr 2\.00e-04  speed 20\.5k tok", plain)
    assert "100%  took 0:12" in plain
    assert "━" in plain
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is shown again
    assert "trained parameters" in plain


def test_an_evaluation_in_a_terminal_leaves_its_title_and_result(tmp_path: Path) -> None:
    words = command("eval", "--model", "m", "--data", "d.txt")
    code, output = in_terminal(words, tmp_path)
    assert code == 0, output
    assert "step" not in output
    last = output[output.rindex("preparing") :]
    assert last.index("\x1b[2K") < last.index("evaluation")  # the line is erased
    assert "bits per byte  1.250" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)


@pytest.mark.parametrize("columns", [40, 80])
def test_the_bar_fits_the_terminal(columns: int) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=columns, force_terminal=True)
    display = BarDisplay("title", console)
    display.event({"event": "eval", "step": 0, "loss": 5.5})
    display.event(step(3))
    stream = io.StringIO()
    Console(file=stream, width=columns).print(display._lines())
    display.close()
    display.close()
    shown = stream.getvalue().splitlines()
    assert len(shown) == 2
    assert all(len(line) <= columns for line in shown)
    assert shown[0].startswith("step 3/100 ")


def test_a_broken_display_ends_no_run(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Display, event: object) -> None:
        raise BrokenPipeError("gone")

    monkeypatch.setattr(LineDisplay, "event", fail)
    (tmp_path / "d.txt").write_text("text")
    assert ferrotune.train("m", tmp_path / "d.txt", tmp_path / "run").steps == 120
    assert capsys.readouterr().err.count("progress display ended: gone") == 1


# Jupyter


class Handle:
    def __init__(self, shown: Any) -> None:
        self.shown = [shown]

    def update(self, shown: Any) -> None:
        self.shown.append(shown)


class Shown:
    def __init__(self, data: Any = None, format: str = "html") -> None:
        self.data, self.format = data, format


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """A stand-in for IPython with a kernel; the display handles that were made."""
    made: list[Handle] = []

    def display(shown: Any, display_id: bool) -> Handle:
        assert display_id
        made.append(Handle(shown))
        return made[-1]

    package, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    package.version_info = (9, 0, 0)  # type: ignore[attr-defined]  # matplotlib asks for it
    module.HTML = module.Image = Shown  # type: ignore[attr-defined]
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return made


def test_in_a_notebook(handles: list[Handle], engine: Any, tmp_path: Path) -> None:
    assert progress.in_notebook()
    (tmp_path / "d.txt").write_text("text")
    result = ferrotune.train("<m>", tmp_path / "d.txt", tmp_path / "run")
    numbers, curve = handles
    last = numbers.shown[-1].data
    assert "&lt;m&gt;" in last
    assert "step 120/120" in last
    assert "held-out <b>" in last
    assert "width:100%" in last
    assert curve.shown[-1].data.startswith(b"\x89PNG")
    assert len(curve.shown) < 5  # drawing is throttled
    assert "<table" in result._repr_html_()


def test_an_evaluation_in_a_notebook(handles: list[Handle], engine: Any, tmp_path: Path) -> None:
    ferrotune.evaluate("m", tmp_path / "d.txt")
    (numbers,) = handles
    assert "preparing" in numbers.shown[0].data
    assert "evaluation" in numbers.shown[-1].data
    assert not re.search("preparing|left|step", numbers.shown[-1].data)


def test_a_terminal_ipython_and_none_are_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not progress.in_notebook()
    package = types.ModuleType("IPython")
    package.get_ipython = lambda: types.SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    assert not progress.in_notebook()
    package.get_ipython = lambda: None  # type: ignore[attr-defined]
    assert not progress.in_notebook()
    assert type(open_display(True, "t")) is LineDisplay
    assert type(open_display(False, "t")) is Display
