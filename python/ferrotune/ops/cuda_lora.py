"""LoRA's forward and backward on CUDA: ferrotune's kernels, around PyTorch's products or its own.

On Hopper ferrotune's product of the frozen weight carries the LoRA term and the biases in the same
f32 sums, in forward and in x's gradient. Elsewhere the LoRA term of a projection is written first,
with its biases, and PyTorch's product accumulates onto it. (f32 adapters beside a 16-bit x: the
base product first, so that the term is rounded but once, with the sum; each of their values is
three of x's type.) Backward does the same for x's gradient, from a 4-bit weight laid out
transposed. Where x is dropped for a projection alone, forward keeps the mask behind H, a bit an
element. Adapters that no kernel takes (x of 32 bits or more, ranks above what one pass takes) go
through PyTorch's products, with the same masks and weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _native
from . import cuda, cuda_small, reference
from .cuda import NAMES, address, dequantize_4bit, quantize_4bit
from .cuda_plan import passes, planned, planned_backward
from .types import Grads, Need, Projection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .cuda_plan import BackwardPass, Live, Pass, Plan

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
]

# Where the kernels that only Hopper has are used, the product of the frozen weight among them:
# "auto", where they are the faster ones; "always", where they can run at all; "never".
hopper = "auto"

# Where few rows go through the kernel that dequantises a 4-bit weight within the product (see
# `cuda_small`): "auto", where it is the faster one; "always", where it can run at all; "never".
small = "auto"


def laid_out(x: Tensor) -> Tensor:
    """Contiguous, of any number of dimensions."""
    return x.contiguous()


def plan(x: Tensor, projections: Sequence[Projection]) -> Plan:
    """How ``forward`` runs, and its ``backward``."""
    return planned(x, projections, hopper, small)


def saved(
    x: Tensor, projections: Sequence[Projection]
) -> list[tuple[tuple[int, int], torch.dtype] | None]:
    """Shape and dtype of what forward keeps of each projection: a pass's H, with its first.

    Rows are H's first, ``[m, planes · columns]`` in x's dtype, then a mask's, if one is kept; then
    all of it is int16.
    """
    found = reference.saved(x, projections)
    for one in passes(x, projections, hopper):
        for i in one.members:
            found[i] = None
        found[one.members[0]] = ((x.shape[0], one.width), one.kept_dtype(x))
    return found


def forward(
    x: Tensor,
    projections: Sequence[Projection],
    seed: Tensor | None,
    how: Plan | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """As ``reference.forward``, but for the form of ``hs`` (see ``saved``) and that of x.

    x is ``[..., k]``, contiguous, and so are the ``ys`` ``[..., n]``.
    """
    how = plan(x, projections) if how is None else how
    ys: list[Any] = [None] * len(projections)
    hs: list[Tensor | None] = [None] * len(projections)
    before = x.shape[:-1]
    for i, division in how.small.items():
        ys[i] = x.new_empty(*before, projections[i].shape[0])
        cuda_small.run(x, how.m, projections[i], division, ys[i])
    for one in how.passes:
        hs[one.members[0]] = h = _empty_kept(how, x, one)
        for i in one.members:
            if one.terms == "added":
                ys[i] = _shaped(x, reference.base(_rows(how, x), projections[i]))
            else:
                ys[i] = x.new_empty(*before, projections[i].shape[0])
        if one.small:
            for i, start, division in zip(one.members, one.starts, one.small, strict=True):
                cuda_small.run(x, how.m, projections[i], division, ys[i], h, start, one.columns)
        elif how.m:
            _run_forward(how, x, projections, seed, one, ys, h)
        if one.terms == "written":
            for i in one.members:
                weight = reference.dense(projections[i], x.dtype)
                if weight is not None:
                    _rows(how, ys[i]).addmm_(_rows(how, x), weight.t())
    for i in how.by_pytorch:
        (y,), (hs[i],) = reference.forward(_rows(how, x), [projections[i]], seed)
        ys[i] = _shaped(x, y)
    return ys, hs


def gated(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    seed: Tensor | None,
    how: Plan,
) -> tuple[list[Tensor], Tensor, list[Tensor | None]] | None:
    """``forward`` of gate and up with ``activation(gate)·up``, by one product; None where its plan
    is another. Both weights are dequantised at a time."""
    if len(how.passes) != 1 or not how.passes[0].gated or activation not in _GATES:
        return None
    (one,) = how.passes
    before, n = x.shape[:-1], projections[0].shape[0]
    gate, up, hidden = (x.new_empty(*before, n) for _ in range(3))
    h = _empty_kept(how, x, one)
    alive: list[Tensor | None] = []
    given = [
        (
            *_adapter(projection, start, alive),
            (y.data_ptr(), 0, 0, NAMES[x.dtype]),
            _NO_GRADS,
            _weight(x, projection, alive),
        )
        for projection, start, y in zip(projections, one.starts, (gate, up), strict=True)
    ]
    workspace = _workspace(x, one)
    _native.cuda_lora_forward_gated(
        how.device,
        cuda.raw_stream(how.device),
        _input(how, x, seed, one, h, one.terms),
        given,
        address(workspace),
        hidden.data_ptr(),
        activation,
    )
    return [gate, up], hidden, [h, None]


def ranks(
    x: Tensor,
    projections: Sequence[Projection],
    seed: Tensor | None,
    how: Plan | None = None,
) -> list[Tensor | None]:
    """The ``hs`` of ``forward``, without the products of the weights."""
    how = plan(x, projections) if how is None else how
    hs: list[Tensor | None] = [None] * len(projections)
    for one in how.passes:
        hs[one.members[0]] = h = _empty_kept(how, x, one)
        if one.small:
            for i, start, division in zip(one.members, one.starts, one.small, strict=True):
                y, at = x.new_empty(how.m), (h, start, one.columns)
                cuda_small.run(x, how.m, projections[i], division, y, *at, ranks_alone=True)
            continue
        if how.m == 0:
            continue
        alive: list[Tensor | None] = []
        given: list[Any] = [
            (
                *_adapter(projections[i], start, alive),
                (0, 0, 0, NAMES[x.dtype]),
                _NO_GRADS,
                _NO_WEIGHT,
            )
            for i, start in zip(one.members, one.starts, strict=True)
        ]
        workspace = _workspace(x, one)
        group = _input(how, x, seed, one, h, "left")
        stream = cuda.raw_stream(how.device)
        _native.cuda_lora_forward(how.device, stream, group, given, address(workspace))
    for i in how.by_pytorch:
        (hs[i],) = reference.ranks(_rows(how, x), [projections[i]], seed)
    return hs


def _empty_kept(how: Plan, x: Tensor, one: Pass) -> Tensor:
    """What a pass keeps for backward (see ``saved``), to be written."""
    return x.new_empty(how.m, one.width, dtype=one.kept_dtype(x))


def _rows(how: Plan, tensor: Tensor) -> Tensor:
    """``[m, columns]`` of a contiguous one."""
    return tensor if tensor.dim() == 2 else tensor.view(how.m, tensor.shape[-1])


def _shaped(x: Tensor, y: Tensor | None) -> Tensor | None:
    """``[m, n]`` as ``[..., n]``, in the shape of x."""
    return y if y is None or x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


_GATES = ("silu", "gelu_tanh")  # of that product
_NO_WEIGHT = (0, False, None)
_NO_GRADS = (0, 0, "float32")


def _weight(x: Tensor, projection: Projection, alive: list[Tensor | None]) -> tuple[int, bool, Any]:
    """As native calls take it: a 4-bit one with memory that it is dequantised to in the call."""
    quant = projection.quant
    if quant is not None and quant.dtype == x.dtype:
        numbers, offset = cuda.parts(quant)
        scratch = x.new_empty(*quant.shape)
        alive += (scratch, offset)
        return (scratch.data_ptr(), False, numbers)
    weight = reference.dense(projection, x.dtype)
    assert weight is not None
    transposed = not weight.is_contiguous()
    if transposed and not weight.t().is_contiguous():
        weight, transposed = weight.contiguous(), False  # a hook brought it back in another layout
    alive.append(weight)
    return (weight.data_ptr(), transposed, None)


def _run_forward(
    how: Plan,
    x: Tensor,
    projections: Sequence[Projection],
    seed: Tensor | None,
    one: Pass,
    ys: Sequence[Tensor],
    h: Tensor,
) -> None:
    """One native call; with ``terms`` left another for each 4-bit weight but an only one's."""
    left = one.terms == "left"
    alive: list[Tensor | None] = []
    given: list[Any] = []
    for i, start in zip(one.members, one.starts, strict=True):
        projection = projections[i]
        bias, lora_bias = projection.bias, projection.lora_bias
        kind = x.dtype
        if bias is not None:
            bias = None if one.terms == "added" else bias.contiguous()
        if lora_bias is not None:
            lora_bias, kind = lora_bias.contiguous(), lora_bias.dtype
        weight = _NO_WEIGHT
        if left and (len(one.members) == 1 or projection.quant is None):
            weight = _weight(x, projection, alive)
        outputs = (ys[i].data_ptr(), address(bias), address(lora_bias), NAMES[kind])
        alive += (bias, lora_bias)
        given.append((*_adapter(projection, start, alive), outputs, _NO_GRADS, weight))
    workspace = _workspace(x, one)
    group = _input(how, x, seed, one, h, one.terms)
    stream = cuda.raw_stream(how.device)
    _native.cuda_lora_forward(how.device, stream, group, given, address(workspace))
    if not left:
        return
    missing = [place for place, part in enumerate(given) if part[-1] == _NO_WEIGHT]
    if not missing:
        return
    nothing = [(*part[:-1], _NO_WEIGHT) for part in given]
    for place in missing:  # one at a time
        now: list[Tensor | None] = []
        weight = _weight(x, projections[one.members[place]], now)
        asked = [*nothing[:place], (*given[place][:-1], weight), *nothing[place + 1 :]]
        _native.cuda_lora_products(how.device, stream, group, asked, address(workspace))


