"""The methods beside LoRA, next to PEFT: what each writes is read by the other, both ways."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bottlenecks
import ferrotune
from families import build, cancelling
from llamas import Batch, batch, check_gradients, engine, largest, save
from methods import (
    FAMILIES,
    Family,
    computed,
    in_engine_names,
    in_peft,
    inputs,
    task_of,
    tensors,
    train,
    with_data,
    write_peft,
)
from texts import BOS

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

NAMES = [f"{family}-{kind}" for family, kind in FAMILIES]


# Each family and each task once; the rest where time is no matter.
ALWAYS = (FAMILIES[0], FAMILIES[3], FAMILIES[4])
TRAINED = [
    pytest.param(family, marks=() if family in ALWAYS else pytest.mark.slow, id=name)
    for family, name in zip(FAMILIES, NAMES, strict=True)
]


@pytest.fixture(scope="module", params=TRAINED)
def trained_base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Path]:
    family: Family = request.param
    return family, with_data(family, tmp_path_factory.mktemp("base"))


def ia3(family: Family, **fields: Any) -> Any:
    from peft import IA3Config

    return IA3Config(task_type=task_of(family), **fields)


IA3: dict[str, tuple[Family, dict[str, Any]]] = {
    **dict(zip(NAMES, ((family, {}) for family in FAMILIES), strict=True)),
    "inputs of a group": (
        ("llama", "ForCausalLM"),
        {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    ),
    "a pattern": (
        ("gpt2", "LMHeadModel"),
        {
            "target_modules": r".*h\.1.*c_(attn|proj)",
            "feedforward_modules": r".*attn\.c_attn",
        },
    ),
    "all-linear": (
        ("bert", "ForSequenceClassification"),
        {"target_modules": "all-linear", "feedforward_modules": []},
    ),
}


@pytest.mark.parametrize("case", IA3)
def test_ia3_of_pefts_computes_as_there(case: str, tmp_path: Path) -> None:
    family, fields = IA3[case]
    base, adapter = write_peft(family, tmp_path, ia3(family, **fields))
    data = inputs(family)
    found = engine(base, data, adapter=adapter)
    truth, torchs = (
        computed(in_peft(base, family, adapter, dtype), data, family)
        for dtype in ("float64", "float32")
    )
    assert largest(found.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    expected, own = in_engine_names(truth.gradients), in_engine_names(torchs.gradients)
    assert any(name.endswith(".ia3_l") for name in expected)
    assert found.gradients.keys() == expected.keys()
    check_gradients(found.gradients, expected, own, cancelling(expected))


def sha(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_run(
    family: Family, base: Path, folder: Path, method: str, **changes: Any
) -> tuple[ferrotune.TrainResult, Any]:
    """A short run: it learns, what it wrote gives its numbers over an untouched base, and a run
    that is resumed ends in the same bytes. The result, and the adapter's first tensors."""
    before = sha(base)
    result = train(base, folder / "run", method, **changes)
    assert sha(base) == before
    assert result.heldout_loss_before is not None
    assert result.heldout_loss_best is not None
    assert result.heldout_loss_best < result.heldout_loss_before
    again = ferrotune.eval(
        base, base.parent / "heldout.jsonl", result.weights, sequence_length=40, batch_size=6,
        threads=2, progress=False,
    )  # fmt: skip
    # The frozen weights of the run were those of the folder to the last bit.
    assert again.loss == result.heldout_loss_best
    halves = folder / "halves"
    stop = {"on_event": lambda event: (event["event"], event.get("step")) != ("step", 3)}
    with pytest.raises(ferrotune.TrainInterrupted):
        train(base, halves, method, **changes, **stop)
    resumed = train(base, halves, method, resume=True, **changes)
    assert resumed.heldout_loss_best == result.heldout_loss_best
    assert sha(halves / "adapter") | {"README.md": ""} == sha(folder / "run" / "adapter") | {
        "README.md": ""
    }
    first = train(base, folder / "first", method, max_steps=1, **changes | {"learning_rate": 1e-30})
    return result, tensors(first.weights)


def check_moved(found: dict[str, Any], first: dict[str, Any]) -> None:
    assert found.keys() == first.keys()
    for name, values in found.items():
        assert not np.array_equal(values, first[name]), name


def generated(model: Path, adapter: Path | None = None) -> str:
    return ferrotune.generate(
        model, "and the", adapter, max_tokens=12, temperature=0.0, threads=2
    ).text


