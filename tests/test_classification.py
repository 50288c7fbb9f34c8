"""Classification from settings to a run's folder, beside transformers, PEFT and scikit-learn."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
from labels import TOPICS, classifier, encoded, logits_of, settings, write_labelled

pytest.importorskip("torch")
pytest.importorskip("peft")

LABELS = sorted(TOPICS)
Family = tuple[str, str]
BARE: list[Family] = [("bert", "Model"), ("gpt2", "LMHeadModel"), ("llama", "ForCausalLM")]


@pytest.fixture(scope="module", params=BARE, ids=lambda family: str(family[0]))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a classification head; 96 labelled texts beside it, and 30 held out."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp("base")
    write_labelled(folder / "train.jsonl", 96)
    write_labelled(folder / "heldout.jsonl", 30, seed=1)
    return classifier(family, folder / "model", kind)


def heldout_loss(model: Any, base: Path) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy by torch's numbers."""
    ids, labels = encoded(base, base.parent / "heldout.jsonl")
    logits = logits_of(model, ids)
    truth = np.array([LABELS.index(label) for label in labels])
    top = logits.max(1, keepdims=True)
    chosen = np.take_along_axis(logits, truth[:, None], 1)
    losses = np.log(np.exp(logits - top).sum(1, keepdims=True)) + top - chosen
    return float(losses.mean()), float((logits.argmax(1) == truth).mean())


def in_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def test_an_adapter_with_its_head_loads_in_peft(base: Path, tmp_path: Path) -> None:
    result = ferrotune.train(**settings(base, output=tmp_path / "run", task="classification"))
    assert result.model["labels"] == LABELS
    assert result.classification is not None
    assert result.classification_before is not None
    assert result.classification.labels == tuple(LABELS)
    loss, accuracy = heldout_loss(in_peft(base, result.weights), base)
    assert result.heldout_loss_best == pytest.approx(loss, rel=1e-4)
    assert result.classification.accuracy.value == pytest.approx(accuracy)
    assert accuracy > 0.6
    assert result.heldout_loss_before is not None
    assert loss < result.heldout_loss_before
    again = ferrotune.eval(
        base, base.parent / "heldout.jsonl", result.weights, sequence_length=48, threads=2,
        progress=False,
    )  # fmt: skip
    assert again.loss == pytest.approx(result.heldout_loss_best, rel=1e-6)
    assert again.classification is not None
    assert again.classification.confusion == result.classification.confusion
    config = json.loads((result.weights / "config.json").read_text())
    assert config["id2label"] == {str(at): label for at, label in enumerate(LABELS)}


