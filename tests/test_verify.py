"""ferrotune.verify: what it finds, what it writes, and that it leaves no trace."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ferrotune
from ferrotune import ops
from side_by_side import step
from tiny_models import base_4bit_model, base_model, batch, with_lora


def test_certificate(tmp_path: Path) -> None:
    model = with_lora(base_model("llama", torch.bfloat16), filled=False, lora_dropout=0.1)
    path = tmp_path / "certificate.json"
    certificate = ferrotune.verify(model, batch("llama"), path=path)
    assert certificate
    assert certificate.passed
    assert certificate.failures == ()
    assert certificate.layers == {"LoRA": (14, 14)}
    assert certificate.own_forward == {}
    assert certificate.filled == 14
    assert certificate.dropout
    assert certificate.float64 == "run"
    assert set(certificate.versions) >= {"ferrotune", "torch", "peft", "transformers"}
    found = {(one.kind, one.dtype): one for one in certificate.differences}
    assert set(found) == {
        ("output", "float32"), ("output", "bfloat16"), ("gradient", "float32"),
    }  # fmt: skip
    gradients = found["gradient", "float32"]
    assert gradients.tensors == 28
    assert 0 < gradients.max_relative < 0.1
    assert gradients.worst.endswith(".weight")
    assert 0 < (gradients.stock_error or 0) < 0.1
    assert 0 < (gradients.patched_error or 0) <= 1.5 * (gradients.stock_error or 0)
    text = str(certificate)
    assert text.startswith("ferrotune (14 of 14 LoRA layers) agrees with the stock model")
    assert "28 float32 gradients: largest difference" in text
    assert "error against float64" in certificate._repr_html_()
    saved = json.loads(path.read_text())
    assert saved["passed"] is True
    assert saved["loss_patched"] == certificate.loss_patched
    assert saved["differences"][-1]["tensors"] == 28


def model_state(model: nn.Module) -> list[Any]:
    return [
        [(name, type(module), module.training) for name, module in model.named_modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        {name: parameter.grad for name, parameter in model.named_parameters()},
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
    ]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert (one == other).all()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
def test_leaves_no_trace(patched: bool, four_bit: bool, tmp_path: Path) -> None:
    base = base_4bit_model("qwen2", torch.bfloat16, tmp_path) if four_bit else base_model("qwen2")
    model = with_lora(base, "qwen2", filled=False, target_modules=["q_proj", "up_proj"])
    if patched:
        ferrotune.patch(model)
    step(model, batch("qwen2"))  # gradients that must survive
    model.eval()
    model.get_submodule("base_model.model.model.layers.0").train()
    steps: list[str] = []
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_post_accumulate_grad_hook(lambda _: steps.append("optimizer in backward"))
    before = model_state(model)
    ids = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert ferrotune.verify(model, batch("qwen2"))
    assert steps == []
    assert ids == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    for one, other in zip(before, model_state(model), strict=True):
        assert_same(one, other)


def test_batch_norm_statistics_are_put_back() -> None:
    model = with_lora(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)),
        target_modules=["0", "3"],
        task_type=None,
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for inputs in (torch.randn(6, 8), (torch.randn(6, 8),)):
        certificate = ferrotune.verify(model, inputs)
        assert certificate
        assert certificate.float64 == "run"
        assert certificate.differences[0].kind == "output"
    assert_same(before, dict(model.named_buffers()))


def break_forward(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., list[torch.Tensor]]
) -> None:
    right = ops.lora_linear_group
    monkeypatch.setattr(ops, "lora_linear_group", lambda *a, **k: change(right, *a, **k))


@pytest.mark.parametrize("float64", [False, True])
def test_finds_a_wrong_forward(monkeypatch: pytest.MonkeyPatch, float64: bool) -> None:
    model = with_lora(base_model("llama"), filled=False)
    break_forward(monkeypatch, lambda right, *a, **k: [y * 1.001 for y in right(*a, **k)])
    certificate = ferrotune.verify(model, batch("llama"), float64=float64)
    assert not certificate
    assert len(certificate.failures) > 20
    assert any(text.startswith("output logits: ") for text in certificate.failures)
    assert "DIFFERS from the stock model" in str(certificate)
    assert "FAILED" in str(certificate)
    assert (certificate.float64 == "run") == float64
    assert ("against float64" in certificate.rule) == float64


def test_finds_wrong_gradients_of_a(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lora_B that PEFT starts with is zero, and hides what lora_A gets."""

    def without_gradient(right: Any, x: Any, projections: Any, **more: Any) -> list[torch.Tensor]:
        frozen = [one._replace(lora_A=one.lora_A.detach()) for one in projections]
        found: list[torch.Tensor] = right(x, frozen, **more)
        return found

    model = with_lora(base_model("llama"), filled=False)
    break_forward(monkeypatch, without_gradient)
    certificate = ferrotune.verify(model, batch("llama"))
    assert len(certificate.failures) == 14
    assert all(".lora_A." in text and "patched none" in text for text in certificate.failures)


