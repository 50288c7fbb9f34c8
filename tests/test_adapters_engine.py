"""LoRA in the engine beside PEFT: logits and gradients, 4-bit bases, training, merging, dropout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
from llamas import (
    Array,
    Batch,
    batch,
    check_gradients,
    computing_in,
    engine,
    largest,
    llama,
    load,
    reference,
    relative,
    save,
)
from texts import VOCABULARY, add_tokenizer, write_lines

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from peft import LoraConfig, PeftModel, get_peft_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "list": {"target_modules": ["q_proj", "v_proj"], "r": 3},
    "one of a group": {"target_modules": ["k_proj", "up_proj"], "r": 5, "lora_alpha": 7},
    "suffix": {"target_modules": ["self_attn.o_proj", "mlp.down_proj"], "r": 1},
    "full names": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj"]
    },
    "regex": {"target_modules": r".*layers\.1\..*(q|gate|down)_proj"},
    "lookahead": {"target_modules": r"(?!.*layers\.0).*_proj"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 6, "lora_alpha": 5},
    "patterns": {
        "target_modules": "all-linear",
        "r": 4,
        "rank_pattern": {"q_proj": 2, r".*layers\.1.*down_proj": 9},
        "alpha_pattern": {"v_proj": 3, "layers.0.mlp.gate_proj": 40},
    },
    "patterns with rslora": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"k_proj": 7},
        "alpha_pattern": {"up_proj": 64},
    },
    "layers": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "gate_proj"]},
    "rank beyond the width": {"target_modules": ["q_proj", "v_proj"], "r": 70},
}


def peft_adapter(base: Path, folder: Path, seed: int = 0, **fields: Any) -> None:
    """An adapter as PEFT writes it, B random."""
    model = get_peft_model(
        load(base, "float32"), LoraConfig(**{"r": 8, "lora_alpha": 16, **fields})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3 * parameter.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(str(folder))


def with_peft(base: Any, adapter: Path, dtype: str) -> Any:
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    return computing_in(model, dtype)


def by_engine_names(gradients: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): values
        for name, values in gradients.items()
    }


def check(folder: Path, adapter: Path, data: Batch, base: Any = load, **options: Any) -> None:
    """`base` makes the reference's base model from the folder and a dtype."""
    found = engine(folder, data, adapter=adapter, **options)
    truth, torchs = (
        reference(with_peft(base(folder, dtype), adapter, dtype), data)
        for dtype in ("float64", "float32")
    )
    assert largest(found.logits, truth.logits) <= 1e-4
    assert relative(found.logits, truth.logits) <= max(
        1e-5, 2 * relative(torchs.logits, truth.logits)
    )
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    expected, own = by_engine_names(truth.gradients), by_engine_names(torchs.gradients)
    assert found.gradients.keys() == expected.keys()
    assert all("lora_" in name for name in expected)
    check_gradients(found.gradients, expected, own)
    without = engine(
        folder, data, **{name: x for name, x in options.items() if name == "quant_type"}
    )
    assert largest(found.logits, without.logits) > 1e-2


