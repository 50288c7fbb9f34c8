"""Ctrl-C, kill -9 and crashes, resuming to the same numbers, early stopping."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ferrotune
from python_face import environment, interruptible
from runs import base, column, metrics, settings
from texts import write_lines

__all__ = ["base"]

pytest.importorskip("torch")
pytest.importorskip("transformers")


# Interrupted runs


def command(base: Path, output: Path, **changes: Any) -> list[str]:
    words = [sys.executable, "-m", "ferrotune", "train"]
    every = settings(base, output=output, lora_dropout=0.1, packing=True, batch_size=2, **changes)
    for name, value in every.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, str(value)]
    return words


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def stop_after(words: list[str], folder: Path, steps: int, how: signal.Signals) -> tuple[int, str]:
    """Starts a run, sends it `how` after `steps` steps; its exit code and standard error."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=interruptible,
    )  # fmt: skip
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not path.exists() or path.read_text().count('"event":"step"') < steps:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


STEPS = 250


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    begin = time.monotonic()
    found = run(command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7))
    (folder.parent / "seconds").write_text(str(time.monotonic() - begin))
    assert found.returncode == 0, found.stderr
    assert len(column(folder, "step", "loss")) == STEPS
    return folder


def same_end(folder: Path, unbroken: Path) -> None:
    assert metrics(folder) == metrics(unbroken)
    kept = "adapter/adapter_model.safetensors"
    assert (folder / kept).read_bytes() == (unbroken / kept).read_bytes()


