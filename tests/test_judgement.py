"""The test split, read once at the end, and forgetting: beside evaluations of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ferrotune
import labels
from ferrotune import cli
from runs import base, settings
from texts import write_lines

pytest.importorskip("torch")
pytest.importorskip("peft")

__all__ = ["base"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    labels.write_labelled(folder / "train.jsonl", 60)
    labels.write_labelled(folder / "heldout.jsonl", 15, seed=1)
    labels.write_labelled(folder / "test.jsonl", 21, seed=2)
    labels.write_labelled(folder / "moon.jsonl", 8, seed=3, topics=["sea", "moon"])
    return labels.classifier("bert", folder / "model", "Model")


def test_a_language_models_test_and_forgetting(base: Path, tmp_path: Path) -> None:
    """Both are what `eval` gives for the same files, before and after."""
    test, own = tmp_path / "test.jsonl", tmp_path / "own" / "own.txt"
    own.parent.mkdir()
    write_lines(test, 12, seed=2)
    write_lines(own, 15, seed=3)
    run = tmp_path / "run"
    result = ferrotune.train(
        **settings(base, output=run, test_data=test, forgetting=own.parent, near_duplicates=0.0)
    )

    def loss(data: Path, adapter: Path | None) -> Any:
        return ferrotune.eval(
            base, data, adapter, sequence_length=64, packing=False, batch_size=8, threads=2,
            progress=False,
        ).generation  # fmt: skip

    assert result.test is not None
    assert result.test.generation == loss(test, result.adapter)
    found = result.forgetting
    assert found is not None
    assert (found.before, found.after) == (loss(own, None), loss(own, result.adapter))
    difference = found.after.loss.value - found.before.loss.value
    assert found.change.value == pytest.approx(difference, abs=1e-6)
    assert found.change.low < found.change.value < found.change.high
    # Differences of the same rows scatter less than the rows.
    width = found.before.loss.high - found.before.loss.low
    assert found.change.high - found.change.low < width
    assert result.data["test_records"] == 12
    stored = json.loads((run / "results.json").read_text())
    assert str(own) in [one["path"] for one in stored["files"]]
    assert stored["result"]["test"]["loss"] == result.test.loss
    assert stored["result"]["forgetting"]["change"]["value"] == found.change.value
    assert {Path(file["path"]).name for file in stored["files"]} == {
        "train.jsonl", "heldout.jsonl", "test.jsonl", "own.txt"
    }  # fmt: skip
    card = (run / "README.md").read_text()
    for part in ("| test perplexity |", "| loss on its own domain |", "read once, at the end"):
        assert part in card, part
    assert found.sentence() in card
    assert "lost of what it knew" not in card
    assert "test loss" in str(result)


def test_a_test_split_is_a_part_of_the_records(bert: Path, tmp_path: Path) -> None:
    """Sides by `ferrotune split` with the same settings are the run's own."""
    parts = ferrotune.split(
        bert.parent / "train.jsonl", tmp_path / "parts", heldout=0.2, test=0.25, near_duplicates=0.0
    )
    changes: dict[str, Any] = {
        "task": "classification", "heldout_data": (), "heldout": 0.2, "test": 0.25, "max_steps": 10,
        "audit": "off",
    }  # fmt: skip
    result = ferrotune.train(**labels.settings(bert, output=tmp_path / "run", **changes))
    counts = [result.data[f"{side}_records"] for side in ("train", "heldout", "test")]
    assert counts == [one.records for one in parts.files] == [33, 12, 15]
    assert result.test is not None
    again = ferrotune.eval(
        bert, parts.files[2].path, result.adapter, sequence_length=48, batch_size=8, threads=2,
        progress=False,
    )  # fmt: skip
    assert result.test.classification == again.classification
    card = (result.weights / "README.md").read_text()
    assert "On 15 test texts" in card
    assert "| test macro-F1 |" in card


def test_a_part_of_the_data_beside_heldout_files(bert: Path, tmp_path: Path) -> None:
    changes = {"task": "classification", "test": 0.25, "max_steps": 1, "audit": "off"}
    result = ferrotune.train(**labels.settings(bert, output=tmp_path / "run", **changes))
    counts = [result.data[f"{side}_records"] for side in ("train", "heldout", "test")]
    assert counts == [45, 15, 15]


def test_a_resumed_run_is_judged_as_the_unbroken_one(base: Path, tmp_path: Path) -> None:
    own = write_lines(tmp_path / "own.txt", 8, seed=3)
    changes = {"test": 0.2, "forgetting": own, "max_steps": 4, "near_duplicates": 0.0}
    whole = ferrotune.train(**settings(base, output=tmp_path / "whole", **changes))

    def on_event(event: dict[str, Any]) -> bool:
        return event["event"] != "step"

    part = settings(base, output=tmp_path / "part", **changes)
    with pytest.raises(ferrotune.TrainInterrupted):
        ferrotune.train(**part, on_event=on_event)
    rest = ferrotune.train(**part, resume=True)
    assert (rest.test, rest.forgetting) == (whole.test, whole.forgetting)


def test_texts_of_the_test_files_are_trained_nowhere(base: Path, tmp_path: Path) -> None:
    """Equal texts leave the training and the held-out side, and the report says so."""
    test = tmp_path / "test.jsonl"
    files = [base.parent / name for name in ("train.jsonl", "heldout.jsonl")]
    test.write_text("".join(file.read_text().splitlines(True)[0] for file in files))
    result = ferrotune.train(
        **settings(base, output=tmp_path / "run", test_data=test, max_steps=1, near_duplicates=0.0)
    )
    counts = [result.data[f"{side}_records"] for side in ("train", "heldout", "test")]
    assert counts == [31, 9, 2]
    assert {one["reason"] for one in result.data["skipped"]} == {
        "the same text is in the test data"
    }


# What is refused, before anything is written


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "labels": (
        {"test_data": "moon.jsonl"},
        "the test data have labels that the training data never show: 'moon'; hold out other",
    ),
    "both": ({"test": 0.1, "test_data": "test.jsonl"}, "test is 0.1, and test_data names files"),
    "range": ({"test": 1.0}, "test must be at least 0 and below 1"),
    "sum": ({"test": 0.6, "heldout": 0.5, "heldout_data": ()}, "heldout and test together"),
    "forgetting": ({"forgetting": "test.jsonl"}, "which a classifier does not have"),
    "every": ({"test_data": "train.jsonl"}, "is in the test data as well"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(bert: Path, name: str, tmp_path: Path) -> None:
    changes, message = REFUSALS[name]
    for key in changes.keys() & {"test_data", "forgetting"}:
        changes = {**changes, key: bert.parent / changes[key]}
    changes = {"task": "classification", "audit": "off", **changes}
    with pytest.raises(ValueError, match=message):
        ferrotune.train(**labels.settings(bert, output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_command_line_ends_with_2(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", bert, "--data", bert.parent / "train.jsonl", "--task", "classification"]
    words += ["--test-data", bert.parent / "moon.jsonl", "--output", tmp_path / "run"]
    assert cli.main(["train", "--audit", "off", "--no-progress", *map(str, words)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: the test data have labels")
    assert line.count("\n") == 1
