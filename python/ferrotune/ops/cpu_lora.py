"""QLoRA's forward and backward on CPUs where ferrotune's own base products are the fastest.

Those have a tile unit (AMX), AVX-512 or AVX2. The product of a 4-bit weight, the LoRA term's and
the biases are one native call with sums in float32, rounded once; the weight never lies in memory
dequantised. Where nothing is dropped, the small products of the rank are part of the call, in
float32. What the native product does not take (dense weights, float16, float32 values that tiles
would not be exact for) goes the way of `reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import dropout, reference
from .cpu_products import NAMES, bias_of, product, unit, whole
from .products import down, down_backward, term_dtype, up_backward
from .reference import dequantize_4bit, gated, laid_out, plan, quantize_4bit
from .types import Grads, Need, Projection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "backward",
    "dequantize_4bit",
    "forward",
    "gated",
    "laid_out",
    "plan",
    "quantize_4bit",
    "ranks",
    "saved",
    "usable",
]

# Elements of W up to which, in tiles, six products of 16-bit parts beat PyTorch's own in float32:
# they did at 1024x1024, and did not at 2048x5632 (benches/lora_cpu.py).
_MOST_IN_F32 = 1 << 22


def usable() -> bool:
    """Whether the native product runs on this CPU, and faster than PyTorch's."""
    return unit() is not None


def saved(
    x: Tensor, projections: Sequence[Projection]
) -> list[tuple[tuple[int, int], torch.dtype] | None]:
    """As ``reference.saved``: what a native call makes is float32."""
    found = reference.saved(x, projections)
    if not all(_takes(x, projection) for projection in projections):
        return found
    return [
        (form[0], torch.float32) if form is not None and _is_whole(projection) else form
        for form, projection in zip(found, projections, strict=True)
    ]


def forward(
    x: Tensor, projections: Sequence[Projection], seed: Tensor | None, how: None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """As ``reference.forward``."""
    if not all(_takes(x, projection) for projection in projections):
        return reference.forward(x, projections, seed)
    ys: list[Tensor] = []
    hs: list[Tensor | None] = []
    for projection in projections:
        h = None
        y = x.new_empty(x.shape[0], projection.shape[0])
        bias = bias_of(projection)
        if _is_whole(projection):
            h = x.new_empty(x.shape[0], projection.rank, dtype=torch.float32)
            done = whole(y, x, h, projection, [], bias=bias)
        else:
            if projection.lora_A is not None:
                h = down(x, projection, term_dtype(x, projection.lora_A), seed)
            done = product(y, x, projection, h, bias=bias)
        if not done:
            ((y,), _) = reference.forward(x, [projection], seed)
        ys.append(y)
        hs.append(h)
    return ys, hs


def ranks(
    x: Tensor, projections: Sequence[Projection], seed: Tensor | None, how: None = None
) -> list[Tensor | None]:
    """As ``reference.ranks``: what ``forward`` returns, to the bit."""
    if not all(_takes(x, projection) for projection in projections):
        return reference.ranks(x, projections, seed)
    hs: list[Tensor | None] = []
    for projection in projections:
        if _is_whole(projection):
            h = x.new_empty(x.shape[0], projection.rank, dtype=torch.float32)
            whole(None, x, h, projection, [])
            hs.append(h)
        else:
            hs += reference.ranks(x, [projection], seed)
    return hs


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    hs: Sequence[Tensor | None],
    projections: Sequence[Projection],
    seed: Tensor | None,
    need: Need,
    how: None = None,
) -> Grads:
    """As ``reference.backward``."""
    if not all(_takes(x, projection) for projection in projections):
        return reference.backward(grads, x, hs, projections, seed, need)
    dx: Tensor | None = None
    nothing: list[Tensor | None] = [None] * len(projections)
    found = Grads(None, nothing[:], nothing[:], nothing[:], nothing[:])
    for i, (grad, h, projection) in enumerate(zip(grads, hs, projections, strict=True)):
        if grad is None:
            continue
        reference.bias_grads(found, grad, projection, need, i)
        if h is not None and _is_whole(projection):
            onto = dx is not None
            dx = torch.empty_like(x) if dx is None and need.x else dx
            if not _whole_backward(dx, grad, x, h, projection, found, need, i, onto):
                return reference.backward(grads, x, hs, projections, seed, need)
            continue
        g = None
        lora_A, lora_B = projection.lora_A, projection.lora_B
        if lora_A is not None and lora_B is not None and h is not None:
            asked_g = need.lora_A[i] or need.x
            grad_B, g = up_backward(grad, h, projection, h.dtype, need.lora_B[i], asked_g)
            if grad_B is not None:
                found.lora_B[i] = grad_B.to(lora_B.dtype)
            if g is not None and need.lora_A[i]:
                grad_A = down_backward(g, x, projection, h.dtype, seed)
                found.lora_A[i] = grad_A.to(lora_A.dtype)
        if not need.x:
            continue
        onto = dx is not None
        dx = torch.empty_like(x) if dx is None else dx
        fused = None if projection.dropout_p else g
        if not product(dx, grad, projection, fused, backward=True, accumulate=onto):
            return reference.backward(grads, x, hs, projections, seed, need)
        if g is not None and lora_A is not None and projection.dropout_p:
            term = g @ lora_A.to(g.dtype)
            term = dropout.apply(term, projection.dropout_p, seed, projection.stream)
            dx = (dx + term).to(x.dtype)
    if need.x and dx is None:
        dx = torch.zeros_like(x)
    return found._replace(x=dx)


def _takes(x: Tensor, projection: Projection) -> bool:
    """Whether shapes and types are those of the native product."""
    quant, lora_A = projection.quant, projection.lora_A
    if quant is None or x.dtype not in NAMES or quant.packed.device != x.device:
        return False
    if x.shape[0] == 0 or 0 in quant.shape:
        return False
    in_parts = x.dtype == torch.float32 and unit() == "tiles"
    if in_parts and quant.shape[0] * quant.shape[1] > _MOST_IN_F32:
        return False
    return lora_A is None or (lora_A.shape[0] > 0 and term_dtype(x, lora_A) in NAMES)


def _is_whole(projection: Projection) -> bool:
    """Whether the products of the rank are part of the native call."""
    lora_A = projection.lora_A
    return lora_A is not None and not projection.dropout_p


def _whole_backward(
    dx: Tensor | None,
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    projection: Projection,
    found: Grads,
    need: Need,
    i: int,
    accumulate: bool,
) -> bool:
    """Writes, or adds to, ``dx``, if there is one, and fills in the gradients of i's A and B.

    False where the native product declines the values.
    """
    lora_A, lora_B = projection.lora_A, projection.lora_B
    assert lora_A is not None
    assert lora_B is not None
    g = torch.empty_like(h)
    outer = []
    grad_A = grad_B = None
    if need.lora_A[i]:
        grad_A = h.new_empty(lora_A.shape)
        outer.append((g.data_ptr(), x.data_ptr(), x.shape[1], grad_A.data_ptr(), False))
    if need.lora_B[i]:
        grad_B = h.new_empty(lora_B.shape)
        outer.append((h.data_ptr(), grad.data_ptr(), grad.shape[1], grad_B.data_ptr(), True))
    if (dx is not None or outer) and not whole(
        dx, grad, g, projection, outer, backward=True, accumulate=accumulate
    ):
        return False
    if grad_A is not None:
        found.lora_A[i] = grad_A.to(lora_A.dtype)
    if grad_B is not None:
        found.lora_B[i] = grad_B.to(lora_B.dtype)
    return True