def _adapter(
    projection: Projection, start: int, alive: list[Tensor | None]
) -> tuple[tuple[int, int, str, int, int], tuple[float, float, int, int]]:
    lora_A, lora_B = projection.lora_A, projection.lora_B
    assert lora_A is not None
    assert lora_B is not None
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    alive += (lora_A, lora_B)
    n, r = lora_B.shape
    return (
        (lora_A.data_ptr(), lora_B.data_ptr(), NAMES[lora_A.dtype], n, r),
        (projection.scaling, projection.dropout_p, projection.stream, start),
    )


def _workspace(x: Tensor, one: Pass | BackwardPass) -> Tensor | None:
    return x.new_empty(one.workspace, dtype=torch.uint8) if one.workspace else None


def _input(
    how: Plan,
    x: Tensor,
    seed: Tensor | None,
    one: Pass | BackwardPass,
    h: Tensor,
    terms: str = "written",
) -> tuple[int, int, int, str, int, int, int, int, int, str, str]:
    if not one.dropped:
        seed = None
    elif seed is None or seed.device != x.device:
        raise ValueError("dropout needs a seed on x's device: ops.dropout_seed(x)")
    at = h.data_ptr()
    bits = at + how.m * one.planes * one.columns * h.element_size() if one.bits else 0
    return (
        x.data_ptr(), how.m, how.k, NAMES[x.dtype], one.planes, address(seed),
        at, one.columns, bits, how.use, terms,
    )  # fmt: skip


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    hs: Sequence[Tensor | None],
    projections: Sequence[Projection],
    seed: Tensor | None,
    need: Need,
    how: Plan | None = None,
) -> Grads:
    """As ``reference.backward``, of what ``forward`` took and kept; ``grads`` are ``[..., n]``.

    x's gradient is ``[..., k]`` or ``[m, k]``.
    """
    how = plan(x, projections) if how is None else how
    asked = planned_backward(how, grads, x, projections, need)
    nothing: list[Tensor | None] = [None] * len(projections)
    found = Grads(None, nothing[:], nothing[:], nothing[:], nothing[:])
    dx: Tensor | None = None
    for one in asked.passes:
        if how.m == 0:
            _no_rows(one.live, projections, found)
            continue
        part = None
        if need.x:  # PyTorch's products add to rows
            part = x.new_empty(how.m, how.k) if asked.after else torch.empty_like(x)
        _run_backward(how, grads, x, hs[one.first], projections, seed, one, need, found, part)
        dx = _add(dx, part)
    for i, term, biases, base in asked.after:
        grad, projection = grads[i], projections[i]
        assert grad is not None
        grad = _rows(how, grad)
        if term:
            more = _by_pytorch(grad, _rows(how, x), hs[i], projection, seed, need, i, found)
            dx = _add(dx, more)
        elif biases:
            reference.bias_grads(found, grad, projection, need, i)
        if base:
            dx = _base_grad(grad, projection, x.dtype, dx)
    if need.x and dx is None:
        dx = torch.zeros_like(x)
    return Grads(dx, *found[1:])


