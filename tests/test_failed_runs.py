"""Adapters that do not fit, disks that fill, runs that diverge: what was written before stays."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refusals import FAILED, files, made, refused, refused_and_unwritten, run, train, work

__all__ = ["made", "work"]

pytest.importorskip("torch")
pytest.importorskip("transformers")

# Adapters that do not fit


def adapter(
    folder: Path, n: int = 48, module: str = "model.layers.0.self_attn.q_proj", **fields: Any
) -> None:
    """An adapter written by hand, without a check."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module], **fields}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"lora_A": [2, 48], "lora_B": [n, 2]}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[f"base_model.model.{module}.{name}.weight"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(at)
    )


COMMANDS: dict[str, tuple[object, ...]] = {
    "eval": (
        "--model",
        "base",
        "--data",
        "data.jsonl",
        "--sequence-length",
        48,
        "--adapter",
        "adapter",
    ),
    "generate": ("--model", "base", "--prompt", "and", "--adapter", "adapter"),
    "merge": ("--model", "base", "--output", "merged", "--adapter", "adapter"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_of_another_size(command: str, work: Path) -> None:
    adapter(work / "adapter", n=64)
    refused_and_unwritten(
        work, "q_proj.lora_B", "128 elements", "[48, 2]", more=COMMANDS[command], command=command
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_for_another_model(command: str, work: Path) -> None:
    adapter(work / "adapter", module="transformer.h.0.attn.c_attn")
    refused_and_unwritten(work, "c_attn", "q_proj", more=COMMANDS[command], command=command)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_of_an_unsupported_kind(command: str, work: Path) -> None:
    """What means something else here raises, naming the field."""
    adapter(work / "adapter", use_dora=True)
    refused_and_unwritten(work, "use_dora", more=COMMANDS[command], command=command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_field_that_is_not_known_is_told_by_every_command(command: str, work: Path) -> None:
    adapter(work / "adapter", future_field=7)
    found = run(work, command, *COMMANDS[command])
    assert found.returncode == 0, found.stderr
    warnings = [line for line in (found.stdout + found.stderr).splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "future_field" in warnings[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_adapter(command: str, work: Path) -> None:
    refused_and_unwritten(
        work, "adapter", "No such file or directory", more=COMMANDS[command], command=command
    )


def test_a_truncated_adapter(work: Path) -> None:
    adapter(work / "adapter")
    path = work / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused_and_unwritten(
        work, "adapter_model.safetensors", "truncated", more=COMMANDS["eval"], command="eval"
    )


def test_merging_into_a_folder_that_is_taken(work: Path) -> None:
    adapter(work / "adapter")
    (work / "merged").mkdir()
    (work / "merged" / "config.json").write_text("{}")
    refused_and_unwritten(work, "merged", "not empty", more=COMMANDS["merge"], command="merge")


# A run that fails


def limit_files(size: int) -> Callable[[], None]:
    """A disk that is full once a file has `size` bytes: writing more fails with EFBIG."""

    def apply() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return apply


def test_a_full_disk_while_checkpointing_keeps_the_older_checkpoint(work: Path) -> None:
    same = ("--method", "lora", "--schedule", "constant", "--warmup-steps", 0, "--r", 32)
    assert train(work, *same).returncode == 0
    checkpoint = files(work / "run" / "checkpoint")
    adapters = files(work / "run" / "adapter")
    smallest = min(
        len(checkpoint[name]) for name in ("weights.safetensors", "optimizer.safetensors")
    )
    more = ("--max-steps", 6, "--checkpoint-every", 3, "--resume")
    found = train(work, *same, *more, before=limit_files(smallest - 100))
    refused(found, "checkpoint", "File too large", code=FAILED)
    assert files(work / "run" / "checkpoint") == checkpoint
    assert files(work / "run" / "adapter").keys() == adapters.keys()
    assert not list((work / "run").glob("checkpoint.*"))
    # With room again the run goes on to the unbroken run's end.
    again = train(work, *same, *more)
    assert again.returncode == 0, again.stderr
    whole = train(work, *same, "--max-steps", 6, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    steps = [
        [
            x["loss"]
            for x in map(json.loads, (work / name / "metrics.jsonl").read_text().splitlines())
            if x["event"] == "step"
        ]
        for name in ("run", "whole")
    ]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 6


def fill(path: Path) -> None:
    """Takes all the space there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(512)):
            pass


def test_a_full_file_system(work: Path, tmp_path: Path) -> None:
    """ENOSPC itself, where a small tmpfs may be mounted: filled up, then the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    try:
        words = (
            "--method",
            "lora",
            "--schedule",
            "constant",
            "--output",
            disk / "run",
            "--checkpoint-every",
            2,
        )
        assert train(work, *words).returncode == 0
        kept = files(disk / "run" / "checkpoint")
        fill(disk / "filler")
        found = train(work, *words, "--max-steps", 6, "--resume")
        refused(found, str(disk / "run"), "No space left on device", code=FAILED)
        assert files(disk / "run" / "checkpoint") == kept
        (disk / "filler").unlink()
        found = train(work, *words, "--max-steps", 6, "--resume")
        assert found.returncode == 0, found.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_from_the_start(work: Path) -> None:
    found = train(work, before=limit_files(200))
    refused(found, "run/", "File too large", code=FAILED)


def test_a_merge_that_runs_out_of_disk_leaves_nothing(work: Path) -> None:
    adapter(work / "adapter")
    found = run(work, "merge", *COMMANDS["merge"], before=limit_files(50_000))
    refused(found, "merged", "File too large", code=FAILED)
    assert not (work / "merged").exists() or files(work / "merged") == {}


def test_a_run_that_diverges_fails_and_keeps_its_checkpoint(work: Path) -> None:
    """A learning rate far too large: exit code 1, with the step and what may help."""
    found = train(
        work,
        "--method",
        "full",
        "--learning-rate",
        1e30,
        "--max-steps",
        20,
        "--warmup-steps",
        2,
        "--max-grad-norm",
        0,
        "--checkpoint-every",
        1,
    )
    refused(found, "step ", "learning_rate", code=FAILED)
    assert (work / "run" / "checkpoint" / "state.json").is_file()