@pytest.fixture(scope="module")
def trained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and lines.jsonl beside it."""
    folder = tmp_path_factory.mktemp("trained")
    base = save(llama(vocab_size=VOCABULARY, **WIDE), folder / "base")
    add_tokenizer(base)
    write_lines(folder / "lines.jsonl", 80)
    return base


def train(base: Path, output: Path, **settings: Any) -> ferrotune.TrainResult:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "batch_size": 4,
        "sequence_length": 48,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "eval_every": 2,
        "heldout": 0.2,
        "threads": 2,
        "progress": False,
        "target_modules": "all-linear",
    }
    return ferrotune.train(base, base.parent / "lines.jsonl", output, **{**defaults, **settings})


@pytest.mark.parametrize("shape", ADAPTERS)
def test_adapters_that_peft_wrote(shape: str, tmp_path: Path) -> None:
    base = save(
        llama(attention_bias=shape == "list", mlp_bias=shape == "all-linear"), tmp_path / "base"
    )
    peft_adapter(base, tmp_path / "adapter", **ADAPTERS[shape])
    check(base, tmp_path / "adapter", batch(97, 3, 65, documents=[[20, 50]]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_over_16_bit_weights(dtype: str, tmp_path: Path) -> None:
    base = save(llama(tie_word_embeddings=True), tmp_path / "base", dtype, "40KB")
    peft_adapter(base, tmp_path / "adapter", target_modules="all-linear", r=5)
    check(base, tmp_path / "adapter", batch(97, 2, 37))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ADAPTERS)
@pytest.mark.parametrize("columns", [1, 64, 130])
def test_matrix_of_adapters(shape: str, columns: int, tmp_path: Path) -> None:
    model = llama(seed=columns, num_attention_heads=6, num_key_value_heads=2, head_dim=10)
    base = save(model, tmp_path / "base", "bfloat16")
    peft_adapter(base, tmp_path / "adapter", **ADAPTERS[shape])
    check(base, tmp_path / "adapter", batch(97, 2, columns))


@pytest.mark.parametrize(
    ("pattern", "module"),
    [(r".*layers\.1\.mlp\..*", "mlp.act_fn"), (r".*mlp", "mlp"), (r"model\.r.*", "rotary_emb")],
)
def test_patterns_that_peft_refuses(
    pattern: str, module: str, trained_base: Path, tmp_path: Path
) -> None:
    """A pattern that also chooses a module without a weight is an error there and here."""
    with pytest.raises(ValueError, match="is not supported"):
        peft_adapter(trained_base, tmp_path / "adapter", target_modules=pattern)
    with pytest.raises(
        ValueError, match=rf"target_modules chooses '\S*{module}', which is not a linear layer"
    ):
        train(trained_base, tmp_path / "run", target_modules=pattern)
    assert not (tmp_path / "run").exists()


# 4-bit bases


def bitsandbytes_base(quant_type: str, rounded: bool = False) -> Any:
    """Makes models whose layers hold what bitsandbytes dequantises to; the tables are dense.

    The values are codes × absmax in float32; `rounded` leaves them in the type that was stored, as
    bitsandbytes itself does before it computes.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def base(folder: Path, dtype: str) -> Any:
        model = load(folder, "float32")
        stored = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                weight = module.weight.data.to(stored)
                codes, state = quantize_4bit(
                    weight, blocksize=64, compress_statistics=True, quant_type=quant_type
                )
                state.dtype = stored if rounded else torch.float32
                module.weight.data = dequantize_4bit(codes, state).float()
        return computing_in(model, dtype)

    return base


# The in-features are multiples of 64: bitsandbytes 0.50's AVX-512 path dequantises wrongly where
# the last dimension is not a multiple of the blocksize.
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["all-linear", "patterns"])
def test_adapters_over_4_bit_weights(
    quant_type: str, dtype: str, shape: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base = save(llama(**WIDE), tmp_path / "base", dtype)
    peft_adapter(base, tmp_path / "adapter", **ADAPTERS[shape])
    data = batch(97, 2, 65)
    check(base, tmp_path / "adapter", data, bitsandbytes_base(quant_type), quant_type=quant_type)
    dense, coarse = engine(base, data), engine(base, data, quant_type=quant_type)
    assert largest(coarse.logits, dense.logits) > 1e-2
    truth = reference(bitsandbytes_base(quant_type)(base, "float64"), data)
    assert largest(coarse.logits, truth.logits) <= 1e-4
    rounded = reference(bitsandbytes_base(quant_type, rounded=True)(base, "float64"), data)
    rounding = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2.5e-3}[dtype]
    assert relative(coarse.logits, rounded.logits) <= rounding


# Adapters and models that ferrotune trained


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8.0},
        {
            "use_rslora": True,
            "r": 6,
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"down_proj": 5.0},
        },
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        {"target_modules": r".*layers\.1\.mlp\..*_proj"},
    ],
    ids=["plain", "patterns", "list", "regex"],
)
def test_peft_loads_what_ferrotune_trained(
    method: str, settings: dict[str, Any], trained_base: Path, tmp_path: Path
) -> None:
    result = train(trained_base, tmp_path / "run", method=method, **settings)
    assert result.best_step
    assert result.heldout_loss_best is not None
    assert result.heldout_loss_before is not None
    assert result.heldout_loss_best < result.heldout_loss_before
    adapter = result.adapter
    assert adapter is not None
    data = batch(VOCABULARY, 2, 65)
    if method == "lora":
        check(trained_base, adapter, data)
    else:
        pytest.importorskip("bitsandbytes")
        check(trained_base, adapter, data, bitsandbytes_base("nf4"), quant_type="nf4")


