"""Gated MLPs as one node, on CUDA."""

from __future__ import annotations

import pytest
import torch

from ferrotune import ops
from mlp_cases import assert_same, leaves, mlp


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
