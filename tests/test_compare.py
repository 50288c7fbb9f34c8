"""`ferrotune compare` beside what scikit-learn, PEFT's texts and plain counting give."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
import labels
from ferrotune import cli
from ferrotune.comparing.contenders import positions
from ferrotune.comparing.of_run import settings_with
from ferrotune.comparing.prompts import fixed_examples, in_context
from ferrotune.comparing.retrieval import Neighbours, vote
from ferrotune.metrics import Interval
from runs import base, settings
from test_run_page import read

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


def test_a_run_is_compared_on_its_page(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, weights and data are the run's own; the page takes the newest comparison."""
    run, test = tmp_path / "run", labelled / "test.jsonl"
    shutil.copytree(labelled / "run", run)
    page = run / "report.html"
    before = page.read_text()
    hint = re.search(r"ferrotune compare --run (\S+) --test-data FILE", before)
    assert hint is not None
    assert "No comparison was made" in before
    result = ferrotune.compare(
        run=run, test_data=test, shots=2, neighbours=3, sequence_length=256, **QUIET
    )
    assert (result.output, result.report) == (run / "comparison", page)
    alone = ferrotune.compare(
        labelled / "model", labelled / "train.jsonl", test, labelled / "run/adapter",
        tmp_path / "out", shots=2, neighbours=3, sequence_length=256, **QUIET,
    )  # fmt: skip
    assert [one.quality for one in result.contenders] == [one.quality for one in alone.contenders]
    written = page.read_text()
    found = read(written)
    text = "\n".join(found.texts)
    assert "No comparison was made" not in text
    assert len(found.sources) == len(read(before).sources) + 1
    for one in result.contenders:
        assert f"\n{one.name}\n{one.quality.text()}\n" in text
    digest = hashlib.sha256(test.read_bytes()).hexdigest()
    for part in (
        result.preface(),
        "Beyond these numbers",
        f"SHA-256 {digest}",
        "\nneighbours\n3\n",
    ):
        assert part in text, part
    assert "**" not in text
    # All around it is as it was.
    begin, end = written.index("<!--comparison-->"), written.index("<!--/comparison-->")
    assert before.startswith(written[:begin])
    assert before.endswith(written[end:])
    words = ["--run", run, "--test-data", test, "--shots", 1, "--sequence-length", 256]
    assert cli.main(["compare", *map(str, words), "--threads", "2", "--no-progress"]) == 0
    assert re.search(rf"\n  report +{re.escape(str(page))}\n", capsys.readouterr().out)
    assert len(read(page.read_text()).sources) == len(found.sources)
    assert "few-shot (1)" in page.read_text()
    assert "few-shot (2)" not in page.read_text()
    assert (run / "comparison-2/compare.json").is_file()


def test_runs_that_cannot_be_compared(labelled: Path, tmp_path: Path) -> None:
    def refused(message: str, **given: Any) -> None:
        with pytest.raises(ferrotune.SettingError, match=message):
            ferrotune.compare(run=tmp_path / "run", **given, **QUIET)

    test = labelled / "test.jsonl"
    refused("no run is over there", test_data=test)
    shutil.copytree(labelled / "run", tmp_path / "run")
    refused("no test files of its own: give test_data")
    refused("leave adapter out", test_data=test, adapter=labelled / "run/adapter")
    page = tmp_path / "run/report.html"
    page.write_text(page.read_text().replace("<!--/comparison-->", ""))
    refused("another version wrote it", test_data=test)
    assert not (tmp_path / "run/comparison").exists()
    with pytest.raises(ferrotune.SettingError, match="needs --data"):
        ferrotune.compare(labelled / "model", test_data=test, **QUIET)


