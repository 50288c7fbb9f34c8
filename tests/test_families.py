"""GPT-2, BERT and classification heads beside transformers': logits, losses, every gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import LABELS, Rows, build, cancelling, classified, gradients, load, rows, saved
from llamas import (
    Batch,
    Computed,
    batch,
    check_gradients,
    edit_config,
    engine,
    largest,
    reference,
    relative,
    save,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")

LENGTHS = [7, 1, 65, 30]


def agree(
    found: Computed, truth: Computed, torchs: Computed, unused: frozenset[str] = frozenset()
) -> None:
    assert relative(found.logits, truth.logits) <= max(
        1e-5, 2 * relative(torchs.logits, truth.logits)
    )
    assert largest(found.logits, truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    assert found.gradients.keys() == truth.gradients.keys() - unused
    scales = cancelling(truth.gradients)
    check_gradients(found.gradients, truth.gradients, torchs.gradients, scales)


def causal(model: Any, data: Batch) -> Computed:
    found = reference(model, data)
    return Computed(found.logits, found.loss, gradients(model))


GPT2: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "wide MLP": {"n_inner": 100},
    "one head": {"n_head": 1},
    "odd heads": {"n_embd": 45, "n_head": 3},
    "exact gelu": {"activation_function": "gelu"},
    "large eps": {"layer_norm_epsilon": 0.1},
}


@pytest.mark.parametrize("shape", GPT2)
def test_gpt2_generates(shape: str, tmp_path: Path) -> None:
    save(build("gpt2", "LMHeadModel", **GPT2[shape]), tmp_path)
    data = batch(97, 3, 67, documents=[[], [5, 40], [64]])
    found = engine(tmp_path, data, full=True)
    truth, torchs = (causal(load(tmp_path, "ForCausalLM", d), data) for d in ("float64", "float32"))
    agree(found, truth, torchs)
    frozen = engine(tmp_path, data)
    assert largest(frozen.logits, truth.logits) <= 1e-4
    assert frozen.loss == pytest.approx(truth.loss, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_stored_types(family: str, dtype: str, tmp_path: Path) -> None:
    save(build(family), tmp_path, dtype)
    check_classifier(tmp_path, rows(LENGTHS))


def check_classifier(folder: Path, data: Rows) -> None:
    found = engine(folder, data.batch(), full=True)
    found = Computed(found.logits.reshape(len(data.lengths), -1), found.loss, found.gradients)
    truth, torchs = (
        classified(load(folder, "ForSequenceClassification", dtype), data)
        for dtype in ("float64", "float32")
    )
    agree(found, truth, torchs)
    frozen = engine(folder, data.batch())
    assert largest(frozen.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    assert frozen.loss == pytest.approx(truth.loss, rel=1e-6)
    assert frozen.gradients == {}


CLASSIFIERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 100, "num_labels": 2}),
    ("bert", {}),
    ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
    ("bert", {"num_attention_heads": 3, "hidden_size": 45, "type_vocab_size": 1}),
]


@pytest.mark.parametrize(("family", "changes"), CLASSIFIERS)
def test_classifiers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(family, **changes)
    save(model, tmp_path)
    data = rows(LENGTHS)
    fitting = np.minimum(data.labels, model.config.num_labels - 1)
    check_classifier(tmp_path, Rows(data.ids, data.lengths, fitting))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_padding_changes_nothing(family: str, tmp_path: Path) -> None:
    """Other tokens behind a row's last, or none at all, give the same logits."""
    saved(family, tmp_path)
    data, other = rows(LENGTHS), rows(LENGTHS, padding=9)
    together = engine(tmp_path, data.batch()).logits.reshape(len(LENGTHS), LABELS)
    changed = engine(tmp_path, other.batch()).logits.reshape(len(LENGTHS), LABELS)
    assert np.array_equal(together, changed)
    for at, length in enumerate(LENGTHS):
        alone = Rows(data.ids[at : at + 1, :length].copy(), [length], data.labels[at : at + 1])
        logits = engine(tmp_path, alone.batch()).logits.reshape(LABELS)
        assert largest(logits, together[at]) <= 1e-5