def test_finds_nan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_forward(monkeypatch, lambda right, *a, **k: [y * math.nan for y in right(*a, **k)])
    path = tmp_path / "certificate.json"
    certificate = ferrotune.verify(with_lora(base_model("llama")), batch("llama"), path=path)
    assert not certificate
    assert json.loads(path.read_text())["loss_patched"] == "nan"


def test_under_autocast() -> None:
    model = with_lora(base_model("llama"), lora_dropout=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        certificate = ferrotune.verify(model, batch("llama"))
    assert certificate.passed, str(certificate)
    assert certificate.autocast == "bfloat16"
    assert certificate.float64 == "run"
    assert (certificate.differences[0].stock_error or 0) > 1e-6  # bf16 took part


def test_reports_layers_that_peft_runs() -> None:
    model = with_lora(base_model("llama"), use_dora=True, target_modules=["q_proj", "v_proj"])
    certificate = ferrotune.verify(model, batch("llama"))
    assert certificate.layers == {"LoRA": (0, 4)}
    hooked = with_lora(base_model("llama"))
    ferrotune.patch(hooked)
    hooked.base_model.model.model.layers[0].self_attn.q_proj.lora_A.register_forward_hook(print)
    assert ferrotune.verify(hooked, batch("llama")).own_forward == {}
    layer = hooked.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    found = ferrotune.verify(hooked, batch("llama"))
    assert found
    assert found.own_forward == {"lora_A['default'] has hooks or a forward of its own": 1}


def test_without_trained_parameters() -> None:
    model = with_lora(base_model("llama"))
    model.requires_grad_(False)
    certificate = ferrotune.verify(model, batch("llama"))
    assert certificate
    assert {one.kind for one in certificate.differences} == {"output"}


def test_too_large_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrotune.patching import float64

    monkeypatch.setattr(float64, "_free_bytes", lambda _: 1000)
    certificate = ferrotune.verify(with_lora(base_model("llama")), batch("llama"))
    assert certificate
    assert certificate.float64.endswith("GB, and 0.0 GB are free")
    assert certificate.differences[0].stock_error is None


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ferrotune.PatchError, match="no LoRA layers"):
        ferrotune.verify(base_model("llama"), batch("llama"))
    model = with_lora(base_model("llama"))
    before = model_state(model)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        ferrotune.verify(model, {"ids": torch.zeros(2, 3)})
    with pytest.raises(OSError, match="missing"):
        ferrotune.verify(model, batch("llama"), path=tmp_path / "missing" / "certificate.json")
    for one, other in zip(before, model_state(model), strict=True):
        assert_same(one, other)

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> None:
            self.layer(x)

    silent = with_lora(Silent(), target_modules=["layer"], task_type=None)
    with pytest.raises(TypeError, match="returned no float tensor"):
        ferrotune.verify(silent, torch.ones(2, 4))
