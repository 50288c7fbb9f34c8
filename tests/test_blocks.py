"""Norms, gated activations, rotary positions and whole MLPs on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ferrotune import ops
from ferrotune.patching import blocks
from mlp_cases import ACTIVATIONS, apart, assert_same, draw, layer, leaves, mlp
from side_by_side import assert_agree, both, counted
from tiny_models import base_model, batch, with_lora

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mlp_as_its_layers(dtype: torch.dtype) -> None:
    assert_same((2, 5, 24), 40, 24, dtype, CPU)
    assert_same((0, 24), 40, 16, dtype, CPU)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_gradients(activation: str) -> None:
    """Against finite differences in float64, dropout included."""
    options: dict[str, Any] = {"bias": True, "lora_bias": True, "p": 0.25, "r": 3}
    x, layers = mlp((4, 6), 10, 5, torch.float64, CPU, options)
    inputs = leaves(x, layers)
    seed = torch.tensor([11])

    def run(*tensors: Tensor) -> Tensor:
        given = iter(tensors[1:])
        filled = [
            one._replace(
                bias=next(given), lora_A=next(given), lora_B=next(given), lora_bias=next(given)
            )
            for one in layers
        ]
        return ops.gated_mlp(tensors[0], *filled, activation, seed=seed)

    assert torch.autograd.gradcheck(run, inputs)


def test_mlp_of_partly_frozen_parts() -> None:
    """Only what is asked for gets a gradient; what is before the down projection may be frozen."""
    for asked in ("down", "gate", "x"):
        x, layers = mlp((3, 8), 12, 8, torch.float32, CPU, {})
        expected = apart(x, layers, "silu", None)
        for name, one in zip(("gate", "up", "down"), layers, strict=True):
            for tensor in (one.lora_A, one.lora_B):
                assert tensor is not None
                tensor.requires_grad_(name == asked)
        x.requires_grad_(asked == "x")
        wanted = leaves(x, layers)[asked != "x" :]
        wanted = [tensor for tensor in wanted if tensor.requires_grad]
        assert wanted
        found = torch.autograd.grad(ops.gated_mlp(x, *layers).pow(2).sum(), wanted)
        again = apart(x, layers, "silu", None)
        torch.testing.assert_close(again, expected)
        for a, b in zip(found, torch.autograd.grad(again.pow(2).sum(), wanted), strict=True):
            torch.testing.assert_close(a, b)


def test_mlp_with_a_trained_weight() -> None:
    x, layers = mlp((3, 8), 12, 8, torch.float32, CPU, {})
    weight = layers[2].weight
    assert weight is not None
    weight.requires_grad_()
    y = ops.gated_mlp(x, *layers)
    torch.testing.assert_close(y, apart(x, layers, "silu", None))
    assert torch.autograd.grad(y.sum(), weight)[0].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_mlp_recomputed(reentrant: bool) -> None:
    """The masks of a checkpoint's second forward are those of its first."""
    x, layers = mlp((16, 8), 12, 8, torch.float32, CPU, {"p": 0.5})
    torch.manual_seed(3)
    plain = torch.autograd.grad(ops.gated_mlp(x, *layers).pow(2).sum(), leaves(x, layers)[1])
    torch.manual_seed(3)
    y = checkpoint(lambda x: ops.gated_mlp(x, *layers), x, use_reentrant=reentrant)
    y.pow(2).sum().backward()
    assert torch.equal(plain[0], leaves(x, layers)[1].grad)


def test_mlp_under_autocast() -> None:
    x, layers = mlp((4, 8), 12, 8, torch.float32, CPU, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.gated_mlp(x, *layers)
        expected = apart(x, layers, "silu", None)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(y.float().sum(), layers[0].lora_A)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("seeds", [(), (1, 2, 3)])
def test_mlp_compiled(seeds: tuple[int, ...]) -> None:
    x, layers = mlp((4, 8), 12, 8, torch.float32, CPU, {"p": 0.3 if seeds else 0.0})
    options = {"seed": [torch.tensor([seed]) for seed in seeds] or None}

    def call(x: Tensor) -> Tensor:
        return ops.gated_mlp(x, *layers, **options)

    run = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), call(x))


