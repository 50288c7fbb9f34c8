"""LoRA's forward and backward on CUDA: ferrotune's kernels around PyTorch's products.

The LoRA term of a projection is written first, with its biases; the base product accumulates onto
it. (f32 adapters beside a 16-bit x: the base product first, so that the term is rounded but once,
with the sum; each of their values is three of x's type.) Backward does the same for x's gradient,
from a 4-bit weight laid out transposed. Adapters that no kernel takes (x of 32 bits or more, ranks
above what one pass takes) go through PyTorch's products, with the same masks and weights.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import cuda, reference
from .cuda import NAMES, address, dequantize_4bit, quantize_4bit
from .types import Grads, Need, Projection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["backward", "dequantize_4bit", "forward", "quantize_4bit", "saved"]

_HALVES = (torch.float16, torch.bfloat16)
_SEGMENT = 16  # ranks are padded to multiples of it


class _Pass(NamedTuple):
    """Projections that the kernels take together, by index, and where the H of each starts."""

    members: list[int]
    starts: list[int]
    columns: int
    planes: int  # parts of an adapter's value
    onto: bool  # the LoRA terms are added to the base products


@functools.cache
def _max_columns(index: int, planes: int) -> int:
    from .. import _native

    return _native.cuda_lora_max_columns(index, planes)


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(
    index: int, m: int, k: int, planes: int, sizes: tuple[tuple[int, int], ...], backward: bool
) -> int:
    from .. import _native

    return _native.cuda_lora_workspace(index, m, k, planes, list(sizes), backward)


def _planes(x: Tensor, projection: Projection) -> int:
    """1, or 3 where the adapter is wider than x; 0 where the kernels do not take it."""
    lora_A, lora_B, lora_bias = projection.lora_A, projection.lora_B, projection.lora_bias
    if lora_A is None or lora_B is None or x.dtype not in _HALVES:
        return 0
    kind = lora_A.dtype
    if kind not in NAMES or lora_B.dtype != kind or lora_A.shape[0] == 0:
        return 0
    if lora_bias is not None and lora_bias.dtype not in NAMES:
        return 0
    if projection.shape[0] == 0 or projection.shape[1] == 0:
        return 0
    return 1 if kind == x.dtype else 3


def _passes(x: Tensor, projections: Sequence[Projection]) -> list[_Pass]:
    """The passes over x in which the kernels take the projections."""
    passes: list[_Pass] = []
    for i, projection in enumerate(projections):
        planes = _planes(x, projection)
        if planes == 0:
            continue
        columns = -(-projection.rank // _SEGMENT) * _SEGMENT
        most = _max_columns(x.device.index, planes)
        if columns > most:
            continue
        has_base = projection.weight is not None or projection.quant is not None
        onto = has_base and (planes > 1 or projection.dropout_p >= 1)
        last = passes[-1] if passes else None
        if last is None or last[3:] != (planes, onto) or last.columns + columns > most:
            passes.append(_Pass([i], [0], columns, planes, onto))
        else:
            last.members.append(i)
            last.starts.append(last.columns)
            passes[-1] = last._replace(columns=last.columns + columns)
    return passes


def saved(
    x: Tensor, projections: Sequence[Projection]
) -> list[tuple[tuple[int, int], torch.dtype] | None]:
    """Shape and dtype of what forward keeps of each projection: a pass's H, with its first."""
    found = reference.saved(x, projections)
    for one in _passes(x, projections):
        for i in one.members:
            found[i] = None
        found[one.members[0]] = ((x.shape[0], one.planes * one.columns), x.dtype)
    return found


