"""The drop-in on CUDA: patched models beside PEFT's and PEFT + bitsandbytes' own."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import ferrotune
from ferrotune import ops
from ferrotune.patching.masks import index_dropout
from side_by_side import assert_agree, both, counted
from test_patch_models import DTYPES, train
from tiny_models import base_4bit_model, base_model, batch, with_lora

NAMES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "bert",
    "roberta",
)  # fmt: skip
# Operations of a forward of two layers, besides those of linear layers: MLPs in one node, gated
# activations alone, rotary positions, norms by themselves, and groups of q, k and v.
OPERATIONS = {
    "llama": {"gated_mlp": 2, "rope": 2, "rms_norm": 3, "group of 3": 2},
    "qwen3": {"gated_mlp": 2, "rope": 2, "rms_norm": 7, "group of 3": 2},
    "gemma": {"gated_mlp": 2, "rope": 2, "rms_norm": 3, "group of 3": 2},
    "phi3": {"glu": 2, "rope": 2, "rms_norm": 5},
    "bert": {"group of 3": 2},
    "gpt2": {},
}
CASES = [(name, quant, dtype) for name in NAMES for quant in ("dense", "4bit") for dtype in DTYPES]
# Largest difference of two loss curves in 30 steps (nats): what rounding in another order makes of
# a f32 model; three steps of bf16's grid where the loss itself is in bf16 (bert).
CURVE = {"f32": 2e-5, "bf16": 6e-3}
CURVE_OF_BF16_LOSS = 3 * 2**-7


def build(
    name: str, quant: str, dtype: str, folder: Path, device: torch.device, **options: Any
) -> Any:
    if quant == "4bit":
        pytest.importorskip("bitsandbytes")
        base = base_4bit_model(name, DTYPES[dtype], folder, device.type)
    else:
        base = base_model(name, DTYPES[dtype]).train()
    return with_lora(base, name, **options).to(device)


@pytest.mark.parametrize(("name", "quant", "dtype"), CASES)
def test_one_step(name: str, quant: str, dtype: str, tmp_path: Path, device: torch.device) -> None:
    """Logits, loss and every gradient under the same masks; every targeted layer is ferrotune's."""
    model = build(name, quant, dtype, tmp_path, device, lora_dropout=0.1)
    inputs = batch(name, device=device.type)
    with counted() as counts:
        stock, patched, report = both(model, inputs)
    assert not report.left
    assert set(counts) == {None}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len([name for name in stock if name.startswith("gradient")]) == len(trained)
    assert {tensor.device.type for tensor in patched.values()} == {device.type}
    assert_agree(stock, patched, DTYPES[dtype])
    certificate = ferrotune.verify(model, inputs)
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize("name", OPERATIONS)
def test_blocks_are_used(
    name: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}

    def counting(name: str) -> None:
        right = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            label = name
            if name == "lora_linear_group":
                label = f"group of {len(args[1])}"
            counts[label] = counts.get(label, 0) + 1
            return right(*args, **kwargs)

        monkeypatch.setattr(ops, name, call)

    for operation in ("gated_mlp", "glu", "rope", "rms_norm", "lora_linear_group"):
        counting(operation)
    model = build(name, "4bit", "bf16", tmp_path, device)
    ferrotune.patch(model, strict=True)
    model(**batch(name, device=device.type)).loss.backward()
    counts.pop("group of 1", None)
    assert counts == (OPERATIONS[name] if device.type == "cuda" else {})
    ferrotune.unpatch(model)
    ferrotune.patch(model, blocks=False)
    counts.clear()
    model(**batch(name, device=device.type))
    assert set(counts) == {"group of 1"}


