"""The kernels between linear layers against float64, beside PyTorch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from exactness import Exactness
from ferrotune import ops
from lora_cases import error

pytestmark = pytest.mark.usefixtures("device")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows and columns: a warp's and a block's, lengths that fit no vector, rows longer than a block
# keeps of f32 and of the 16-bit types, more rows than summing blocks, one row, none; and more rows
# than blocks that stay, of each of their lengths, of one that fills no vector, and too long.
SIZES = (
    (7, 64), (33, 130), (5, 1024), (3, 4096), (2, 5003), (3, 9000), (700, 96), (1, 1), (0, 64),
    (801, 1032), (2777, 3584), (300, 8192), (531, 5120), (301, 4097), (300, 8200),
)  # fmt: skip


def rand(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def grads_of(outputs: Any, inputs: list[Tensor], seed: int = 99) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    coefficients = [
        rand(*out.shape, dtype=torch.float32, device=out.device, seed=seed + i).to(out.dtype)
        for i, out in enumerate(outputs)
    ]
    return list(torch.autograd.grad(outputs, inputs, coefficients))


def results(function: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of every input, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    grads = grads_of(outputs, leaves)
    named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return named | {f"gradient {i}": grad for i, grad in enumerate(grads)}


def compare(
    exact: Exactness, label: str, ours: Any, stock: Any, inputs: list[Tensor], true: Any = None
) -> None:
    """``true`` is the formula to run in float64, ``stock`` unless given."""
    exact.add(
        label,
        results(ours, inputs),
        results(stock, inputs),
        results(true or stock, [tensor.double() for tensor in inputs]),
        max(1, inputs[0].numel()),
    )


def stock_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """transformers': Llama's rounds before the weight, Gemma's after it."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, device: torch.device) -> None:
    exact = Exactness()
    for rows, columns in SIZES:
        for offset in (0.0, 1.0):
            x = rand(rows, columns, dtype=dtype, device=device)
            weight = rand(columns, dtype=dtype, device=device, seed=1)

            def ours(x: Tensor, weight: Tensor, offset: float = offset) -> Tensor:
                return ops.rms_norm(x, weight, 1e-5, offset=offset)

            def stock(x: Tensor, weight: Tensor, offset: float = offset) -> Tensor:
                return stock_norm(x, weight, 1e-5, offset)

            compare(exact, f"{rows}x{columns} +{offset}", ours, stock, [x, weight])
    exact.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_a_residual(dtype: torch.dtype, device: torch.device) -> None:
    exact = Exactness()
    for rows, columns in SIZES:
        x, residual = (
            rand(rows, columns, dtype=dtype, device=device, seed=seed) for seed in (0, 2)
        )
        weight = rand(columns, dtype=dtype, device=device, seed=1)

        def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
            return ops.rms_norm(x, weight, 1e-6, residual=residual)

        def stock(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
            total = x + residual
            return stock_norm(total, weight, 1e-6, 0.0), total

        compare(exact, f"{rows}x{columns}", ours, stock, [x, residual, weight])
    exact.check()


def test_rms_norm_of_what_lies_elsewhere(device: torch.device) -> None:
    """A weight in f32 beside bf16, transposed x, expanded and partly missing gradients."""
    x = rand(64, 3, 5, dtype=torch.bfloat16, device=device).permute(2, 1, 0).requires_grad_()
    weight = rand(64, dtype=torch.float32, device=device, seed=1).requires_grad_()
    y = ops.rms_norm(x, weight)
    assert y.dtype == x.dtype
    wide = x.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    true = stock_norm(wide, wide_weight, 1e-6, 0.0)
    assert error(y, true) < 4e-3
    y.sum().backward()
    true.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert error(weight.grad, wide_weight.grad) < 4e-3
    assert error(x.grad, wide.grad) < 4e-3
    residual = rand(5, 3, 64, dtype=torch.bfloat16, device=device, seed=2).requires_grad_()
    _, total = ops.rms_norm(x, weight.bfloat16(), residual=residual)
    total.sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_glu(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    exact = Exactness()

    def stock(gate: Tensor, up: Tensor) -> Tensor:
        if activation == "silu":
            return torch.nn.functional.silu(gate) * up
        kind = "tanh" if activation == "gelu_tanh" else "none"
        return torch.nn.functional.gelu(gate, approximate=kind) * up

    for rows, columns in SIZES:
        gate, up = (
            3 * rand(rows, columns, dtype=dtype, device=device, seed=seed) for seed in (0, 1)
        )
        compare(
            exact, f"{rows}x{columns}", lambda a, b: ops.glu(a, b, activation), stock, [gate, up]
        )
        both = torch.cat((gate, up), dim=-1)
        compare(
            exact,
            f"{rows}x{columns} in one",
            lambda both: ops.glu(both, None, activation),
            lambda both: stock(*both.chunk(2, dim=-1)),
            [both],
        )
        compare(
            exact,
            f"{rows}x{columns} of views",
            lambda both: ops.glu(*both.chunk(2, dim=-1), activation),
            lambda both: stock(*both.chunk(2, dim=-1)),
            [both],
        )
    exact.check()


def test_glu_at_the_ends_of_its_range(device: torch.device) -> None:
    """Large gates saturate; a NaN stays one."""
    gate = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, float("nan")], device=device)
    for dtype in DTYPES:
        for activation in ops.ACTIVATIONS:
            x = gate.to(dtype).requires_grad_()
            y = ops.glu(x, torch.ones_like(x), activation)
            (slope,) = torch.autograd.grad(y.sum(), x)
            limits = torch.where(x > 0, x.detach(), torch.zeros_like(x))
            assert torch.allclose(y[:-1], limits[:-1], atol=1e-6), (dtype, activation)
            assert torch.allclose(
                slope[[0, 1, 5, 6]], torch.tensor([0.0, 0, 1, 1], dtype=dtype, device=device)
            )
            assert y[-1].isnan()
            assert slope[-1].isnan()


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def stock_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1).to(q.dtype), sin.unsqueeze(1).to(q.dtype)
    rotary = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        part, rest = x[..., :rotary], x[..., rotary:]
        return torch.cat((part * cos + rotate_half(part) * sin, rest), dim=-1)

    return turn(q), turn(k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype: torch.dtype, device: torch.device) -> None:
    """Strides of transformers' [batch, length, heads, size], several batches of angles, parts."""
    exact = Exactness()
    for batch, length, heads, kv_heads, size, rotary in (
        (2, 17, 4, 2, 64, 64), (1, 5, 32, 8, 128, 128), (3, 9, 3, 3, 96, 32), (2, 7, 2, 1, 10, 6),
        (1, 0, 2, 2, 16, 16), (2, 3, 5, 1, 80, 80),
    ):  # fmt: skip
        for rows in {1, batch}:
            angles = rand(rows, length, rotary, dtype=torch.float32, device=device, seed=7)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            q = rand(batch, length, heads, size, dtype=dtype, device=device).transpose(1, 2)
            k = rand(batch, length, kv_heads, size, dtype=dtype, device=device, seed=1)
            k = k.transpose(1, 2)
            compare(
                exact,
                f"{batch}x{length}x{heads}+{kv_heads}x{size}/{rotary}, {rows}",
                lambda q, k, cos=cos, sin=sin: ops.rope(q, k, cos, sin),
                lambda q, k, cos=cos, sin=sin: stock_rope(q, k, cos, sin),
                [q, k],
            )
            out, _ = ops.rope(q, k, cos, sin)
            assert device.type != "cuda" or out.stride() == q.stride()
    exact.check()