def test_a_bare_gpt2_folder_has_names_without_a_prefix(tmp_path: Path) -> None:
    """As the published gpt2 is stored: `h.0.…` for GPT2LMHeadModel, with mask buffers."""
    from safetensors.torch import load_file, save_file

    model = build("gpt2", "LMHeadModel")
    save(model, tmp_path)
    data = batch(97, 2, 20)
    expected = engine(tmp_path, data).logits
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(path).items()}
    import torch

    tensors["h.0.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
    save_file(tensors, path, {"format": "pt"})
    assert np.array_equal(engine(tmp_path, data).logits, expected)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=true"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative"),
        ("bert", {"is_decoder": True}, "is_decoder=true"),
        ("bert", {"hidden_act": "relu"}, "hidden_act"),
        ("bert", {"problem_type": "regression"}, "regression"),
        ("bert", {"vocab_size": 98}, r"\[97, 48\].*\[98, 48\]"),
        ("bert", {"id2label": {"0": "a", "2": "b"}}, "id2label"),
    ],
)  # fmt: skip
def test_what_a_config_may_not_say(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(family, tmp_path)
    edit_config(tmp_path, **change)
    data = rows([4])
    with pytest.raises((ValueError, NotImplementedError), match=message):
        engine(tmp_path, data.batch())


def test_a_model_without_a_head_classifies_nothing(tmp_path: Path) -> None:
    saved("bert", tmp_path, "Model")
    with pytest.raises(ValueError, match="no classification head"):
        engine(tmp_path, rows([4]).batch())


def test_labels_of_a_batch_are_checked(tmp_path: Path) -> None:
    saved("bert", tmp_path)
    data = rows([4, 3])
    data.labels[1] = LABELS
    with pytest.raises(ValueError, match="target 5 is outside the model's labels"):
        engine(tmp_path, data.batch())


def test_generation_matches_transformers(tmp_path: Path) -> None:
    """Greedy decoding with kept keys and values."""
    import torch

    import ferrotune
    from texts import VOCABULARY, add_tokenizer

    model = build("gpt2", "LMHeadModel", vocab_size=VOCABULARY, pad_token_id=None)
    save(model, tmp_path)
    add_tokenizer(tmp_path)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    prompt = "the red fox"
    config = json.loads((tmp_path / "config.json").read_text())
    ids = [config["bos_token_id"], *tokenizer.encode(prompt).ids]
    found = ferrotune.generate(tmp_path, prompt, max_tokens=12, temperature=0.0)
    out = model.float().generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(out[0].tolist())
    assert text.startswith(tokenizer.decode(ids) + found.text)
    assert found.tokens > 0


# Adapters


def peft_model(folder: Path, family: str, kind: str, target: Any) -> Any:
    """PEFT's LoRA on the folder's model, B and saved heads random."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    task = "SEQ_CLS" if kind == "ForSequenceClassification" else "CAUSAL_LM"
    config = LoraConfig(task_type=task, r=3, lora_alpha=5, target_modules=target)
    model: Any = get_peft_model(load(folder, kind, "float32"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def plain(name: str) -> str:
    """What the engine calls a tensor of PEFT's."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".default.", ".").replace(".modules_to_save.", ".")


@pytest.mark.parametrize(
    ("family", "kind", "target"),
    [
        ("gpt2", "ForCausalLM", ["c_attn"]),
        ("gpt2", "ForCausalLM", ["c_attn", "c_proj", "c_fc"]),
        ("gpt2", "ForSequenceClassification", "all-linear"),
        ("llama", "ForSequenceClassification", "all-linear"),
        ("bert", "ForSequenceClassification", ["query", "value"]),
        ("bert", "ForSequenceClassification", ["dense"]),
        ("bert", "ForSequenceClassification", "all-linear"),
    ],
)
def test_adapters_of_pefts(family: str, kind: str, target: Any, tmp_path: Path) -> None:
    """Logits and the gradients of every factor and of the head."""
    built = "LMHeadModel" if kind == "ForCausalLM" else kind
    folder = saved(family, tmp_path / "model", built)
    model = peft_model(folder, family, kind, target)
    model.save_pretrained(tmp_path / "adapter")
    if kind == "ForCausalLM":
        data = batch(97, 2, 30)
        torchs, truth = reference(model, data), reference(model.double(), data)
    else:
        texts = rows(LENGTHS)
        data = texts.batch()
        torchs, truth = classified(model, texts), classified(model.double(), texts)
    found = engine(folder, data, adapter=tmp_path / "adapter")
    assert largest(found.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-5)
    expected, own = (
        {plain(name): x for name, x in some.gradients.items() if "original" not in name}
        for some in (truth, torchs)
    )
    assert found.gradients.keys() == expected.keys()
    check_gradients(found.gradients, expected, own, cancelling(expected))
