"""What of a LoRA operation on CUDA follows from shapes and types alone: worked out once for them.

A plan holds no tensor and no address. It is looked up at every call by all that it was made from.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import _native
from . import cuda, cuda_small
from .cuda import NAMES, address

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

    from .cuda_small import Division
    from .types import Need, Projection

_HALVES = (torch.float16, torch.bfloat16)
_SEGMENT = 16  # ranks are padded to multiples of it
_ALIGNMENT = 16  # bytes, of what ferrotune's own product reads
_MOST_PLANS = 4096
# Up to which gate, up and what follows are faster by one product: its epilogue is longer, which
# shorter launches and less memory traffic outweigh there alone (4096x14336 on an H200: 2 % of the
# three at 2048 rows, nothing at 4096, -1 % at 8192).
_GATED_ROWS = 3072


class Pass(NamedTuple):
    """Projections that the kernels take together, by index, and where the H of each starts."""

    members: list[int]
    starts: list[int]
    columns: int
    planes: int  # parts of an adapter's value
    onto: bool  # without products of our own: the LoRA terms are added to the base products
    bits: int = 0  # columns of the mask that is kept behind H, an only projection's
    terms: str = "written"  # what forward does with them, as native calls name it
    dropped: bool = False
    workspace: int = 0  # bytes, of forward
    small: tuple[Division, ...] = ()  # a member's each: forward is a kernel of few rows for each
    gated: bool = False  # whether one product takes both members, as gate and up

    @property
    def width(self) -> int:
        """16-bit columns of what is kept for backward: H, and then all rows of the mask."""
        return self.planes * self.columns + self.bits

    def kept_dtype(self, x: Tensor) -> torch.dtype:
        """Of what is kept: numbers in x's, or bits, which as such would be NaN here and there."""
        return torch.int16 if self.bits else x.dtype


class Live(NamedTuple):
    """A projection in a pass of backward."""

    i: int
    start: int
    lora_A: bool  # whether its gradient is asked for
    lora_B: bool
    based: bool  # whether x's gradient gets its base product in the same call


class BackwardPass(NamedTuple):
    """A pass whose H, of ``columns`` with ``bits`` behind them, was kept with ``first``."""

    first: int
    live: list[Live]
    columns: int
    planes: int
    bits: int
    dropped: bool
    workspace: int  # bytes


class After(NamedTuple):
    """What is left of projection i's gradients after the passes."""

    i: int
    term: bool  # the LoRA term's, by PyTorch
    biases: bool
    base: bool  # the base product's part of x's


class BackwardPlan(NamedTuple):
    passes: list[BackwardPass]
    after: list[After]


class Plan(NamedTuple):
    """How forward runs, and backward for each way in which it was asked for."""

    use: str
    device: int  # its index
    m: int
    k: int
    passes: list[Pass]
    by_pytorch: list[int]  # projections that no kernel takes
    small: dict[int, Division]  # those without adapter that the kernel of few rows takes
    backward: dict[Hashable, BackwardPlan]


_plans: dict[Hashable, Plan] = {}


def planned(x: Tensor, projections: Sequence[Projection], use: str, small: str) -> Plan:
    """The plan for contiguous x ``[..., k]``; the rest are ``cuda_lora.hopper`` and ``small``."""
    place = x.data_ptr() % _ALIGNMENT
    key = (use, small, x.shape, x.dtype, x.device, place, *map(_facts, projections))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = _plan(x, projections, use, small)
    return plan


def _facts(projection: Projection) -> Hashable:
    """All of a projection that plans depend on: not the scaling, not the stream of the mask."""
    weight, quant, bias, lora_A, lora_B, lora_bias, _, dropout_p, _ = projection
    return (
        weight is not None
        and (weight.shape, weight.stride(), weight.dtype, weight.data_ptr() % _ALIGNMENT),
        quant is not None
        and (
            quant.shape,
            quant.dtype,
            quant.packed.data_ptr() % _ALIGNMENT,
            *[part is not None and part.device for part in quant[:5]],
        ),
        bias is not None and bias.dtype,
        lora_A is not None and (lora_A.shape, lora_A.dtype, lora_A.data_ptr() % _ALIGNMENT),
        lora_B is not None and (lora_B.shape, lora_B.dtype),
        lora_bias is not None and lora_bias.dtype,
        dropout_p > 0,
        dropout_p >= 1,
    )


