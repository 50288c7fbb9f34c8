"""Bias on data with a planted one of known size, and on data with none."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
import labels
from ferrotune import cli
from ferrotune.bias import Bias
from ferrotune.resampling import means
from runs import base, settings
from texts import WORDS

pytest.importorskip("torch")
pytest.importorskip("peft")

__all__ = ["base"]

# A group's word, and how many of 20 texts of it are labelled "yes".
PLANTED = {"north": ("water", 17), "south": ("fire", 3)}
NONE = {"north": ("water", 10), "south": ("water", 10)}


def write_groups(path: Path, count: int, seed: int, groups: Any) -> Path:
    """Texts whose label depends on the group alone, of which only a word tells."""
    source = random.Random(seed)
    with path.open("w") as file:
        for at in range(count):
            group = ["north", "south"][at % 2]
            word, rate = groups[group]
            label = "yes" if at // 2 % 20 < rate else "no"
            words = [word, *source.choices(WORDS[:8], k=2), word, f"{seed}{at}"]
            record = {"text": " ".join(words), "label": label, "region": group}
            file.write(json.dumps(record) + "\n")
    return path


def classified(tmp_path: Path, groups: Any, **changes: Any) -> Any:
    model = labels.classifier("bert", tmp_path / "model", "Model")
    write_groups(tmp_path / "train.jsonl", 240, 1, groups)
    write_groups(tmp_path / "heldout.jsonl", 80, 2, groups)
    write_groups(tmp_path / "test.jsonl", 120, 3, groups)
    changes = {
        "task": "classification", "audit": "off", "test_data": tmp_path / "test.jsonl",
        "bias_column": "region", "max_steps": 40, "method": "full", "learning_rate": 3e-3,
        **changes,
    }  # fmt: skip
    return ferrotune.train(**labels.settings(model, output=tmp_path / "run", **changes))


def test_a_planted_bias_is_found_in_its_size(tmp_path: Path) -> None:
    """Rates of 0.85 and 0.15 in the data; the best guess from the group's word is 1 and 0."""
    result = classified(tmp_path, PLANTED, bias_terms=["water/fire"])
    found = result.bias
    assert found is not None
    assert (found.side, dict(found.groups), found.ungrouped) == (
        "test", {"north": 60, "south": 60}, 0
    )  # fmt: skip
    rates = {(one.label, one.group): one for one in found.rates}
    assert rates["yes", "north"].data.value == pytest.approx(0.85)
    assert rates["yes", "south"].data.value == pytest.approx(0.15)
    # A mean's textbook interval: 1.96 standard errors on either side.
    width = rates["yes", "north"].data.high - rates["yes", "north"].data.low
    assert width == pytest.approx(2 * 1.96 * (0.85 * 0.15 / 60) ** 0.5, rel=0.15)
    (gap,) = [one for one in found.gaps if (one.label, one.group) == ("yes", "north")]
    assert gap.data.value == pytest.approx(0.7)
    assert gap.tuned.value == pytest.approx(1.0)
    assert gap.amplification.value == pytest.approx(0.3)
    assert gap.amplification.low > 0.1
    assert gap.word == "amplified"
    # One gap of four says all: two groups, two labels.
    assert len(found.widest()) == 1
    (swap,) = found.swaps
    assert swap.records == 120
    assert swap.tuned.value == pytest.approx(1.0)
    assert found.new_head

    run = tmp_path / "run"
    assert "amplified, +0.30" in str(result)
    stored = json.loads((run / "results.json").read_text())["result"]["bias"]
    assert stored["gaps"][0]["data"]["value"] == found.gaps[0].data.value
    assert (run / "bias.png").read_bytes()[:4] == b"\x89PNG"
    card = (run / "README.md").read_text()
    for part in ("## Bias", "](bias.png)", "no fair baseline", "Not measured: ", "| yes, north |"):
        assert part in card, part
    assert "bias.png" not in (result.weights / "README.md").read_text()


def test_without_a_planted_bias_none_is_found(tmp_path: Path) -> None:
    found = classified(tmp_path, NONE, max_steps=20).bias
    assert found is not None
    for gap in found.gaps:
        assert gap.data.low < 0 < gap.data.high
        assert gap.tuned.low <= 0 <= gap.tuned.high
    assert found.swaps == ()
    assert "no bias_terms" in " ".join(found.not_measured)


