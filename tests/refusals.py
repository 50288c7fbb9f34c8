"""What the tests of bad input share: a model and data to break, and what a refusal looks like."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamas import llama, save
from python_face import environment
from texts import VOCABULARY, add_tokenizer, write_lines

BAD_INPUT, FAILED = 2, 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with a tokenizer, sharded/ of the same model, and data.jsonl."""
    folder = tmp_path_factory.mktemp("made")
    model = llama(vocab_size=VOCABULARY, max_position_embeddings=96)
    for name, shard in (("base", None), ("sharded", "60KB")):
        save(model, folder / name, shard=shard)
        add_tokenizer(folder / name)
    write_lines(folder / "data.jsonl", 40)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` to break, and the working directory of the runs."""
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def run(
    work: Path, *words: object, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ferrotune", *map(str, words)],
        cwd=work,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        check=False,
        preexec_fn=before,
    )


def train(work: Path, *more: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`ferrotune train` of two steps; `more` comes last and wins, its `--data` in place of ours."""
    data = () if "--data" in more else ("--data", "data.jsonl")
    return run(
        work,
        "train",
        "--model",
        "base",
        *data,
        "--output",
        "run",
        "--max-steps",
        2,
        "--sequence-length",
        48,
        "--threads",
        2,
        *more,
        **options,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()
    }


def refused(found: subprocess.CompletedProcess[str], *parts: str, code: int = BAD_INPUT) -> str:
    """The one error line, the last that is said, which holds every part."""
    said = found.stderr.strip().splitlines()
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    assert [line for line in said if "error" in line.lower()] == said[-1:], found.stderr
    assert said[-1].startswith("error: ")
    for part in parts:
        assert part in said[-1], said[-1]
    return said[-1]


def refused_and_unwritten(
    work: Path, *parts: str, more: tuple[object, ...] = (), command: str = "train"
) -> str:
    before = files(work)
    folders = {x for x in work.rglob("*") if x.is_dir()}
    found = train(work, *more) if command == "train" else run(work, command, *more)
    line = refused(found, *parts)
    assert files(work) == before
    assert {x for x in work.rglob("*") if x.is_dir()} == folders
    return line
