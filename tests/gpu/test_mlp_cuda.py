"""Gated MLPs as one node, on CUDA."""

from __future__ import annotations

import pytest
import torch

from ferrotune import ops
from ferrotune.ops import cuda_lora
from mlp_cases import assert_same, layer, leaves, mlp


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "inner", "out"),
    [((2, 37, 64), 176, 64), ((130, 256), 512, 256), ((3, 5, 33), 70, 21), ((0, 64), 128, 64)],
)
def test_as_its_layers(
    shape: tuple[int, ...], inner: int, out: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_same(shape, inner, out, dtype, device)


def test_what_is_kept(device: torch.device) -> None:
    """Between forward and backward: x, gate, up and H, not the product of the activation."""
    if device.type != "cuda":
        pytest.skip("memory is CUDA's")
    rows, k, inner = 512, 1024, 4096
    x, layers = mlp((rows, k), inner, k, torch.bfloat16, device, {"quant": True, "r": 16})
    warm = ops.gated_mlp(x, *layers)
    with torch.autograd.set_multithreading_enabled(False):  # else a thread may let go later
        torch.autograd.grad(warm.sum(), leaves(x, layers))
    del warm
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = ops.gated_mlp(x, *layers)
    kept = torch.cuda.memory_allocated() - before - y.numel() * 2
    needed = 2 * rows * (2 * inner + 3 * 16)
    assert needed <= kept <= needed + (1 << 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "inner"), [((2, 37, 64), 176), ((300, 136), 264), ((1, 8), 8), ((513, 256), 1032)]
)
def test_gate_and_up_by_one_product(
    shape: tuple[int, ...],
    inner: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bits of two products and an activation, by dtype, rank, kind of weight and dropout."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("Hopper's product alone")
    monkeypatch.setattr(cuda_lora, "hopper", "always")
    monkeypatch.setattr(cuda_lora, "small", "never")
    k, count = shape[-1], 0
    for adapter in (dtype, torch.float32):
        for r, quant in ((3, True), (16, False), (17, True), (32, True), (48, False)):
            options = {"quant": quant, "adapter": adapter, "r": r, "p": 0.2 * (r == 17)}
            x = torch.randn(*shape, device=device).to(dtype)
            pair = [layer(inner, k, seed, dtype, device, **options) for seed in (5, 9)]
            pair = [one._replace(stream=i) for i, one in enumerate(pair)]
            seed = torch.tensor([r], device=device)
            for activation in ("silu", "gelu_tanh", "gelu"):
                how = cuda_lora.plan(x, pair)
                together = cuda_lora.gated(x, pair, activation, seed, how)
                assert (together is not None) == (r < 48 and activation != "gelu"), (r, adapter)
                if together is None:
                    continue
                count += 1
                (gate, up), hidden, hs = together
                ys, apart = cuda_lora.forward(x, pair, seed, how)
                torch.testing.assert_close([gate, up], ys, rtol=0, atol=0)
                torch.testing.assert_close(hs[0], apart[0], rtol=0, atol=0)
                expected = ops.glu(gate, up, activation)
                torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    assert count == 16


def test_one_product_with_autograd_and_a_bias(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a bias keeps from one product gives the same as what goes by it."""
    monkeypatch.setattr(cuda_lora, "hopper", "always")
    x, layers = mlp((260, 128), 384, 128, torch.bfloat16, device, {"quant": True, "r": 16})
    zero = torch.zeros(384, dtype=torch.bfloat16, device=device)
    found = ops.gated_mlp(x, *layers)
    biased = [one._replace(bias=zero) for one in layers[:2]]
    expected = ops.gated_mlp(x, *biased, layers[2])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    wanted = leaves(x, layers)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), wanted),
        torch.autograd.grad(expected.sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