def test_a_whole_model_loads_in_transformers(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    changes = {"method": "full", "task": "classification", "learning_rate": 1e-3}
    result = ferrotune.train(**settings(base, output=tmp_path / "run", **changes))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        result.weights, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert [model.config.id2label[at] for at in range(3)] == LABELS
    loss, accuracy = heldout_loss(model.eval(), base)
    assert result.heldout_loss_best == pytest.approx(loss, rel=1e-4)
    assert result.classification is not None
    assert result.classification.accuracy.value == pytest.approx(accuracy)
    again = ferrotune.eval(
        result.weights, base.parent / "heldout.jsonl", sequence_length=48, threads=2, progress=False
    )
    assert again.loss == pytest.approx(loss, rel=1e-4)


def test_a_merged_adapter_is_the_adapted_model(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    result = ferrotune.train(
        **settings(base, output=tmp_path / "run", task="classification", max_steps=10)
    )
    merged = ferrotune.merge(base, result.weights, tmp_path / "merged")
    assert merged.merged_modules > 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids, _ = encoded(base, base.parent / "heldout.jsonl")
    expected = logits_of(in_peft(base, result.weights), ids)
    assert np.abs(logits_of(model, ids) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_qlora_over_four_bits(base: Path, tmp_path: Path) -> None:
    changes = {"method": "qlora", "task": "classification"}
    result = ferrotune.train(**settings(base, output=tmp_path / "run", **changes))
    assert result.model["quantized_bytes"] > 0
    assert result.heldout_loss_best is not None
    assert result.heldout_loss_before is not None
    assert result.heldout_loss_best < result.heldout_loss_before
    again = ferrotune.eval(
        base, base.parent / "heldout.jsonl", result.weights, quant_type="nf4", sequence_length=48,
        threads=2, progress=False,
    )  # fmt: skip
    assert again.loss == pytest.approx(result.heldout_loss_best, rel=1e-6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a head for three labels that have the data's names."""
    folder = tmp_path_factory.mktemp("bert")
    write_labelled(folder / "train.jsonl", 48)
    write_labelled(folder / "heldout.jsonl", 15, seed=1)
    names = dict(enumerate(LABELS))
    return classifier(
        "bert", folder / "model", num_labels=3, id2label=names,
        label2id={label: at for at, label in names.items()},
    )  # fmt: skip


def test_an_adapter_of_pefts_is_read(bert: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    model: Any = AutoModelForSequenceClassification.from_pretrained(bert)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    model.eval().save_pretrained(tmp_path)
    loss, accuracy = heldout_loss(model, bert)
    found = ferrotune.eval(
        bert, bert.parent / "heldout.jsonl", tmp_path, sequence_length=48, threads=2, progress=False
    )
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert found.classification is not None
    assert found.classification.accuracy.value == pytest.approx(accuracy)


def test_the_models_own_head_is_kept_where_it_knows_the_labels(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    result = ferrotune.train(**settings(bert, output=tmp_path / "run", max_steps=2))
    loss, _ = heldout_loss(AutoModelForSequenceClassification.from_pretrained(bert).eval(), bert)
    assert result.heldout_loss_before == pytest.approx(loss, rel=1e-4)


def test_measures_are_scikit_learns(bert: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    from transformers import AutoModelForSequenceClassification

    found = ferrotune.eval(
        bert, bert.parent / "train.jsonl", sequence_length=48, threads=2, progress=False
    ).classification
    assert found is not None
    model: Any = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    ids, labels = encoded(bert, bert.parent / "train.jsonl")
    logits = logits_of(model, ids)
    truth = np.array([LABELS.index(label) for label in labels])
    guess = logits.argmax(1)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert found.examples == len(labels)
    for name, expected in (
        ("accuracy", metrics.accuracy_score(truth, guess)),
        ("macro_f1", metrics.f1_score(truth, guess, average="macro", zero_division=0)),
        ("mcc", metrics.matthews_corrcoef(truth, guess)),
        ("loss", metrics.log_loss(truth, probabilities, labels=[0, 1, 2])),
        ("calibration_error", calibration_error(truth, guess, probabilities.max(1))),
    ):
        interval = getattr(found, name)
        assert interval.value == pytest.approx(expected, rel=1e-4, abs=1e-6), name
        assert interval.low <= interval.high
    table = metrics.precision_recall_fscore_support(truth, guess, labels=[0, 1, 2], zero_division=0)
    for one, *expected in zip(found.classes, *table, strict=True):
        values = [one.precision.value, one.recall.value, one.f1.value, one.support]
        assert values == pytest.approx(expected)
    confusion = metrics.confusion_matrix(truth, guess, labels=[0, 1, 2])
    assert np.array_equal(found.confusion, confusion)
    accuracy = found.accuracy
    deviation = (accuracy.value * (1 - accuracy.value) / len(labels)) ** 0.5
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * deviation, rel=0.2)


def calibration_error(truth: Any, guess: Any, confidence: Any) -> float:
    edges = np.linspace(0, 1, 16)
    total = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = (truth == guess)[inside].mean() - confidence[inside].mean()
            total += inside.mean() * abs(gap)
    return total


def test_a_run_writes_its_measures_everywhere(bert: Path, tmp_path: Path) -> None:
    result = ferrotune.train(**settings(bert, output=tmp_path / "run", max_steps=20, eval_every=10))
    evaluations = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"eval"' in line
    ]
    assert len(evaluations) == 3
    assert all(
        0 <= one[name]["value"] <= 1 for one in evaluations for name in ("accuracy", "macro_f1")
    )
    stored = json.loads((tmp_path / "run" / "results.json").read_text())["result"]
    assert stored["classification"] == result.to_dict()["classification"]
    card = (result.weights / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "| true \\\\ predicted | land | sea | sky |" in card or "true \\ predicted" in card
    assert "AutoModelForSequenceClassification" in card
    assert "held-out macro-F1" in str(result)


def test_seeds_decide_a_run(bert: Path, tmp_path: Path) -> None:
    losses = [
        ferrotune.train(
            **settings(bert, output=tmp_path / str(at), seed=seed, max_steps=4, lora_dropout=0.1)
        ).heldout_loss_best
        for at, seed in enumerate([0, 0, 1])
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_resumed_run_ends_at_the_unbroken_runs_numbers(bert: Path, tmp_path: Path) -> None:
    whole = ferrotune.train(**settings(bert, output=tmp_path / "whole", max_steps=12))
    stop = [False]

    def on_event(event: dict[str, Any]) -> bool:
        stop[0] |= event["event"] == "step" and event["step"] == 5
        return not stop[0]

    with pytest.raises(ferrotune.TrainInterrupted):
        ferrotune.train(**settings(bert, output=tmp_path / "part", max_steps=12), on_event=on_event)
    rest = ferrotune.train(**settings(bert, output=tmp_path / "part", max_steps=12, resume=True))
    assert rest.heldout_loss_best == whole.heldout_loss_best
    assert rest.classification == whole.classification


# What is refused


def refused(model: Path, tmp_path: Path, message: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=message):
        ferrotune.train(**settings(model, output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_labels_that_training_never_shows(bert: Path, tmp_path: Path) -> None:
    other = write_labelled(tmp_path / "other.jsonl", 8, seed=3, topics=["sea", "moon"])
    refused(bert, tmp_path, "never show: 'moon'", heldout_data=other)


def test_one_label_alone(bert: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "one.jsonl", 20, topics=["sea"])
    refused(bert, tmp_path, "one label alone", data=data, heldout_data=(), audit="off")


def test_records_without_a_label(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "plain.jsonl"
    data.write_text('{"text": "the sea"}\n{"text": "the land"}\n')
    refused(bert, tmp_path, "label", data=data, heldout_data=data, audit="off")


def test_prompts_are_not_texts(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    records = [{"prompt": f"{at}", "completion": "b", "label": "sea"} for at in range(4)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    refused(bert, tmp_path, "text with its label", data=data, audit="off")


def test_a_classifier_generates_nothing(bert: Path, tmp_path: Path) -> None:
    refused(bert, tmp_path, "causal language model", task="generation")
    with pytest.raises(ValueError, match="generates no text"):
        ferrotune.generate(bert, "the sea")


def test_a_label_the_model_does_not_know(bert: Path, tmp_path: Path) -> None:
    other = write_labelled(tmp_path / "other.jsonl", 8, topics=["moon"])
    with pytest.raises(ValueError, match=r"'moon'.*it knows land, sea, sky"):
        ferrotune.eval(bert, other, sequence_length=48, progress=False)


def test_the_head_is_not_a_target(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="classifier"):
        ferrotune.train(
            **settings(bert, output=tmp_path / "run", target_modules=["query", "classifier"])
        )


# Freezing


@pytest.mark.parametrize("trained_layers", [0, 1])
def test_freeze_trains_the_head_and_the_last_blocks_alone(
    base: Path, trained_layers: int, tmp_path: Path
) -> None:
    """Every tensor outside stays bit-identical; every one inside moves."""
    from safetensors.numpy import load_file

    changes = {"method": "freeze", "task": "classification", "trained_layers": trained_layers}
    length = {"warmup_steps": 0, "learning_rate": 3e-4, "eval_every": 40}
    result = ferrotune.train(**settings(base, output=tmp_path / "run", **changes, **length))
    assert result.adapter is None
    assert result.best_step == 40, "the weights that are written must be trained ones"
    before = load_file(base / "model.safetensors")
    after = load_file(result.weights / "model.safetensors")
    last = {"bert": "encoder.layer.1.", "gpt2": "h.1.", "llama": "layers.1."}
    family = json.loads((base / "config.json").read_text())["model_type"]
    inside = ["classifier.", "score.", "pooler."]
    if trained_layers:
        inside += [last[family], "ln_f.", "model.norm."]
    frozen = 0
    for name, values in after.items():
        stored = before.get(name, before.get(name.partition(".")[2]))
        if any(part in name for part in inside):
            assert stored is None or (values != stored).any(), name
        else:
            assert stored is not None, name
            assert np.array_equal(values, stored), name
            frozen += 1
    assert frozen > 5
    loss, _ = heldout_loss(whole(result.weights), base)
    assert result.heldout_loss_best == pytest.approx(loss, rel=1e-4)


def test_freeze_of_a_language_model_trains_its_last_block(tmp_path: Path) -> None:
    """The output layer is the embedding here, and stays as it is."""
    from safetensors.numpy import load_file

    base = classifier("gpt2", tmp_path / "model", "LMHeadModel")
    write_labelled(tmp_path / "train.jsonl", 40)
    write_labelled(tmp_path / "heldout.jsonl", 8, seed=1)
    refused(base, tmp_path, "leaves frozen: give trained_layers", method="freeze")
    changes = {"method": "freeze", "trained_layers": 1, "learning_rate": 1e-3, "max_steps": 20}
    result = ferrotune.train(**settings(base, output=tmp_path / "run", **changes))
    assert result.task == "generation"
    assert result.best_step == 20
    before = load_file(base / "model.safetensors")
    after = load_file(result.weights / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in after.items():
        trained = ".h.1." in name or ".ln_f." in name
        assert np.array_equal(values, before[name]) != trained, name


def whole(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_blocks_that_cannot_be_trained(bert: Path, tmp_path: Path) -> None:
    refused(bert, tmp_path, "method freeze alone", trained_layers=1)
    refused(bert, tmp_path, "the model has 2 blocks", method="freeze", trained_layers=3)


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "ForSequenceClassification"), ("gpt2", "LMHeadModel")]
)
def test_a_tokenizer_with_more_tokens_than_the_embedding(
    family: str, kind: str, tmp_path: Path
) -> None:
    write_labelled(tmp_path / "train.jsonl", 12)
    write_labelled(tmp_path / "heldout.jsonl", 6, seed=1)
    model = classifier(family, tmp_path / "model", kind)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(model / "tokenizer.json"))
    refused(model, tmp_path, "up to id 300, but the model's embedding has 300 rows", audit="off")
