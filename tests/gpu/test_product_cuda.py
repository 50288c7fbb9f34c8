"""Hopper's matrix product by itself: what `benches/cuda_gemm.py` measures."""

from __future__ import annotations

import pytest
import torch

from ferrotune import _native
from ferrotune.ops import cuda

SIZES = [(1, 8, 8), (255, 264, 72), (257, 520, 1032), (300, 1000, 64), (512, 256, 4096)]


def product(x: torch.Tensor, w: torch.Tensor, down_rows: bool, together: int) -> torch.Tensor:
    m, depth = x.shape
    columns = w.shape[1] if down_rows else w.shape[0]
    out = torch.empty(m, columns, dtype=x.dtype, device=x.device)
    stream = cuda.raw_stream(x.device.index)
    kind = str(x.dtype).removeprefix("torch.")
    _native.cuda_product(
        x.device.index, stream, kind, x.data_ptr(), w.data_ptr(), out.data_ptr(),
        (m, columns, depth), down_rows, together,
    )  # fmt: skip
    return out


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's")
    cuda.prepare()


@pytest.mark.parametrize("down_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_no_farther_from_the_truth_than_pytorchs(dtype: torch.dtype, down_rows: bool) -> None:
    ours = theirs = 0.0
    for number, (m, columns, depth) in enumerate(SIZES):
        x = torch.randn(m, depth, device="cuda").to(dtype)
        w = torch.randn((depth, columns) if down_rows else (columns, depth), device="cuda")
        w = w.to(dtype)
        other = w if down_rows else w.t()
        true = x.double() @ other.double()
        found = product(x, w, down_rows, (0, 1, 2, 8, 32)[number])
        assert torch.isfinite(found).all()
        assert torch.equal(found, product(x, w, down_rows, 0))
        ours += float((found.double() - true).norm() / true.norm())
        theirs += float(((x @ other).double() - true).norm() / true.norm())
    assert ours <= 1.02 * theirs


def test_what_it_does_not_take() -> None:
    x = torch.randn(16, 12, device="cuda").bfloat16()
    with pytest.raises(ValueError, match="multiples of 8"):
        product(x, torch.randn(8, 12, device="cuda").bfloat16(), False, 0)