def test_ia3_that_was_trained_is_pefts(trained_base: tuple[Family, Path], tmp_path: Path) -> None:
    family, base = trained_base
    rate = 1e-3 if family[0] == "bert" else 3e-2
    result, first = check_run(family, base, tmp_path, "ia3", learning_rate=rate)
    found = tensors(result.weights)
    check_moved(found, first)
    vectors = {name: values for name, values in first.items() if name.endswith(".ia3_l")}
    assert vectors
    assert all((values == 1).all() for values in vectors.values())
    config = json.loads((result.weights / "adapter_config.json").read_text())
    peft = ia3(family).to_dict()
    assert config.keys() == {name for name in peft if name != "eva_config"}
    data = inputs(family, 90)
    truth = computed(in_peft(base, family, result.weights), data, family)
    ours = engine(base, data, adapter=result.weights)
    assert largest(ours.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    merged = ferrotune.merge(base, result.weights, tmp_path / "merged")
    assert merged.merged_modules == len(vectors)
    whole = engine(merged.output, data)
    assert largest(whole.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    if task_of(family) == "CAUSAL_LM":
        assert generated(base, result.weights) == generated(merged.output) != generated(base)


def test_ia3_over_4_bit_weights(tmp_path: Path) -> None:
    family = ("llama", "ForCausalLM")
    base, adapter = write_peft(family, tmp_path, ia3(family))
    data = inputs(family)
    coarse, exact = (engine(base, data, adapter=adapter, quant_type=q) for q in ("nf4", None))
    assert 1e-3 < largest(coarse.logits, exact.logits) < 1


VIRTUAL = ["prompt", "prefix"]


def virtual(method: str, family: Family, count: int = 4) -> Any:
    from peft import PrefixTuningConfig, PromptTuningConfig

    kind = PromptTuningConfig if method == "prompt" else PrefixTuningConfig
    return kind(task_type=task_of(family), num_virtual_tokens=count)


def check_virtual(
    method: str, base: Path, family: Family, adapter: Path, data: Batch, lengths: tuple[int, ...]
) -> None:
    """Logits, loss and gradients beside PEFT's, whose prefix is one tensor of all layers."""
    found = engine(base, data, adapter=adapter)
    truth, torchs = (
        computed(in_peft(base, family, adapter, dtype), data, family, lengths)
        for dtype in ("float64", "float32")
    )
    assert largest(found.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    expected, own = in_engine_names(truth.gradients), in_engine_names(torchs.gradients)
    name = next(name for name in expected if name.startswith("prompt_encoder"))
    ours = dict(found.gradients)
    if method == "prefix":
        count = json.loads((adapter / "adapter_config.json").read_text())["num_virtual_tokens"]
        layers = [name for name in ours if name.endswith(".prefix")]
        ours[name] = np.concatenate(
            [ours.pop(layer).reshape(count, -1) for layer in sorted(layers)], axis=1
        ).ravel()
    else:
        ours[name] = ours.pop("prompt_embeddings")
    assert ours.keys() == expected.keys()
    check_gradients(ours, expected, own)


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_of_pefts_compute_as_there(
    method: str, family: Family, tmp_path: Path
) -> None:
    base, adapter = write_peft(family, tmp_path, virtual(method, family))
    # PEFT pools a padded row's padding where a prompt stands before the text; a prefix does not.
    padded = method == "prefix" or family[0] == "bert"
    lengths = (9, 4, 7) if padded and task_of(family) == "SEQ_CLS" else (9, 9, 9)
    check_virtual(method, base, family, adapter, inputs(family, lengths=lengths), lengths)


@pytest.mark.parametrize("method", VIRTUAL)
def test_each_document_of_a_packed_row_has_its_virtual_tokens(method: str, tmp_path: Path) -> None:
    family = ("llama", "ForCausalLM")
    base, adapter = write_peft(family, tmp_path, virtual(method, family))
    data = batch(97, 2, 30, documents=[[11, 19], [25]])
    together = engine(base, data, adapter=adapter)
    losses = []
    for row, begin, end in [(0, 0, 11), (0, 11, 19), (0, 19, 30), (1, 0, 25), (1, 25, 30)]:
        alone = engine(base, data.row(row, begin, end), adapter=adapter)
        assert largest(together.logits[row : row + 1, begin:end], alone.logits) <= 1e-5
        losses.append(alone.loss)
    assert together.loss == pytest.approx(sum(losses), rel=1e-6)


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_that_were_trained_are_pefts(
    method: str, trained_base: tuple[Family, Path], tmp_path: Path
) -> None:
    family, base = trained_base
    rate = 1e-3 if family[0] == "bert" else 3e-2
    changes = {"num_virtual_tokens": 3, "learning_rate": rate}
    result, first = check_run(family, base, tmp_path, method, **changes)
    check_moved(tensors(result.weights), first)
    config = json.loads((result.weights / "adapter_config.json").read_text())
    assert config.keys() == virtual(method, family).to_dict().keys()
    data = inputs(family, 90)
    truth = computed(in_peft(base, family, result.weights), data, family)
    ours = engine(base, data, adapter=result.weights)
    assert largest(ours.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    with pytest.raises(ValueError, match="cannot be merged"):
        ferrotune.merge(base, result.weights, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    if task_of(family) == "CAUSAL_LM":
        check_generated(base, result.weights, in_peft(base, family, result.weights))


def check_generated(base: Path, adapter: Path, model: Any) -> None:
    """The likeliest tokens are those of the reference `model`'s passes over the whole text."""
    import torch
    from tokenizers import Tokenizer

    found = ferrotune.generate(base, "and the", adapter, max_tokens=5, temperature=0.0, threads=2)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    prompt = [BOS, *tokenizer.encode("and the").ids]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(found.tokens):
            tokens = torch.tensor([ids])
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            ids.append(int(logits[0, -1].argmax()))
    assert tokenizer.decode(ids) == tokenizer.decode(prompt) + found.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1, not 0"),
        ({"num_virtual_tokens": 217}, "with num_virtual_tokens 217 is longer than the 256"),
        ({"feedforward_modules": ["down_proj"]}, "method ia3 alone"),
    ],
)
@pytest.mark.parametrize("method", VIRTUAL)
def test_settings_that_do_not_fit_virtual_tokens(
    method: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = with_data(("llama", "ForCausalLM"), tmp_path)
    with pytest.raises(ValueError, match=message):
        train(base, tmp_path / "run", method, **changes)
    assert not (tmp_path / "run").exists()


VARIANTS = ["houlsby", "pfeiffer"]


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bottleneck_adapters_are_the_papers(variant: str, family: Family, tmp_path: Path) -> None:
    """Logits, loss and gradients of a folder that the test wrote, beside torch in float64."""
    base = save(build(*family), tmp_path / "base")
    adapter = bottlenecks.write(family, variant, 7, tmp_path / "adapter")
    data = inputs(family)
    found = engine(base, data, adapter=adapter)
    truth, torchs = (
        computed(bottlenecks.attached(base, family, adapter, dtype), data, family)
        for dtype in ("float64", "float32")
    )
    assert largest(found.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    expected, own = (bottlenecks.by_name(x.gradients) for x in (truth, torchs))
    assert found.gradients.keys() == expected.keys()
    check_gradients(found.gradients, expected, own)
    assert largest(found.logits, engine(base, data).logits) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_bottleneck_adapters_that_were_trained(
    variant: str, trained_base: tuple[Family, Path], tmp_path: Path
) -> None:
    family, base = trained_base
    rate = 1e-3 if family in ALWAYS[1:] else 1e-2
    changes = {"adapter_variant": variant, "reduction_factor": 6, "learning_rate": rate}
    result, first = check_run(family, base, tmp_path, "adapter", **changes)
    found = tensors(result.weights)
    check_moved(found, first)
    assert len([name for name in found if name.endswith(".adapter.down.weight")]) == len(
        bottlenecks.blocks(family[0], variant)
    )
    assert all(x.shape == (8, 48) for name, x in found.items() if name.endswith("down.weight"))
    data = inputs(family, 90)
    truth = computed(bottlenecks.attached(base, family, result.weights), data, family)
    ours = engine(base, data, adapter=result.weights)
    assert largest(ours.logits.reshape(truth.logits.shape), truth.logits) <= 1e-4
    with pytest.raises(ValueError, match="cannot be merged"):
        ferrotune.merge(base, result.weights, tmp_path / "merged")
    if task_of(family) == "CAUSAL_LM":
        check_generated(base, result.weights, bottlenecks.attached(base, family, result.weights))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor must be at least 1, not 0"),
        ({"reduction_factor": 49}, "leaves nothing of the model's hidden size 48"),
        ({"adapter_variant": "parallel"}, "adapter_variant"),
    ],
)
def test_settings_that_do_not_fit_adapters(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = with_data(("llama", "ForCausalLM"), tmp_path)
    with pytest.raises(ValueError, match=message):
        train(base, tmp_path / "run", "adapter", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedforward_modules": ["gate_proj"]}, "choose none of the target_modules"),
        ({"target_modules": ["nothing"]}, "chooses none of the model's"),
        ({"method": "lora", "feedforward_modules": ["down_proj"]}, "method ia3 alone"),
        ({"trained_layers": 1}, "method freeze alone"),
    ],
)
def test_settings_that_do_not_fit_ia3(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = with_data(("llama", "ForCausalLM"), tmp_path)
    method = changes.pop("method", "ia3")
    with pytest.raises(ValueError, match=message):
        train(base, tmp_path / "run", method, **changes)
    assert not (tmp_path / "run").exists()