def test_no_second_derivative() -> None:
    x, layers = mlp((4, 8), 12, 8, torch.float32, CPU, {})
    (grad,) = torch.autograd.grad(ops.gated_mlp(x, *layers).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_refused() -> None:
    x = torch.ones(2, 8)
    _, layers = mlp((2, 8), 12, 8, torch.float32, CPU, {})
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.gated_mlp(x, *layers, "relu")
    with pytest.raises(ValueError, match="down takes 10"):
        ops.gated_mlp(x, *layers[:2], layer(8, 10, 1, torch.float32, CPU))
    with pytest.raises(ValueError, match="k differs"):
        ops.gated_mlp(torch.ones(2, 9), *layers)
    with pytest.raises(ValueError, match="one seed or three, not 2"):
        ops.gated_mlp(x, *layers, seed=[torch.tensor([1])] * 2)
    _, dropping = mlp((2, 8), 12, 8, torch.float32, CPU, {"p": 0.3})
    with pytest.raises(ValueError, match=r"up drops .* needs a seed"):
        ops.gated_mlp(x, *dropping, seed=[torch.tensor([1]), None, torch.tensor([2])])
    with pytest.raises(ValueError, match="must be alike"):
        ops.glu(x, torch.ones(2, 9))
    with pytest.raises(ValueError, match="even width"):
        ops.glu(torch.ones(2, 9))
    with pytest.raises(ValueError, match="activation must be one of"):
        ops.glu(x, x, "tanh")
    with pytest.raises(ValueError, match="x has 8 columns"):
        ops.rms_norm(x, torch.ones(9))
    with pytest.raises(ValueError, match="residual is"):
        ops.rms_norm(x, torch.ones(8), residual=x.double())
    with pytest.raises(TypeError, match="float dtype"):
        ops.rms_norm(x.long(), torch.ones(8))
    q, cos = torch.ones(1, 2, 3, 8), torch.ones(1, 3, 8)
    with pytest.raises(ValueError, match="4 dimensions"):
        ops.rope(q[0], q, cos, cos)
    with pytest.raises(ValueError, match="only heads may differ"):
        ops.rope(q, q[..., :4], cos, cos)
    with pytest.raises(ValueError, match="both must be"):
        ops.rope(q, q, cos, cos[:, :2])
    with pytest.raises(ValueError, match="even rotary of at most 8"):
        ops.rope(q, q, torch.ones(1, 3, 10), torch.ones(1, 3, 10))


def test_the_formulas() -> None:
    """In plain PyTorch, against float64 written out."""
    x, weight = draw(5, 24, seed=1, dtype=torch.float64, device=CPU), torch.linspace(0, 2, 24)
    for offset in (0.0, 1.0):
        true = (weight.double() + offset) * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        found = ops.rms_norm(x.float(), weight, offset=offset)
        torch.testing.assert_close(found.double(), true, rtol=1e-6, atol=1e-6)
    residual = torch.ones(5, 24)
    normed, total = ops.rms_norm(x.float(), weight, residual=residual)
    assert torch.equal(total, x.float() + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight))
    angles = torch.randn(1, 7, 16, dtype=torch.float64)
    angles[..., 8:] = angles[..., :8]
    q, k = torch.randn(2, 3, 7, 16, dtype=torch.float64), torch.randn(2, 1, 7, 16).double()
    turned = ops.rope(q, k, angles.cos(), angles.sin())
    for before, after in zip((q, k), turned, strict=True):
        a, b = before[..., :8], before[..., 8:]
        whole = torch.complex(a, b) * torch.exp(1j * angles[:, None, :, :8])
        torch.testing.assert_close(after, torch.cat((whole.real, whole.imag), -1))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "phi3", "bert"])
def test_blocks_by_plain_pytorch(
    name: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks' own ways, as on CUDA, with the operations in PyTorch: as the stock model."""
    monkeypatch.setattr(blocks, "takes", lambda x: isinstance(x, Tensor))
    monkeypatch.setattr(blocks.NormForward, "takes", lambda self, x: False)
    calls: dict[str, int] = {}

    def counting(key: str) -> None:
        right = getattr(ops, key)

        def call(*args: Any, **kwargs: Any) -> Any:
            label = f"group of {len(args[1])}" if key == "lora_linear_group" else key
            calls[label] = calls.get(label, 0) + 1
            return right(*args, **kwargs)

        monkeypatch.setattr(ops, key, call)

    for operation in ("gated_mlp", "lora_linear_group", "rope"):
        counting(operation)
    model = with_lora(base_model(name).train(), name, lora_dropout=dropout)
    with counted() as counts:
        stock, patched, report = both(model, batch(name))
    assert not report.left
    assert set(counts) == {None}
    assert_agree(stock, patched)
    grouped = not dropout and name != "phi3"
    assert calls.get("group of 3", 0) == (2 if grouped else 0)
    assert calls.get("gated_mlp", 0) == (0 if name in ("phi3", "bert") else 2)
    assert calls.get("rope", 0) == (0 if name == "bert" else 2)
    assert not [module for module in model.modules() if "_ferrotune_given" in module.__dict__]