def _add(dx: Tensor | None, more: Tensor | None) -> Tensor | None:
    if dx is None or more is None:
        return more if dx is None else dx
    return dx.add_(more)


def _base_grad(
    grad: Tensor, projection: Projection, dtype: torch.dtype, dx: Tensor | None
) -> Tensor | None:
    """``dx + grad·W``; a 4-bit W is dequantised to ``[k, n]``."""
    quant = projection.quant
    if quant is not None:
        transposed = dequantize_4bit(quant, quant.dtype, transpose=True).to(dtype)
        weight = transposed.t()
    elif projection.weight is not None:
        weight = projection.weight
    else:
        return dx
    return grad @ weight if dx is None else dx.addmm_(grad, weight)


def _by_pytorch(
    grad: Tensor,
    x: Tensor,
    h: Tensor | None,
    projection: Projection,
    seed: Tensor | None,
    need: Need,
    i: int,
    found: Grads,
) -> Tensor | None:
    """The LoRA term's gradients of one projection; returns its part of x's."""
    alone = Need(
        need.x, (need.lora_A[i],), (need.lora_B[i],), (need.bias[i],), (need.lora_bias[i],)
    )
    term = projection._replace(weight=None, quant=None)
    part = reference.backward([grad], x, [h], [term], seed, alone)
    for column, one in zip(found[1:], part[1:], strict=True):
        column[i] = one[0]
    return part.x


