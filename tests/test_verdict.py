"""What a run is called: by its curves, and by real runs of the engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import ferrotune
from ferrotune.history import Evaluation, History, Step
from ferrotune.verdict import judge
from texts import WORDS


def history(heldout: list[float], train: list[float]) -> History:
    """An evaluation every ten steps, the first one before training; a training loss a step."""
    steps = [Step(at + 1, loss, 1e-3, 0) for at, loss in enumerate(train)]
    return History(steps, [Evaluation(10 * at, loss) for at, loss in enumerate(heldout)])


def falling(begin: float, end: float, count: int) -> list[float]:
    return [begin + (end - begin) * at / (count - 1) for at in range(count)]


@pytest.mark.parametrize(
    ("heldout", "train", "kind"),
    [
        ([3.0, 2.0, 1.5, 1.4], falling(3.0, 1.3, 30), "healthy"),
        ([3.0, 2.0, 1.5, 1.55], falling(3.0, 1.3, 30), "healthy"),
        ([3.0, 2.0, 2.4, 2.9], falling(3.0, 0.1, 30), "overfitted"),
        # Never better than before, while the training loss fell.
        ([3.0, 3.1, 3.4], falling(3.0, 0.5, 20), "overfitted"),
        # Both rose: the run went astray, it learned nothing by heart.
        ([3.0, 3.1, 3.4], falling(3.0, 4.0, 20), "did not learn"),
        ([3.0, 2.0], falling(3.0, 1.0, 10), "unknown"),
        ([], [], "unknown"),
    ],
)
def test_curves(heldout: list[float], train: list[float], kind: str) -> None:
    assert judge(history(heldout, train)).kind == kind


def test_the_numbers_are_told() -> None:
    found = judge(history([3.0, 2.0, 2.25, 2.5], [*[2.5] * 10, *[1.0] * 20]))
    assert found.text == (
        "Overfitted from step 10 on: until step 30 the training loss fell from 2.500 to 1.000 "
        "while the held-out loss rose from 2.000 to 2.500 (+0.500, 50% of what training had won). "
        "The weights of step 10 were kept."
    )


def test_losses_that_are_not_numbers_are_left_out() -> None:
    found = judge(history([3.0, float("nan"), 2.0, 1.9], falling(3.0, 1.5, 30)))
    assert found.kind == "healthy"


def texts(path: Path, count: int, seed: int) -> Path:
    """Words in any order: nothing but their frequencies can be learned of them."""
    source = random.Random(seed)
    path.write_text("".join(" ".join(source.choices(WORDS, k=12)) + "\n" for _ in range(count)))
    return path


@pytest.mark.parametrize(("count", "kind"), [(4, "overfitted"), (400, "healthy")])
def test_real_runs(count: int, kind: str, tmp_path: Path) -> None:
    """A few texts over and over, and many texts once."""
    pytest.importorskip("torch")
    from labels import classifier

    settings: dict[str, Any] = {
        "model": classifier("gpt2", tmp_path / "model", "LMHeadModel"),
        "data": texts(tmp_path / "train.txt", count, 0),
        "heldout_data": texts(tmp_path / "heldout.txt", 20, 1),
        "audit": "off", "near_duplicates": 0.0, "method": "full", "learning_rate": 2e-3,
        "sequence_length": 32, "packing": False, "batch_size": 4, "max_steps": 100,
        "eval_every": 20, "warmup_steps": 5, "threads": 2, "progress": False,
    }  # fmt: skip
    result = ferrotune.train(output=tmp_path / "run", **settings)
    assert result.verdict is not None
    assert result.verdict.kind == kind, result.verdict
    assert ("verdict", kind) in result.rows()
    assert result.verdict.text in (result.weights / "README.md").read_text()
    assert result.verdict.text in (tmp_path / "run" / "results.json").read_text()