@pytest.mark.parametrize(("name", "quant", "dtype"), CASES)
def test_thirty_steps(
    name: str, quant: str, dtype: str, tmp_path: Path, device: torch.device, record_property: Any
) -> None:
    curves = []
    for patched in (False, True):
        model = build(name, quant, dtype, tmp_path, device, lora_dropout=0.1, filled=False)
        if patched:
            ferrotune.patch(model, strict=True)
        with index_dropout(model):
            curves.append(train(model, name))
    worst = max(abs(a - b) for a, b in zip(*curves, strict=True))
    record_property("largest_difference", worst)
    print(f"{name} {quant} {dtype}: largest difference of the loss in 30 steps {worst:.1e}")
    limit = CURVE_OF_BF16_LOSS if (name, dtype) == ("bert", "bf16") else CURVE[dtype]
    assert worst <= limit
    assert statistics.mean(curves[1][-5:]) < statistics.mean(curves[1][:5])


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_with_dropout(name: str, tmp_path: Path, device: torch.device) -> None:
    """The recomputed forward drops what the first one dropped: equal gradients."""
    found = []
    for kwargs in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = build(name, "dense", "bf16", tmp_path, device, lora_dropout=0.3)
        ferrotune.patch(model, strict=True)
        if kwargs is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(kwargs)
        torch.manual_seed(5)
        model(**batch(name, device=device.type)).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        found.append([parameter.grad.clone() for parameter in trained])
    for plain, *others in zip(*found, strict=True):
        for other in others:
            assert torch.equal(plain, other)


def small_llama(folder: Path, device: torch.device) -> Any:
    """Big enough for the kernels' main way (sizes of many tiles), in NF4, double-quantised."""
    large = device.type == "cuda"
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512 if large else 64, num_hidden_layers=4 if large else 1,
        intermediate_size=1376 if large else 192, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four, dtype=torch.bfloat16, device_map=device.type
    ).train()


def chains(steps: int, rows: int, length: int, device: torch.device) -> list[torch.Tensor]:
    """Token sequences over a few of the vocabulary, each token followed by one of four."""
    draw = torch.Generator().manual_seed(0)
    used = torch.randperm(1021, generator=draw)[:48] + 3
    follow = torch.randint(0, 48, (48, 4), generator=draw)
    found = []
    for _ in range(steps):
        places = torch.randint(0, 48, (rows, 1), generator=draw)
        while places.shape[1] < length:
            choice = torch.randint(0, 4, (rows, 1), generator=draw)
            places = torch.cat([places, follow[places[:, -1:], choice]], dim=1)
        found.append(used[places].to(device))
    return found


@pytest.mark.parametrize("prepared", [False, True], ids=["bf16", "prepare_model_for_kbit_training"])
def test_qlora_trains_as_with_bitsandbytes(
    prepared: bool, tmp_path: Path, device: torch.device, record_property: Any
) -> None:
    """200 steps, every step's loss within 0.5 % of PEFT + bitsandbytes', dropout included."""
    pytest.importorskip("bitsandbytes")
    large = device.type == "cuda"
    batches = chains(200 if large else 40, 8, 128 if large else 16, device)
    curves = []
    for patched in (False, True):
        model = small_llama(tmp_path, device)
        if prepared:
            model = prepare_model_for_kbit_training(
                model, gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model = with_lora(model, r=16, lora_alpha=32, lora_dropout=0.05, filled=False).train()
        if patched:
            ferrotune.patch(model, strict=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-4)
        torch.manual_seed(1)
        losses = []
        with index_dropout(model), counted() as counts:
            for ids in batches:
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        assert set(counts) == ({None} if patched else set())
        curves.append(torch.stack(losses).double())
    stock, ours = curves
    apart = ((ours - stock).abs() / stock).max().item()
    record_property("largest_relative_difference", apart)
    print(
        f"loss {stock[0]:.4f} to {stock[-1]:.4f} (PEFT + bitsandbytes), {ours[-1]:.4f} "
        f"(ferrotune); largest difference {100 * apart:.3f} %"
    )
    assert apart <= 5e-3
    assert ours[-10:].mean() < (0.9 if large else 0.999) * ours[:10].mean()
