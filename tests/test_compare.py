"""`ferrotune compare` beside what scikit-learn, PEFT's texts and plain counting give."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
import labels
from ferrotune import cli
from ferrotune.comparing.prompts import fixed_examples, in_context
from ferrotune.comparing.retrieval import Neighbours, vote
from ferrotune.metrics import Interval
from runs import base, settings

pytest.importorskip("torch")
pytest.importorskip("bm25s")
pytest.importorskip("sklearn")

__all__ = ["base"]
QUIET: dict[str, Any] = {"threads": 2, "progress": False}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 language model with a classifying adapter, and labelled texts."""
    folder = tmp_path_factory.mktemp("labelled")
    labels.write_labelled(folder / "train.jsonl", 48)
    labels.write_labelled(folder / "heldout.jsonl", 15, seed=1)
    labels.write_labelled(folder / "test.jsonl", 18, seed=2)
    model = labels.classifier("gpt2", folder / "model", "LMHeadModel", n_positions=512)
    changes = {"task": "classification", "max_steps": 20}
    ferrotune.train(**labels.settings(model, output=folder / "run", **changes))
    return folder


def test_labels(labelled: Path, tmp_path: Path) -> None:
    """Each contender's accuracy is that of its predictions, by other means where there are any."""
    test = labelled / "test.jsonl"
    result = ferrotune.compare(
        labelled / "model", labelled / "train.jsonl", test, labelled / "run/adapter",
        tmp_path / "out", shots=2, neighbours=3, sequence_length=256, **QUIET,
    )  # fmt: skip
    found = {one.name: one for one in result.contenders}
    assert list(found) == [
        "base model", "few-shot (2)", "BM25 in the prompt (2)", "BM25 vote (3)",
        "TF-IDF + logistic regression", "fine-tuned",
    ]  # fmt: skip
    tuned = ferrotune.eval(
        labelled / "model", test, labelled / "run/adapter", sequence_length=256, **QUIET
    ).classification
    assert tuned is not None
    own = found["fine-tuned"]
    assert own.quality.value == pytest.approx(tuned.accuracy.value)
    assert own.macro_f1 is not None
    assert own.macro_f1.value == pytest.approx(tuned.macro_f1.value)
    assert own.difference is None

    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, asked = ([json.loads(line) for line in (labelled / name).read_text().splitlines()]
                    for name in ("train.jsonl", "test.jsonl"))  # fmt: skip
    pipeline = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(max_iter=1000))
    pipeline.fit([one["text"] for one in train], [one["label"] for one in train])
    right = pipeline.score([one["text"] for one in asked], [one["label"] for one in asked])
    linear = found["TF-IDF + logistic regression"]
    assert linear.quality.value == pytest.approx(right)
    assert linear.difference is not None
    assert linear.difference.value == pytest.approx(own.quality.value - right)
    assert linear.difference.low <= linear.difference.value <= linear.difference.high
    # The label's own words tell: counting words finds them, a random language model does not.
    assert right > 0.9 > 0.7 > found["base model"].quality.value
    assert all(one.seconds_per_example > 0 < one.bytes for one in result.contenders)

    stored = json.loads((tmp_path / "out/compare.json").read_text())["result"]
    assert stored["contenders"][-1]["quality"]["value"] == own.quality.value
    report = (tmp_path / "out/README.md").read_text()
    assert f"{own.quality.value:.3f} against" in report
    assert "| TF-IDF + logistic regression |" in report
    assert (tmp_path / "out/compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "TF-IDF + logistic regression" in str(result)


def test_texts(base: Path, tmp_path: Path) -> None:
    """Losses are those of `eval` on the prompts as they are built, over the answers' tokens."""
    source = random.Random(0)

    def write(name: str, count: int) -> Path:
        file = tmp_path / name
        words = ["king", "people", "water", "fire"]
        rows = [{"prompt": f"the {source.choice(words)} {source.randint(0, 999)} said ",
                 "completion": f"unto {source.choice(words)}"} for _ in range(count)]  # fmt: skip
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    train, test = write("train.jsonl", 60), write("test.jsonl", 20)
    run = ferrotune.train(
        **settings(
            base, data=train, heldout_data=write("heldout.jsonl", 10), output=tmp_path / "run",
            audit="off", max_steps=20, eval_every=20, near_duplicates=0.0,
        )
    )  # fmt: skip
    result = ferrotune.compare(
        base, train, test, run.adapter, tmp_path / "out", shots=3, sequence_length=128, **QUIET
    )
    assert result.measure == "loss"
    found = {one.name: one for one in result.contenders}
    records = [json.loads(line) for line in train.read_text().splitlines()]
    asked = [json.loads(line) for line in test.read_text().splitlines()]
    given = fixed_examples(records, 3, 0)
    near = [own[::-1] for own in Neighbours(records).nearest(asked, 3)]
    for name, adapter, examples in (
        ("base model", None, [[]] * 20),
        ("few-shot (3)", None, [given] * 20),
        ("BM25 in the prompt (3)", None, near),
        ("fine-tuned", run.adapter, [[]] * 20),
    ):
        rows = [
            {"prompt": in_context(one, own), "completion": one["completion"]}
            for one, own in zip(asked, examples, strict=True)
        ]
        file = tmp_path / "asked.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loss = ferrotune.eval(base, file, adapter, sequence_length=128, packing=False, **QUIET).loss
        assert found[name].quality.value == pytest.approx(loss, rel=1e-5), name
    assert found["fine-tuned"].quality.value < found["base model"].quality.value
    assert "Fine-tuning beats" in result.guide
    assert "not labels" in result.left_out["TF-IDF + logistic regression"]


def test_a_model_without_prompts_is_compared_with_the_rest(tmp_path: Path) -> None:
    labels.write_labelled(tmp_path / "train.jsonl", 24)
    labels.write_labelled(tmp_path / "test.jsonl", 9, seed=2)
    names = dict(enumerate(sorted(labels.TOPICS)))
    ids = {label: at for at, label in names.items()}
    model = labels.classifier("bert", tmp_path / "m", num_labels=3, id2label=names, label2id=ids)
    result = ferrotune.compare(
        model, tmp_path / "train.jsonl", tmp_path / "test.jsonl", None, tmp_path / "out",
        tuned=model, sequence_length=48, **QUIET,
    )  # fmt: skip
    assert [one.name for one in result.contenders] == [
        "base model", "BM25 vote (5)", "TF-IDF + logistic regression", "fine-tuned"
    ]  # fmt: skip
    assert result.contenders[0].quality == result.contenders[-1].quality
    assert result.contenders[0].difference == Interval(0.0, 0.0, 0.0)
    assert "takes no prompt" in result.left_out["few-shot (4)"]


def test_neighbours_and_votes_by_hand() -> None:
    train = [{"text": text, "label": label} for text, label in (
        ("red apple", "fruit"), ("green apple pie", "fruit"),
        ("red car", "car"), ("blue car", "car"),
    )]  # fmt: skip
    index = Neighbours(train)
    near = index.nearest([{"text": "blue car"}, {"text": "apple"}, {"text": "zebra"}], 3)
    assert near[0][0]["text"] == "blue car"
    assert {one["text"] for one in near[1][:2]} == {"red apple", "green apple pie"}
    assert len(near[2]) == 3
    assert vote(near[1]) == "fruit"
    assert vote([train[2], train[0]]) == "car"


def test_examples_take_turns() -> None:
    train = [{"text": str(at), "label": "ab"[at % 10 == 0]} for at in range(30)]
    chosen = fixed_examples(train, 4, 0)
    assert sorted(one["label"] for one in chosen) == ["a", "a", "b", "b"]
    assert chosen == fixed_examples(train, 4, 0) != fixed_examples(train, 4, 1)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "give one of adapter and tuned"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"test_data": "train.jsonl"}, "48 of 48 test texts are in the training data"),
        ({"test_data": "moon.jsonl"}, "labels that data never show: 'moon'"),
        ({"test_data": "plain.txt"}, "test_data: compare reads records with text and label"),
        ({"sequence_length": 24}, "raise sequence_length"),
    ],
)
def test_refusals(labelled: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    labels.write_labelled(labelled / "moon.jsonl", 8, seed=3, topics=["sea", "moon"])
    (labelled / "plain.txt").write_text("the sea\n")
    given = {
        "model": labelled / "model", "data": labelled / "train.jsonl", "test_data": "test.jsonl",
        "adapter": labelled / "run/adapter", "output": tmp_path / "out", **changes, **QUIET,
    }  # fmt: skip
    given["test_data"] = labelled / given["test_data"]
    with pytest.raises(ValueError, match=message):
        ferrotune.compare(**given)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_one_line(
    labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    words = ["--model", labelled / "model", "--data", labelled / "train.jsonl"]
    words += ["--test-data", labelled / "test.jsonl", "--adapter", labelled / "run/adapter"]
    assert cli.main(["compare", *map(str, words)]) == 1
    assert capsys.readouterr().err == (
        "error: compare needs bm25s: pip install 'ferrotune[compare]'\n"
    )


def test_macro_f1_is_scikit_learns() -> None:
    from sklearn.metrics import f1_score

    from ferrotune.comparing.judging import _macro_f1

    random_ = np.random.default_rng(0)
    truth, guess = random_.integers(4, size=(2, 50))
    expected = f1_score(truth, guess, average="macro", zero_division=0)
    assert _macro_f1(truth, guess, np.ones(50), 4) == pytest.approx(expected)