@pytest.mark.parametrize(
    ("dtype", "bound"), [(None, 1e-4), ("float32", 1e-4), ("bfloat16", 3e-2), ("float16", 4e-3)]
)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_merged_folders_load_in_transformers(
    stored: str, dtype: Any, bound: float, trained_base: Path, tmp_path: Path
) -> None:
    """The merged model is base + adapter, to the rounding of the type it is written in."""
    base = save(load(trained_base, "float32"), tmp_path / "base", stored)
    add_tokenizer(base)
    write_lines(tmp_path / "lines.jsonl", 80)
    adapter = train(base, tmp_path / "run", method="lora", r=4).adapter
    assert adapter is not None
    merged = ferrotune.merge(base, adapter, tmp_path / "merged", dtype=dtype)
    assert merged.merged_modules == 14
    data = batch(VOCABULARY, 2, 65)
    truth = reference(with_peft(load(base), adapter, "float64"), data)
    read = load(merged.output)
    written = json.loads((merged.output / "config.json").read_text())["dtype"]
    assert written == (dtype or stored)
    bound = 3e-2 if written == "bfloat16" else bound
    found = reference(read, data)
    assert relative(found.logits, truth.logits) <= bound
    assert largest(engine(merged.output, data).logits, found.logits) <= 1e-4
    assert (merged.output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_merge_is_peft_merge(tmp_path: Path) -> None:
    """Every tensor equals PEFT's merge_and_unload in float32, rank and alpha patterns included."""
    from safetensors.numpy import load_file

    base = save(llama(attention_bias=True, mlp_bias=True), tmp_path / "base", shard="30KB")
    peft_adapter(base, tmp_path / "adapter", **ADAPTERS["patterns"])
    ferrotune.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged: Any = with_peft(load(base, "float32"), tmp_path / "adapter", "float32")
    expected = merged.merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert largest(found[name], tensor.numpy()) <= 1e-6, name


def test_full_training_writes_a_transformers_folder(trained_base: Path, tmp_path: Path) -> None:
    result = train(trained_base, tmp_path / "run", method="full", learning_rate=1e-3)
    assert result.adapter is None
    assert result.weights == tmp_path / "run" / "model"
    data = batch(VOCABULARY, 2, 65)
    truth = reference(load(result.weights), data)
    assert largest(engine(result.weights, data).logits, truth.logits) <= 1e-4
    assert largest(truth.logits, engine(trained_base, data).logits) > 1e-3
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert type(AutoModelForCausalLM.from_pretrained(result.weights)).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(result.weights)("and the")["input_ids"]


def test_full_training_of_a_tied_model_stays_tied(trained_base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    base = save(
        llama(vocab_size=VOCABULARY, tie_word_embeddings=True), tmp_path / "base", "bfloat16"
    )
    add_tokenizer(base)
    shutil.copy(trained_base.parent / "lines.jsonl", tmp_path)
    result = train(base, tmp_path / "run", method="full", learning_rate=1e-3)
    assert "lm_head.weight" not in load_file(result.weights / "model.safetensors")
    data = batch(VOCABULARY, 2, 33)
    assert (
        largest(engine(result.weights, data).logits, reference(load(result.weights), data).logits)
        <= 1e-4
    )


# Dropout


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Batch]:
    folder = tmp_path_factory.mktemp("dropout")
    base = save(llama(), folder / "base")
    peft_adapter(base, folder / "adapter", target_modules="all-linear", lora_dropout=0.25, r=4)
    return base, folder / "adapter", batch(97, 2, 33)


def test_dropout_depends_on_the_seed_alone(dropped: tuple[Path, Path, Batch]) -> None:
    base, adapter, data = dropped
    none, one, again, other = (
        engine(base, data, adapter=adapter, seed=seed) for seed in (None, 1, 1, 2)
    )
    assert one.loss == again.loss
    assert len({none.loss, one.loss, other.loss}) == 3
    for name, gradient in one.gradients.items():
        assert np.array_equal(gradient, again.gradients[name])
        assert not np.array_equal(gradient, other.gradients[name])
        assert not np.array_equal(gradient, none.gradients[name])
    # Logits are evaluation's: dropout is off.
    assert np.array_equal(one.logits, none.logits)


def test_no_dropout_in_the_adapter_means_none_with_a_seed(
    dropped: tuple[Path, Path, Batch], tmp_path: Path
) -> None:
    base, adapter, data = dropped
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.0}))
    plain = engine(base, data, adapter=tmp_path / "adapter", seed=3)
    assert plain.loss == engine(base, data, adapter=adapter).loss