@pytest.mark.parametrize(
    ("method", "role", "weights", "quant_type"),
    [("lora", "adapter", "adapter", None), ("qlora", "adapter", "adapter", "fp4"),
     ("full", "tuned", "model", None), ("freeze", "tuned", "model", None)],
)  # fmt: skip
def test_what_a_run_says_of_itself(
    method: str, role: str, weights: str, quant_type: str | None, tmp_path: Path
) -> None:
    """Weights by where the run's folder is now; a setting that is given stands."""
    columns = ("text_column", "prompt_column", "completion_column", "label_column")
    own = {"model": "m", "data": ["a"], "test_data": ["t"], "method": method, "quant_type": "fp4",
           "blocksize": 128, "double_quant": False, **dict.fromkeys(columns)}  # fmt: skip
    found = {"settings": {**own, "label_column": "kind"}, "result": {"weights": f"old/{weights}"}}
    (tmp_path / "results.json").write_text(json.dumps(found))
    (tmp_path / "report.html").write_text("<!--comparison--><!--/comparison-->")
    given = {"model": None, "data": ["b"], "test_data": None, "adapter": None, "tuned": None,
             "quant_type": None, "blocksize": 64, "double_quant": True,
             **dict.fromkeys(columns)}  # fmt: skip
    made = settings_with(tmp_path, given)
    assert made.pop(role) == str(tmp_path / weights)
    assert made.pop({"adapter": "tuned", "tuned": "adapter"}[role]) is None
    expected = {**given, "model": "m", "test_data": ["t"], "label_column": "kind"}
    if quant_type is not None:
        expected |= {"quant_type": "fp4", "blocksize": 128, "double_quant": False}
    assert made == {name: expected[name] for name in expected if name not in ("adapter", "tuned")}
    found["settings"]["data"] = ["<pandas.DataFrame 1>"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(ferrotune.SettingError, match="data was a table in memory: give data"):
        settings_with(tmp_path, {**given, "data": None})


def test_what_a_model_takes(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"num_virtual_tokens": 20}')
    for text, most in (('{"n_positions": 96}', 96), ('{"max_position_embeddings": 96}', 96),
                       ("{}", None)):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        assert positions(str(tmp_path), None) == most
        assert positions(str(tmp_path), str(tmp_path)) == (most and most - 20)


# Demonstrations in the prompt, on their own


def test_demonstrations_of_labels(labelled: Path, tmp_path: Path) -> None:
    """A draw's numbers are those of the comparison's contender with its seed."""
    train, test = labelled / "train.jsonl", labelled / "test.jsonl"
    result = ferrotune.eval(
        labelled / "model", test, shots=3, demonstrations=train, repeats=3, seed=4,
        sequence_length=256, **QUIET,
    )  # fmt: skip
    few = result.few_shot
    assert few is not None
    assert [one.seed for one in few.draws] == [4, 5, 6]
    compared = ferrotune.compare(
        labelled / "model", train, test, labelled / "run/adapter", tmp_path / "out", shots=3,
        seed=5, sequence_length=256, **QUIET,
    )  # fmt: skip
    same = next(one for one in compared.contenders if one.name == "few-shot (3)")
    measures = few.draws[1].measures
    assert measures["accuracy"].value == same.quality.value
    assert same.macro_f1 is not None
    assert measures["macro_f1"].value == same.macro_f1.value
    values = [one.measures["accuracy"].value for one in few.draws]
    spread = few.spread("accuracy")
    assert spread is not None
    assert (spread.mean, spread.low, spread.high) == (np.mean(values), min(values), max(values))
    assert f"accuracy, 3 draws  {spread.text()}" in str(result)
    assert result.tokens == 18
    losses = [one.measures["loss"].value for one in few.draws]
    assert result.loss == pytest.approx(np.mean(losses))
    assert len(set(losses)) == 3


def test_demonstrations_of_completions(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses are those of `eval` on the prompts as they are built; an adapter may be in it."""
    shown, asked = (
        [{"prompt": f"the {word} {at} said ", "completion": f"unto {word}"}
         for at in numbers for word in ("king", "people")]
        for numbers in (range(6), range(6, 12))
    )  # fmt: skip
    files = {}
    for name, records in (("shown", shown), ("asked", asked)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(one) + "\n" for one in records))
    run = ferrotune.train(
        **settings(
            base, data=files["shown"], heldout_data=files["asked"], output=tmp_path / "run",
            audit="off", max_steps=2, near_duplicates=0.0,
        )
    )  # fmt: skip
    words = ["--model", base, "--adapter", run.adapter, "--data", files["asked"], "--shots", 2]
    words += ["--demonstrations", files["shown"], "--repeats", 2, "--seed", 9, "--threads", 2]
    assert cli.main(["eval", *map(str, words), "--json", "--no-progress"]) == 0
    found = json.loads(capsys.readouterr().out)
    for at, draw in enumerate(found["few_shot"]["draws"]):
        given = fixed_examples(shown, 2, 9 + at)
        rows = [
            {"prompt": in_context(one, given), "completion": one["completion"]} for one in asked
        ]
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        expected = ferrotune.eval(base, file, run.adapter, packing=False, **QUIET)
        assert draw["seed"] == 9 + at
        assert draw["measures"]["loss"]["value"] == pytest.approx(expected.loss, rel=1e-5)
        assert found["tokens"] == expected.tokens
    one = ferrotune.eval(base, files["asked"], shots=1, demonstrations=files["shown"], **QUIET)
    assert one.few_shot is not None
    assert one.few_shot.spread("loss") is None
    assert "loss, seed 0" in str(one)
    assert "nats per token" in str(one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots must be at least 1, not 0"),
        ({"shots": 49}, "shots is 49, but demonstrations hold 48 records"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"shots": None}, "demonstrations is for demonstrations in the prompt: give shots"),
        ({"demonstrations": None}, "shots needs demonstrations"),
        ({"demonstrations": "test.jsonl"}, "18 of 18 data texts are in demonstrations too"),
        ({"eval_tokens": 5}, "eval_tokens is not for an evaluation with shots"),
        ({"shots": 40}, "raise sequence_length .*or lower shots"),
        ({"shots": 40, "sequence_length": 600}, "sequence_length 600 .*512 positions"),
        ({"adapter": "run/adapter"}, "makes a classifier of the model"),
        ({"model": "bert"}, "is a BertForSequenceClassification, no language model"),
    ],
)
def test_refused_demonstrations(labelled: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("model") == "bert" and not (labelled / "bert").exists():
        labels.classifier("bert", labelled / "bert")
    given: dict[str, Any] = {
        "model": "model", "data": "test.jsonl", "demonstrations": "train.jsonl", "shots": 2,
        "sequence_length": 128, **changes,
    }  # fmt: skip
    for name in ("model", "data", "demonstrations", "adapter"):
        if given.get(name):
            given[name] = labelled / given[name]
    with pytest.raises(ValueError, match=message):
        ferrotune.eval(**given, **QUIET)


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
        ({"adapter": None}, "give one of adapter, tuned and run"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"neighbours": 49}, "neighbours is 49, but data hold 48 records"),
        ({"test_data": "train.jsonl"}, "48 of 48 test_data texts are in data too"),
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