def test_a_run_repeats_from_its_own_settings(unbroken: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ferrotune", "train", "--config", str(unbroken / "config.toml")]
    found = run([*words, "--output", str(tmp_path / "run")])
    assert found.returncode == 0, found.stderr
    same_end(tmp_path / "run", unbroken)


def test_ctrl_c_leaves_a_checkpoint_that_goes_on(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7)
    code, said = stop_after(words, folder, 15, signal.SIGINT)
    assert code == 130, said
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert line.startswith("interrupted: ")
    assert "--resume" in line
    done = len(column(folder, "step", "loss"))
    assert 15 <= done < STEPS
    assert column(folder, "step", "loss") == column(unbroken, "step", "loss")[:done]
    # The command that the message names.
    found = run([sys.executable, "-m", *line.split("go on with: ")[1].split()])
    assert found.returncode == 0, found.stderr
    same_end(folder, unbroken)


def test_a_killed_run_goes_on_from_its_checkpoint(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    """SIGKILL at any time, twice: nothing can be written then, and the numbers are the same."""
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7)
    assert stop_after(words, folder, 23, signal.SIGKILL)[0] == -signal.SIGKILL
    assert list(folder.glob("checkpoint*/state.json"))
    again = [
        sys.executable,
        "-m",
        "ferrotune",
        "train",
        "--config",
        str(folder / "config.toml"),
        "--resume",
    ]
    assert stop_after(again, folder, 60, signal.SIGKILL)[0] == -signal.SIGKILL
    found = run(again)
    assert found.returncode == 0, found.stderr
    same_end(folder, unbroken)
    assert not list(folder.glob("checkpoint.*"))
    assert not list(folder.glob(".lock"))


def test_a_run_killed_at_random_points_ends_as_the_unbroken_one(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    """SIGKILL after random times, from the program's start on, until a run outlives its time."""
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7)
    whole = float((unbroken.parent / "seconds").read_text())
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    killed = 0
    for _ in range(5):
        # A run that was killed before it took its folder has nothing to go on from.
        again = ["--resume"] if folder.is_dir() and any(folder.iterdir()) else []
        process = subprocess.Popen(
            [*words, *again], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.communicate(timeout=moments.uniform(0, whole / 2))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        assert process.returncode in (0, -signal.SIGKILL), seed
    again = ["--resume"] if folder.is_dir() and any(folder.iterdir()) else []
    found = run([*words, *again])
    assert found.returncode == 0, (seed, found.stderr)
    assert killed, seed
    same_end(folder, unbroken)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=1000)
    assert stop_after(words, folder, 2, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (folder / "checkpoint").exists()
    found = run(
        [sys.executable, "-m", "ferrotune", "train", "--config", str(folder / "config.toml"),
         "--resume"]
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "there is no checkpoint yet: the run begins from its start" in found.stderr
    same_end(folder, unbroken)


def test_a_checkpoint_that_a_crash_left_aside_is_found(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    """A crash between the two renames leaves `checkpoint.old` alone."""
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7)
    assert stop_after(words, folder, 10, signal.SIGKILL)[0] == -signal.SIGKILL
    if (folder / "checkpoint").exists():
        (folder / "checkpoint").rename(folder / "checkpoint.old")
    found = run(
        [
            sys.executable,
            "-m",
            "ferrotune",
            "train",
            "--config",
            str(folder / "config.toml"),
            "--resume",
        ]
    )
    assert found.returncode == 0, found.stderr
    same_end(folder, unbroken)


def test_a_longer_run_goes_on_from_a_finished_one(base: Path, tmp_path: Path) -> None:
    """With a constant learning rate, 4 steps and 4 more are 8."""
    same = settings(base, schedule="constant", warmup_steps=0, seed=2, lora_dropout=0.1)
    whole = ferrotune.train(**{**same, "max_steps": 8}, output=tmp_path / "whole")
    ferrotune.train(**{**same, "max_steps": 4}, output=tmp_path / "parts")
    parts = ferrotune.train(**{**same, "max_steps": 8}, output=tmp_path / "parts", resume=True)
    assert column(tmp_path / "parts", "step", "loss") == column(tmp_path / "whole", "step", "loss")
    assert parts.heldout_loss_best == whole.heldout_loss_best


@pytest.mark.parametrize(
    "change", [{"r": 5}, {"seed": 9}, {"learning_rate": 5e-3}, {"batch_size": 4}]
)
def test_a_run_does_not_go_on_with_other_settings(
    change: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    same = settings(base, schedule="constant", warmup_steps=0)
    ferrotune.train(**{**same, "max_steps": 2}, output=tmp_path / "run")
    names = ("metrics.jsonl", "config.toml", "results.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    with pytest.raises(ValueError, match=next(iter(change))):
        ferrotune.train(**{**same, "max_steps": 4, **change}, output=tmp_path / "run", resume=True)
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before
    ferrotune.train(**{**same, "max_steps": 4}, output=tmp_path / "run", resume=True)


# Early stopping


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_early_stopping_keeps_the_best_weights(method: str, base: Path, tmp_path: Path) -> None:
    """Few lines and a high rate: the held-out loss turns, the run stops, the best weights stay."""
    data = write_lines(tmp_path / "few.jsonl", 6, seed=3)
    result = ferrotune.train(
        **settings(
            base,
            data=data,
            method=method,
            max_steps=300,
            learning_rate=3e-2 if method != "full" else 3e-3,
            eval_every=2,
            patience=3,
            output=tmp_path / "run",
            target_modules="all-linear",
        )
    )
    evals = [line for line in metrics(tmp_path / "run") if line["event"] == "eval"]
    losses = {line["step"]: line["loss"] for line in evals}
    assert result.stop_reason == "early_stopping"
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.heldout_loss_best == min(losses.values())
    assert result.heldout_loss_last == evals[-1]["loss"] > min(losses.values())
    assert [line["step"] for line in evals][-4] == result.best_step
    assert 0 < (result.best_step or 0) < result.steps < 300
    model, adapter = (result.weights, None) if method == "full" else (base, result.adapter)
    found = ferrotune.evaluate(
        model,
        base.parent / "heldout.jsonl",
        adapter,
        sequence_length=64,
        packing=False,
        threads=2,
        quant_type="nf4" if method == "qlora" else None,
        batch_size=8,
        progress=False,
    )
    assert found.loss == pytest.approx(result.heldout_loss_best, rel=1e-6)