def _plan(x: Tensor, projections: Sequence[Projection], use: str, small: str) -> Plan:
    index = x.device.index
    if x.is_cuda:
        cuda.prepared_stream(x)  # the device is asked below
    k = x.shape[-1]
    m = x.shape[:-1].numel()
    taken: list[Pass] = []
    for one in passes(x, projections, use):
        members = [projections[i] for i in one.members]
        carried = all(_carried(x, m, member, use, backward=False) for member in members)
        sizes = tuple((member.shape[0], member.rank) for member in members)
        divisions = [cuda_small.division(x, m, member, small) for member in members]
        few = tuple(found for found in divisions if found is not None)
        if len(few) < len(members):
            few = ()
        terms = "small" if few else "left" if carried else "added" if one.onto else "written"
        dropped = any(member.dropout_p for member in members)
        taken.append(
            one._replace(
                terms=terms,
                small=few,
                dropped=dropped,
                workspace=_workspace_bytes(index, m, k, one.planes, sizes, False) if m else 0,
                gated=m > 0
                and (m <= _GATED_ROWS or use == "always")
                and terms == "left"
                and _gated(members),
            )
        )
    done = {i for one in taken for i in one.members}
    bare: dict[int, Division] = {}
    for i, projection in enumerate(projections):
        if projection.lora_A is None:
            found = cuda_small.division(x, m, projection, small)
            if found is not None:
                bare[i] = found
    rest = [i for i in range(len(projections)) if i not in done and i not in bare]
    return Plan(use, index, m, k, taken, rest, bare, {})


def _gated(members: Sequence[Projection]) -> bool:
    """Whether carried projections of a pass are taken as gate and up by one product."""
    return (
        len(members) == 2
        and members[0].shape == members[1].shape
        and all(
            member.bias is None
            and member.lora_bias is None
            and (member.weight is None or member.weight.is_contiguous())
            for member in members
        )
    )


@functools.cache
def _max_columns(index: int, planes: int) -> int:
    return _native.cuda_lora_max_columns(index, planes)


@functools.lru_cache(maxsize=4096)
def _carries(use: str, index: int, m: int, w: int, depth: int, down_rows: bool) -> bool:
    can, pays = _native.cuda_lora_carries(index, m, w, depth, down_rows)
    return can and use != "never" and (pays or use == "always")


@functools.lru_cache(maxsize=4096)
def _workspace_bytes(
    index: int,
    m: int,
    k: int,
    planes: int,
    sizes: tuple[tuple[int, int], ...],
    backward: bool,
) -> int:
    return _native.cuda_lora_workspace(index, m, k, planes, list(sizes), backward)


@functools.lru_cache(maxsize=4096)
def _kept_bytes(index: int, k: int, planes: int, use: str) -> int:
    return _native.cuda_lora_kept_bytes(index, k, planes, use) or 0


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


