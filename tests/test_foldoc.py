"""Real records and a real pre-trained BERT, reduced: FOLDOC's subjects by LoRA and by TF-IDF."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import foldoc  # of benches
import pytest

import ferrotune

pytestmark = pytest.mark.slow
TRAIN, TEST = 40, 15  # records of each subject


@pytest.fixture(scope="module")
def model() -> Path:
    pytest.importorskip("sklearn")
    try:
        return foldoc.minilm()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not list(Path(os.environ.get("FERROTUNE_DEBS", "")).glob("dict-foldoc_*.deb")):
        pytest.skip(
            "FERROTUNE_DEBS names no folder with dict-foldoc: on Debian and Ubuntu "
            "`python benches/real_records.py FOLDER dict-foldoc` fetches it"
        )
    file = foldoc.write(tmp_path_factory.mktemp("foldoc") / "foldoc.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_entries_are_those_of_the_results(entries: list[dict[str, Any]]) -> None:
    assert len(entries) == foldoc.RECORDS
    counts = Counter(one["label"] for one in entries)
    assert len(counts) == foldoc.SUBJECTS
    assert (counts["language"], counts["company"]) == (1079, 282)
    eras = Counter(one["era"] for one in entries)
    assert eras == {"before 1997": 1627, "1997 and later": 2605, None: 121}


def test_lora_beside_tfidf(model: Path, entries: list[dict[str, Any]], tmp_path: Path) -> None:
    """What is asserted of the difference is that it is the right one, not which way it falls."""
    random.Random(0).shuffle(entries)
    sides: dict[str, list[Any]] = {"train": [], "test": []}
    for label in {one["label"] for one in entries}:
        own = [one for one in entries if one["label"] == label]
        sides["train"] += own[:TRAIN]
        sides["test"] += own[TRAIN : TRAIN + TEST]
    for side, records in sides.items():
        lines = [json.dumps(one) + "\n" for one in records]
        (tmp_path / f"{side}.jsonl").write_text("".join(lines))
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    result = ferrotune.train(
        model, train, tmp_path / "run", task="classification", method="lora", learning_rate=3e-3,
        epochs=2, warmup_steps=5, sequence_length=48, heldout=0.1, test_data=test,
        bias_column="era", eval_every=15, threads=2, progress=False,
    )  # fmt: skip
    assert result.heldout_loss_before is not None
    assert result.heldout_loss_best is not None
    assert result.heldout_loss_best < result.heldout_loss_before - 0.5
    assert result.test is not None
    assert result.test.classification is not None
    accuracy = result.test.classification.accuracy
    assert accuracy.value > 0.5  # of eight equally frequent labels
    assert result.bias is not None
    assert set(result.bias.groups) == {"before 1997", "1997 and later"}

    compared = ferrotune.compare(
        model, train, test, result.adapter, tmp_path / "compare", sequence_length=48, threads=2,
        progress=False,
    )  # fmt: skip
    found = {one.name: one for one in compared.contenders}
    assert list(found) == ["BM25 vote (5)", "TF-IDF + logistic regression", "fine-tuned"]
    assert found["fine-tuned"].quality.value == pytest.approx(accuracy.value)
    linear = found["TF-IDF + logistic regression"]
    assert linear.difference is not None
    expected = accuracy.value - linear.quality.value
    assert linear.difference.value == pytest.approx(expected)
    assert linear.difference.low <= expected <= linear.difference.high
    assert "base model" in compared.left_out  # it has no head
    assert "(TF-IDF + logistic regression)" in compared.guide