def test_rope_of_one_gradient(device: torch.device) -> None:
    angles = rand(1, 6, 8, dtype=torch.float32, device=device).repeat(1, 1, 2)
    q = rand(2, 3, 6, 16, dtype=torch.float32, device=device).requires_grad_()
    k = rand(2, 1, 6, 16, dtype=torch.float32, device=device, seed=1).requires_grad_()
    turned, _ = ops.rope(q, k, angles.cos(), angles.sin())
    turned.pow(2).sum().backward()
    assert k.grad is None or not k.grad.any()
    assert torch.allclose(q.grad, 2 * q, atol=1e-5)  # a rotation keeps lengths


def test_in_graphs(device: torch.device) -> None:
    """Forward and backward are captured and replayed on other values."""
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    x = rand(64, 512, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = rand(512, dtype=torch.bfloat16, device=device, seed=1).requires_grad_()

    def work() -> list[Tensor]:
        y = ops.rms_norm(x, weight)
        z = ops.glu(y, activation="silu")
        heads = z.view(1, 64, 4, 64).transpose(1, 2)
        cos = torch.ones(1, 64, 64, dtype=x.dtype, device=device)
        q, _ = ops.rope(heads, heads, cos, cos)
        return [q, *torch.autograd.grad(q.float().pow(2).sum(), (x, weight))]

    ops.cuda.prepare(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        x.copy_(rand(64, 512, dtype=torch.bfloat16, device=device, seed=5))
    graph.replay()
    for a, b in zip(captured, work(), strict=True):
        assert torch.equal(a, b)