def _no_rows(live: Sequence[Live], projections: Sequence[Projection], found: Grads) -> None:
    """The gradients of adapters that no row of x went through."""
    for one in live:
        lora_A, lora_B = projections[one.i].lora_A, projections[one.i].lora_B
        if one.lora_A and lora_A is not None:
            found.lora_A[one.i] = torch.zeros_like(lora_A, memory_format=torch.contiguous_format)
        if one.lora_B and lora_B is not None:
            found.lora_B[one.i] = torch.zeros_like(lora_B, memory_format=torch.contiguous_format)


def _run_backward(
    how: Plan,
    grads: Sequence[Tensor | None],
    x: Tensor,
    h: Tensor | None,
    projections: Sequence[Projection],
    seed: Tensor | None,
    one: BackwardPass,
    need: Need,
    found: Grads,
    part: Tensor | None,
) -> None:
    """Fills in the gradients of a pass's adapters, and ``part``, what it adds to x's."""
    assert h is not None
    alive: list[Tensor | None] = []
    given: list[Any] = []
    for i, start, for_A, for_B, based in one.live:
        projection, grad = projections[i], grads[i]
        assert grad is not None
        adapter = _adapter(projection, start, alive)
        lora_A, lora_B = alive[-2:]  # contiguous
        assert lora_A is not None
        assert lora_B is not None
        kind = lora_A.dtype if need.grads is None else need.grads
        found.lora_A[i] = grad_A = torch.empty_like(lora_A, dtype=kind) if for_A else None
        found.lora_B[i] = grad_B = torch.empty_like(lora_B, dtype=kind) if for_B else None
        grads_of = (address(grad_A), address(grad_B), NAMES[kind])
        weight = _weight(x, projection, alive) if based else _NO_WEIGHT
        outputs = (grad.data_ptr(), 0, 0, "float32")
        given.append((*adapter, outputs, grads_of, weight))
    workspace = _workspace(x, one)
    _native.cuda_lora_backward(
        how.device,
        cuda.raw_stream(how.device),
        _input(how, x, seed, one, h),
        given,
        address(workspace),
        address(part),
    )
