"""PyTorch's matrix products of a LoRA term, in the types that are exact and fast.

Where the term is wider than the layer (float32 adapters on a bfloat16 one), x, y and their
gradients are widened block by block, so that no wide copy of them goes through memory.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from . import dropout
from .scratch import wide_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from .types import Projection


def term_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """In what the LoRA term is computed: what holds both x's and A's values, and is fast."""
    return _fast(torch.promote_types(x.dtype, lora_A.dtype), x.device)


def product_dtype(x: Tensor) -> torch.dtype:
    """In what the products with x are computed and summed, to be rounded to its dtype once."""
    return _fast(x.dtype, x.device)


def _fast(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``; float32 for a 16-bit one whose products PyTorch has no fast code for on this CPU.

    Without oneDNN's, a backward product in float16 takes some hundred times as long.
    """
    if device.type == "cpu" and dtype in _ONEDNN and not _has_onednn(dtype):
        return torch.float32
    return dtype


_ONEDNN = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    supported = getattr(torch.ops.mkldnn, _ONEDNN[dtype], None)  # none in builds without it
    return supported is not None and bool(supported())


def down(x: Tensor, projection: Projection, kind: torch.dtype, seed: Tensor | None) -> Tensor:
    """``scaling·dropout(x)·Aᵀ`` ``[m, r]`` in ``kind``."""
    assert projection.lora_A is not None
    h = x.new_empty(x.shape[0], projection.rank, dtype=kind)
    transposed = projection.lora_A.to(kind).t()
    for rows, wide in _dropped(x, projection, kind, seed):
        _product(h[rows], wide, transposed, projection.scaling)
    return h


def down_backward(
    g: Tensor, x: Tensor, projection: Projection, kind: torch.dtype, seed: Tensor | None
) -> Tensor:
    """``gᵀ·dropout(x)`` ``[r, k]`` in ``kind``: of A."""
    found = x.new_zeros(projection.rank, x.shape[1], dtype=kind)
    for rows, wide in _dropped(x, projection, kind, seed):
        found.addmm_(g[rows].t(), wide)
    return found


def up_backward(
    grad: Tensor, h: Tensor, projection: Projection, kind: torch.dtype, of_B: bool, of_h: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``gradᵀ·h`` ``[n, r]``: of B, and ``g = scaling·grad·B`` ``[m, r]``; both in ``kind``."""
    assert projection.lora_B is not None
    m, r = h.shape
    # [r, n]: that way round the product reads the wide gradient in the order in which it lies.
    found = h.new_zeros(r, grad.shape[1]) if of_B else None
    g = h.new_empty(m, r) if of_h else None
    up = projection.lora_B.to(kind)
    for rows, wide in wide_rows(grad, kind):
        if found is not None:
            found.addmm_(h[rows].t(), wide)
        if g is not None:
            _product(g[rows], wide, up, projection.scaling)
    return None if found is None else found.t().contiguous(), g


def _dropped(
    x: Tensor, projection: Projection, kind: torch.dtype, seed: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """``dropout(x)`` in ``kind``, by blocks of rows: see `wide_rows`."""
    if not projection.dropout_p:
        return wide_rows(x, kind)
    dropped = dropout.apply(x.to(kind), projection.dropout_p, seed, projection.stream)
    return iter([(slice(None), dropped)])


def _product(out: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """``out = scaling · a·b``, rounded once."""
    torch.addmm(out, a, b, beta=0, alpha=scaling, out=out)


def add_product(
    onto: Tensor | None,
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """``onto + a·b + bias`` in the dtype of ``onto``, or ``dtype``; may write to ``onto``."""
    if onto is None:
        return (a @ b if bias is None else torch.addmm(bias, a, b)).to(dtype)
    if bias is not None and onto.dtype == a.dtype:
        return onto.add_(torch.addmm(bias, a, b))  # the small term is rounded before, not the sum
    for rows, wide in wide_rows(onto, a.dtype):
        wide.addmm_(a[rows], b)
        if bias is not None:
            wide.add_(bias)
        if wide.dtype != onto.dtype:
            onto[rows].copy_(wide)
    return onto