def forward(
    x: Tensor, projections: Sequence[Projection], seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """As ``reference.forward``, but for the form of ``hs``: see ``saved``."""
    count = len(projections)
    ys: list[Tensor | None] = [None] * count
    hs: list[Tensor | None] = [None] * count
    m = x.shape[0]
    done = set()
    for one in _passes(x, projections):
        for i in one.members:
            done.add(i)
            if one.onto:
                ys[i] = reference.base(x, projections[i])
            else:
                ys[i] = x.new_empty(m, projections[i].shape[0])
        hs[one.members[0]] = h = x.new_empty(m, one.planes * one.columns)
        if m:
            _run_forward(x, projections, seed, one, ys, h)
        if one.onto:
            continue
        for i in one.members:
            weight, y = reference.dense(projections[i], x.dtype), ys[i]
            if weight is not None and y is not None:
                y.addmm_(x, weight.t())
    for i, projection in enumerate(projections):
        if i not in done:
            (ys[i],), (hs[i],) = reference.forward(x, [projection], seed)
    return ys, hs  # type: ignore[return-value]


def _run_forward(
    x: Tensor,
    projections: Sequence[Projection],
    seed: Tensor | None,
    one: _Pass,
    ys: Sequence[Tensor | None],
    h: Tensor,
) -> None:
    from .. import _native

    index = x.device.index
    alive: list[Tensor] = []
    given = []
    for i, start in zip(one.members, one.starts, strict=True):
        projection, y = projections[i], ys[i]
        bias, lora_bias = projection.bias, projection.lora_bias
        bias = None if bias is None or one.onto else bias.contiguous()
        lora_bias = None if lora_bias is None else lora_bias.contiguous()
        kind = x.dtype if lora_bias is None else lora_bias.dtype
        alive += [part for part in (bias, lora_bias) if part is not None]
        assert y is not None
        given.append(
            (
                *_adapter(projection, start, alive),
                (y.data_ptr(), address(bias), address(lora_bias), NAMES[kind]),
                (0, 0),
            )
        )
    workspace = _workspace(x, projections, one, backward=False)
    _native.cuda_lora_forward(
        index,
        cuda.raw_stream(index),
        _input(x, projections, seed, one, h, one.columns),
        given,
        workspace.data_ptr(),
    )


def _adapter(
    projection: Projection, start: int, alive: list[Tensor]
) -> tuple[tuple[int, int, str, int, int], tuple[float, float, int, int]]:
    lora_A, lora_B = projection.lora_A, projection.lora_B
    assert lora_A is not None
    assert lora_B is not None
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    alive += (lora_A, lora_B)
    r, n = lora_A.shape[0], lora_B.shape[0]
    return (
        (lora_A.data_ptr(), lora_B.data_ptr(), NAMES[lora_A.dtype], n, r),
        (projection.scaling, projection.dropout_p, projection.stream, start),
    )


def _input(
    x: Tensor,
    projections: Sequence[Projection],
    seed: Tensor | None,
    one: _Pass,
    h: Tensor,
    h_columns: int,
) -> tuple[int, int, int, str, int, int, int, int, bool]:
    m, k = x.shape
    dropped = any(projections[i].dropout_p for i in one.members)
    if dropped and (seed is None or seed.device != x.device):
        raise ValueError("dropout needs a seed on x's device: ops.dropout_seed(x)")
    return (
        x.data_ptr(), m, k, NAMES[x.dtype], one.planes, address(seed if dropped else None),
        h.data_ptr(), h_columns, one.onto,
    )  # fmt: skip


def _workspace(
    x: Tensor, projections: Sequence[Projection], one: _Pass, *, backward: bool
) -> Tensor:
    m, k = x.shape
    sizes = tuple((projections[i].shape[0], projections[i].rank) for i in one.members)
    needed = _workspace_bytes(x.device.index, m, k, one.planes, sizes, backward)
    return x.new_empty(needed, dtype=torch.uint8)


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    hs: Sequence[Tensor | None],
    projections: Sequence[Projection],
    seed: Tensor | None,
    need: Need,
) -> Grads:
    """As ``reference.backward``, of what ``forward`` kept."""
    count = len(projections)
    nothing: list[Tensor | None] = [None] * count
    found = Grads(None, nothing[:], nothing[:], nothing[:], nothing[:])
    dx: Tensor | None = None
    done = set()
    for one in _passes(x, projections):
        done.update(one.members)
        dx = _run_backward(grads, x, hs[one.members[0]], projections, seed, need, one, found, dx)
    for i, (grad, projection) in enumerate(zip(grads, projections, strict=True)):
        if grad is None:
            continue
        if i in done or projection.lora_A is None:
            reference.bias_grads(found, grad, projection, need, i)
        else:
            dx = _add(dx, _by_pytorch(grad, x, hs[i], projection, seed, need, i, found))
        if need.x:
            dx = _base_grad(grad, projection, x.dtype, dx)
    if need.x and dx is None:
        dx = torch.zeros_like(x)
    return found._replace(x=dx)


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


def _run_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    h: Tensor | None,
    projections: Sequence[Projection],
    seed: Tensor | None,
    need: Need,
    one: _Pass,
    found: Grads,
    dx: Tensor | None,
) -> Tensor | None:
    """Fills in the gradients of a pass's adapters; returns dx with its LoRA terms."""
    from .. import _native

    assert h is not None
    places = [place for place, i in enumerate(one.members) if grads[i] is not None]
    live = one._replace(
        members=[one.members[place] for place in places],
        starts=[one.starts[place] for place in places],
    )
    wanted = need.x or any(need.lora_A[i] or need.lora_B[i] for i in live.members)
    if not live.members or not wanted:
        return dx
    alive: list[Tensor] = []
    given = []
    empty = x.shape[0] == 0
    for i, start in zip(live.members, live.starts, strict=True):
        projection, grad = projections[i], grads[i]
        lora_A, lora_B = projection.lora_A, projection.lora_B
        assert grad is not None
        assert lora_A is not None
        assert lora_B is not None
        make = torch.zeros if empty else torch.empty
        if need.lora_A[i]:
            found.lora_A[i] = make(lora_A.shape, dtype=lora_A.dtype, device=x.device)
        if need.lora_B[i]:
            found.lora_B[i] = make(lora_B.shape, dtype=lora_B.dtype, device=x.device)
        given.append(
            (
                *_adapter(projection, start, alive),
                (grad.data_ptr(), 0, 0, "float32"),
                (address(found.lora_A[i]), address(found.lora_B[i])),
            )
        )
    if empty:
        return dx
    part = torch.empty_like(x) if need.x else None
    workspace = _workspace(x, projections, live, backward=True)
    index = x.device.index
    _native.cuda_lora_backward(
        index,
        cuda.raw_stream(index),
        _input(x, projections, seed, live, h, one.columns),
        given,
        workspace.data_ptr(),
        address(part),
    )
    return _add(dx, part)
