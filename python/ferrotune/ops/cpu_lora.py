"""QLoRA's forward and backward on CPUs where ferrotune's own base products are the fastest.

Those have a tile unit (AMX), or AVX2 and no wider vectors. The product of a 4-bit weight, the LoRA
term's and the biases are one native call with sums in float32, rounded once; the weight never lies
in memory dequantised. The small products of the rank are PyTorch's; in vectors they are part of the
call, where they are float32 and nothing is dropped. What the native product does not take (dense
weights, float16, float32 values that tiles would not be exact for) goes the way of `reference`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .. import _native, threads
from . import dropout, reference
from .products import down, down_backward, term_dtype, up_backward
from .reference import dequantize_4bit, laid_out, plan, quantize_4bit, ranks, saved
from .types import Grads, Need, Projection, Quant4bit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor

__all__ = [
    "backward",
    "dequantize_4bit",
    "forward",
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
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def usable() -> bool:
    """Whether the native product runs on this CPU, and faster than PyTorch's."""
    return _unit() is not None


@functools.cache
def _unit() -> str | None:
    """What the native product runs on: "tiles" or "vectors"."""
    find = getattr(_native, "cpu_product_units", None)  # not in builds for other processors
    units: list[str] = [] if find is None else find()
    # Of AVX-512 PyTorch's products have twice the width of the native vectors.
    narrow = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return next((unit for unit in units if unit == "tiles" or narrow), None)


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
        if _is_whole(x, projection):
            y, h = _whole_forward(x, projection)
            ys.append(y)
            hs.append(h)
            continue
        if projection.lora_A is not None:
            h = down(x, projection, term_dtype(x, projection.lora_A), seed)
        y = x.new_empty(x.shape[0], projection.shape[0])
        if not _product(y, x, projection, h, bias=_bias(projection)):
            return reference.forward(x, projections, seed)
        ys.append(y)
        hs.append(h)
    return ys, hs


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
        if h is not None and _is_whole(x, projection):
            onto = dx is not None
            dx = torch.empty_like(x) if dx is None and need.x else dx
            _whole_backward(dx, grad, x, h, projection, found, need, i, onto)
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
        if not _product(dx, grad, projection, fused, backward=True, accumulate=onto):
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
    if quant is None or x.dtype not in _NAMES or quant.packed.device != x.device:
        return False
    if x.shape[0] == 0 or 0 in quant.shape:
        return False
    in_parts = x.dtype == torch.float32 and _unit() == "tiles"
    if in_parts and quant.shape[0] * quant.shape[1] > _MOST_IN_F32:
        return False
    return lora_A is None or (lora_A.shape[0] > 0 and term_dtype(x, lora_A) in _NAMES)


def _is_whole(x: Tensor, projection: Projection) -> bool:
    """Whether the products of the rank are part of the native call."""
    lora_A = projection.lora_A
    return (
        lora_A is not None
        and not projection.dropout_p
        and _unit() == "vectors"
        and term_dtype(x, lora_A) == torch.float32
    )


def _whole_forward(x: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """y, and h in float32."""
    y = x.new_empty(x.shape[0], projection.shape[0])
    h = x.new_empty(x.shape[0], projection.rank, dtype=torch.float32)
    _whole(y, x, h, projection, [], bias=_bias(projection))
    return y, h


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
) -> None:
    """Writes, or adds to, ``dx``, if there is one, and fills in the gradients of i's A and B."""
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
    if dx is not None or outer:
        _whole(dx, grad, g, projection, outer, backward=True, accumulate=accumulate)
    if grad_A is not None:
        found.lora_A[i] = grad_A.to(lora_A.dtype)
    if grad_B is not None:
        found.lora_B[i] = grad_B.to(lora_B.dtype)


def _whole(
    out: Tensor | None,
    rows: Tensor,
    narrow: Tensor,
    projection: Projection,
    outer: list[tuple[int, int, int, int, bool]],
    *,
    bias: Tensor | None = None,
    backward: bool = False,
    accumulate: bool = False,
) -> None:
    """`_product` with the term, and ``narrow = scaling·rows·Aᵀ``, backward ``scaling·rows·B``."""
    quant, lora_A, lora_B = projection.quant, projection.lora_A, projection.lora_B
    assert quant is not None
    assert lora_A is not None
    assert lora_B is not None
    first, second = lora_A.float().contiguous(), lora_B.float().contiguous()
    by, wide = (second, first) if backward else (first, second)
    if bias is not None:
        bias = bias.contiguous()
    threads.share_with_torch()
    _native.cpu_lora_at(
        backward,
        (rows.shape[0], quant.shape[0], quant.shape[1]),
        _NAMES[rows.dtype],
        rows.data_ptr(),
        _weight(quant),
        (
            narrow.shape[1],
            narrow.data_ptr(),
            wide.data_ptr(),
            by.data_ptr(),
            float(projection.scaling),
        ),
        outer,
        0 if bias is None else bias.data_ptr(),
        accumulate,
        0 if out is None else out.data_ptr(),
    )


def _bias(projection: Projection) -> Tensor | None:
    """Both biases together, in float32."""
    bias, lora_bias = projection.bias, projection.lora_bias
    total = None if bias is None else bias.float()
    if lora_bias is not None and projection.lora_A is not None:
        scaled = lora_bias.float() * projection.scaling
        total = scaled if total is None else total + scaled
    return total


def _product(
    out: Tensor,
    rows: Tensor,
    projection: Projection,
    narrow: Tensor | None,
    *,
    bias: Tensor | None = None,
    backward: bool = False,
    accumulate: bool = False,
) -> bool:
    """``rows·Wᵀ + narrow·Bᵀ + bias``, or backward ``rows·W + narrow·A``, to ``out``.

    False where the native product declines the values: ``out`` is then unspecified.
    """
    quant = projection.quant
    assert quant is not None
    term = None
    if narrow is not None:
        wide = projection.lora_A if backward else projection.lora_B
        assert wide is not None
        wide, narrow = wide.to(narrow.dtype).contiguous(), narrow.contiguous()
        names = _NAMES[narrow.dtype]
        term = (names, narrow.shape[1], narrow.data_ptr(), wide.data_ptr())
    if bias is not None:
        bias = bias.contiguous()
    unit = _unit()
    assert unit is not None
    threads.share_with_torch()
    return _native.cpu_product_at(
        unit,
        backward,
        (rows.shape[0], quant.shape[0], quant.shape[1]),
        _NAMES[rows.dtype],
        rows.data_ptr(),
        _weight(quant),
        term,
        0 if bias is None else bias.data_ptr(),
        accumulate,
        out.data_ptr(),
    )


def _weight(quant: Quant4bit) -> Any:
    absmax, nested, code, offset = quant.absmax, quant.nested_absmax, quant.nested_code, 0.0
    if quant.nested_offset is not None:
        offset = quant.nested_offset.item()
    return (
        (quant.packed.data_ptr(), quant.packed.numel() * quant.packed.element_size()),
        (absmax.data_ptr(), absmax.numel()),
        (
            0 if nested is None else nested.data_ptr(),
            0 if nested is None else nested.numel(),
            0 if code is None else code.data_ptr(),
            offset,
            quant.nested_blocksize,
        ),
        (quant.quant_type, quant.blocksize, str(quant.dtype).removeprefix("torch.")),
    )