def passes(x: Tensor, projections: Sequence[Projection], use: str) -> list[Pass]:
    """The passes over x in which the kernels take the projections; reads no address.

    What they keep does not depend on the number of rows, which may be symbolic.
    """
    found: list[Pass] = []
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
        last = found[-1] if found else None
        if (
            last is None
            or (last.planes, last.onto) != (planes, onto)
            or last.columns + columns > most
        ):
            found.append(Pass([i], [0], columns, planes, onto))
        else:
            last.members.append(i)
            last.starts.append(last.columns)
            found[-1] = last._replace(columns=last.columns + columns)
    for place, one in enumerate(found):
        projection = projections[one.members[0]]
        if len(one.members) == 1 and projection.dropout_p:
            k = int(projection.shape[1])  # a compiler may have it as a symbol
            kept = _kept_bytes(x.device.index, k, one.planes, use)
            found[place] = one._replace(bits=kept // x.dtype.itemsize)
    return found


def _carried(x: Tensor, m: int, projection: Projection, use: str, *, backward: bool) -> bool:
    """Whether ferrotune's own product takes the projection's weight."""
    weight, quant, bias = projection.weight, projection.quant, projection.bias
    n, k = projection.shape
    w, depth = (k, n) if backward else (n, k)
    turned = weight is not None and not weight.is_contiguous()  # it lies as [k, n]
    if not _carries(use, x.device.index, m, w, depth, backward != turned):
        return False
    if x.data_ptr() % _ALIGNMENT or (bias is not None and bias.dtype != x.dtype):
        return False
    if quant is not None:
        if any(part is not None and part.device != x.device for part in quant.tensors):
            raise ValueError(f"the parts of a 4-bit weight must all be on {x.device}")
        return True
    if weight is None:
        return False
    lies = weight.is_contiguous() or weight.t().is_contiguous()
    return weight.dtype == x.dtype and lies and weight.data_ptr() % _ALIGNMENT == 0


def planned_backward(
    plan: Plan,
    grads: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    need: Need,
) -> BackwardPlan:
    """How backward of ``plan`` runs, given contiguous ``grads`` ``[..., n]``."""
    marks = [
        grad is not None
        and (grad.dtype, (grad.data_ptr() | address(projection.weight)) % _ALIGNMENT)
        for grad, projection in zip(grads, projections, strict=True)
    ]
    key = (need, x.data_ptr() % _ALIGNMENT, *marks)
    found = plan.backward.get(key)
    if found is None:
        found = plan.backward[key] = _plan_backward(plan, grads, x, projections, need)
    return found


def _plan_backward(
    plan: Plan,
    grads: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    need: Need,
) -> BackwardPlan:
    taken: list[BackwardPass] = []
    based: set[int] = set()
    for one in plan.passes:
        members = [i for i in one.members if grads[i] is not None]
        if not (need.x or any(need.lora_A[i] or need.lora_B[i] for i in members)) or not members:
            continue
        if need.x and plan.m:
            based |= _based(plan, grads, x, projections, members, one)
        live = [
            Live(i, start, need.lora_A[i], need.lora_B[i], i in based)
            for i, start in zip(one.members, one.starts, strict=True)
            if i in members
        ]
        sizes = tuple((projections[i].shape[0], projections[i].rank) for i in members)
        dropped = any(projections[i].dropout_p for i in members)
        taken.append(
            BackwardPass(
                one.members[0],
                live,
                one.columns,
                one.planes,
                one.bits,
                dropped,
                _workspace_bytes(plan.device, plan.m, plan.k, one.planes, sizes, True)
                if plan.m
                else 0,
            )
        )
    after = []
    for i, (grad, projection) in enumerate(zip(grads, projections, strict=True)):
        if grad is None:
            continue
        term = i in plan.by_pytorch and projection.lora_A is not None
        biases = not term and (need.bias[i] or need.lora_bias[i])
        base = need.x and i not in based
        base = base and (projection.weight is not None or projection.quant is not None)
        if term or biases or base:
            after.append(After(i, term, biases, base))
    return BackwardPlan(taken, after)


def _based(
    plan: Plan,
    grads: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    members: list[int],
    kept: Pass,
) -> set[int]:
    """The projections whose base products x's gradient gets together with the LoRA terms."""
    found: set[int] = set()
    if not kept.bits and any(projections[i].dropout_p for i in members):
        return found  # the product takes a mask that was kept, and of several it is one sum
    room = 0.0
    transposed: set[bool] = set()
    for i in members:
        grad, projection = grads[i], projections[i]
        if grad is None or grad.data_ptr() % _ALIGNMENT or grad.dtype != x.dtype:
            continue
        if not _carried(x, plan.m, projection, plan.use, backward=True):
            continue
        if projection.quant is not None:
            # Dense copies of one and a half times the first at most: they take memory all at once.
            elements = projection.shape[0] * projection.shape[1]
            room = room or 1.5 * elements
            if elements > room:
                continue
            room -= elements
        weight = projection.weight
        lies = weight is not None and not weight.is_contiguous()
        if not transposed or lies in transposed:
            transposed.add(lies)
            found.add(i)
    return found