def test_a_language_models_preference_is_the_datas(base: Path, tmp_path: Path) -> None:
    """Nine of ten texts have the first term: the second one costs ln 9 nats more."""
    first, second = "king", "came"
    source = random.Random(5)

    def write(name: str, terms: Sequence[str]) -> Path:
        path = tmp_path / name
        numbers = source.sample(range(1000), len(terms))
        texts = [
            f"and the {term} of {number:03d}" for term, number in zip(terms, numbers, strict=True)
        ]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    train = write("train.jsonl", ([first] * 9 + [second]) * 40)
    heldout = write("heldout.jsonl", ([first] * 9 + [second]) * 8)
    test = write("test.jsonl", [first, second] * 20)
    result = ferrotune.train(
        **settings(
            base,
            data=train,
            heldout_data=heldout,
            test_data=test,
            output=tmp_path / "run",
            bias_terms=[f"{first}/{second}"],
            near_duplicates=0.0,
            audit="off",
            method="full",
            batch_size=20,
            max_steps=100,
            learning_rate=3e-3,
            eval_every=20,
        )
    )
    found = result.bias
    assert found is not None
    assert dict(found.groups) == {first: 20, second: 20}
    forth, back, preference = found.swaps
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    lengths = [len(tokenizer.encode(f"and the {term} of 300").ids) for term in (first, second)]
    assert lengths[0] == lengths[1]
    planted = log(9) / (lengths[0] + 1)  # and </s>
    assert forth.tuned.value == pytest.approx(planted, rel=0.25)
    assert back.tuned.value == pytest.approx(-planted, rel=0.25)
    assert preference.tuned.value == pytest.approx(2 * planted, rel=0.25)
    assert preference.change.value == pytest.approx(preference.tuned.value - preference.base.value)
    assert "preference for king" in str(result)
    assert (tmp_path / "run" / "bias.png").exists()
    assert not found.new_head


def test_groups_of_records_that_name_none_are_counted() -> None:
    """Percentages by hand: a and b of three groups; the third record names none."""
    found = {
        "side": "held-out", "labels": ["no", "yes"], "left_out": 0, "terms": None, "places": [],
        "groups": ["a", "a", None, "b", "c"], "truth": [1, 0, 1, 0, 1], "sides": [],
        "before": {"predicted": [0, 0, 0, 0, 0], "swapped": [], "losses": []},
        "after": {"predicted": [1, 1, 1, 0, 0], "swapped": [], "losses": []},
    }  # fmt: skip
    bias = Bias.from_native(found, False, 0)
    assert (dict(bias.groups), bias.ungrouped) == ({"a": 2, "b": 1, "c": 1}, 1)
    values = {
        (one.group, one.label): (one.data.value, one.base.value, one.tuned.value)
        for one in bias.rates
    }
    assert values["a", "yes"] == (0.5, 0.0, 1.0)
    gaps = {(one.group, one.label): one for one in bias.gaps}
    assert gaps["a", "yes"].data.value == 0.0
    assert gaps["a", "yes"].tuned.value == 1.0
    assert gaps["b", "yes"].data.value == pytest.approx(-2 / 3)
    assert gaps["b", "yes"].amplification.value == pytest.approx(0.0)
    assert "1 records that name no group" in " ".join(bias.not_measured)


def test_differences_are_paired() -> None:
    values = np.random.default_rng(0).normal(size=(2, 400))
    values[1] = values[0] + 0.1
    before, after, change = means(values, 3)
    assert change.value == pytest.approx(0.1)
    assert change.high - change.low < 1e-9
    assert before.high - before.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert after.value == pytest.approx(before.value + 0.1)


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias_column": "gender"}, r"no column `gender`; the columns are: .*`region`"),
        ({"bias_terms": ["he"]}, r"bias_terms: 'he' is no pair of terms such as he/she"),
        ({"bias_terms": ["moon/sun"]}, r"no record of the held-out data names a group"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        classified(tmp_path, PLANTED, **{"bias_column": None, "test_data": (), **changes})
    assert not (tmp_path / "run").exists()


def test_a_language_model_has_no_labels_to_compare(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bias_column compares the labels"):
        ferrotune.train(**settings(base, output=tmp_path / "run", bias_column="text"))
    with pytest.raises(ValueError, match="holds a term of bias_terms"):
        ferrotune.train(**settings(base, output=tmp_path / "run", bias_terms=["moon/sun"]))
    assert not (tmp_path / "run").exists()


def test_a_missing_group_column_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = labels.classifier("bert", tmp_path / "model", "Model")
    data = write_groups(tmp_path / "data.csv.jsonl", 20, 1, PLANTED)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    table = tmp_path / "data.csv"
    table.write_text(
        "text,label,region\n" + "".join(f"{r['text']},{r['label']},{r['region']}\n" for r in rows)
    )
    capsys.readouterr()
    words = ["--model", model, "--data", table, "--task", "classification", "--no-progress"]
    words += ["--bias-column", "gender", "--output", tmp_path / "run"]
    assert cli.main(["train", *map(str, words)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "no column `gender`; the columns are: `text`, `label`, `region`" in line
    assert not (tmp_path / "run").exists()