def one_module(tmp_path: Path, p: float) -> tuple[Path, Path, Batch]:
    """A model whose loss is exactly linear in the adapter's output, up to second order.

    One adapter on the last layer's down_proj: between it and the loss are a residual sum, a norm
    and the soft-max. With a small B the loss is linear in the adapter's output to O(B²).
    """
    base = save(llama(), tmp_path / "base")
    peft_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["model.layers.1.mlp.down_proj"],
        r=3,
        lora_dropout=p,
    )
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= 1e-3
    save_file(tensors, path, {"format": "pt"})
    return base, tmp_path / "adapter", batch(97, 2, 65)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_leaves_expectations_as_they_are(p: float, tmp_path: Path) -> None:
    """Inverted dropout: the mean gradient over the masks is the one without dropout.

    With B near zero the gradient of A is G ᵀ·dropout(x) with G fixed, so every element's mean over
    n seeds lies within a few standard errors of the plain gradient; the same holds for B. The
    z-scores' mean square is 1 when the mean is right, and 1 + n·bias²/variance when it is not.
    """
    base, adapter, data = one_module(tmp_path, p)
    plain = engine(base, data, adapter=adapter)
    seeds = 400
    runs = [engine(base, data, adapter=adapter, seed=seed) for seed in range(seeds)]
    for name, truth in plain.gradients.items():
        samples = np.stack([run.gradients[name] for run in runs]).astype(np.float64)
        deviation = samples.std(axis=0, ddof=1)
        # An up-scaling left out would put the mean at (1 − p) of the truth: far outside.
        scores = (samples.mean(axis=0) - truth) / (deviation / np.sqrt(seeds))
        assert 0.5 < np.square(scores).mean() < 2.0, name
        assert np.abs(scores).max() < 6.0, name
        assert relative(samples.mean(axis=0), truth) < 6 * np.sqrt(p / (1 - p) / seeds), name


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_right_part(p: float, tmp_path: Path) -> None:
    """The gradient's variance over the masks is p / (1 − p) times the sum of the squared terms.

    For A, dA = Σ_t G_t · mask_t/(1−p) · x_t with independent masks: Var = p/(1−p) · Σ_t (G_t·x_t)².
    """
    base, adapter, data = one_module(tmp_path, p)
    model = with_peft(load(base, "float64"), adapter, "float64").eval()
    inputs: list[Any] = []
    layer = model.base_model.model.model.layers[1].mlp.down_proj

    def keep(_: Any, x: Any, y: Any) -> None:
        y.retain_grad()
        inputs.extend((x[0].detach(), y))

    layer.lora_A["default"].register_forward_hook(keep)
    reference(model, data)
    x, h = inputs[0].flatten(0, 1), inputs[1].grad.flatten(0, 1)
    expected = p / (1 - p) * torch.einsum("tr,tk->rk", h**2, x**2).numpy().ravel()
    seeds = 400
    name = "model.layers.1.mlp.down_proj.lora_A.weight"
    samples = np.stack(
        [engine(base, data, adapter=adapter, seed=s).gradients[name] for s in range(seeds)]
    )
    found = samples.astype(np.float64).var(axis=0, ddof=1)
    # Each element's ratio has a standard error of about √(2/400) = 7 %; 240 of them average it out.
    assert np.mean(found / expected) == pytest.approx(1.0, abs=0.03)
