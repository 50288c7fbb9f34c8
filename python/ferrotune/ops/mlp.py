"""A gated MLP as one node of autograd: what it keeps is x, gate and up, and ranks' worth of H."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from . import blocks, cuda_blocks
from .autograd import by_projection, kept, no_autocast, restored, trained_tensors
from .backend import choose
from .types import Grads, Need

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from .backend import Backend
    from .types import Projection


Seeds = tuple["Tensor | None", ...]
"""Of the masks: one for all projections, or one for each."""


def apply(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    seeds: Seeds,
    given: Sequence[Projection],
) -> Tensor:
    """``down(activation(gate(x))·up(x))``; the projections are gate, up and down.

    ``given`` is as for `autograd.apply`.
    """
    if not torch.is_grad_enabled():  # no node, as in `autograd.apply`
        y = _forward(choose(x), x, projections, activation, seeds)[0]
        return y if x.dim() == y.dim() else y.view(*x.shape[:-1], y.shape[-1])
    call = (seeds, projections, activation)
    return _GatedMlp.apply(call, x, *trained_tensors(given))  # type: ignore[no-any-return]


def _first(seeds: Sequence[Tensor | None]) -> list[tuple[slice, Tensor | None]]:
    """Which of gate and up the backend takes together, and their seed."""
    if len(seeds) == 1:
        return [(slice(2), seeds[0])]
    return [(slice(1), seeds[0]), (slice(1, 2), seeds[1])]


class _Now(threading.local):
    output = True


_now = _Now()


@contextmanager
def without_output() -> Iterator[None]:
    """For a forward that is run again for what it keeps alone: the last product, which nothing of
    that depends on, is left out, and the output is 0."""
    before, _now.output = _now.output, False
    try:
        yield
    finally:
        _now.output = before


def _forward(
    backend: Backend,
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    seeds: Seeds,
) -> tuple[Tensor, list[Any], list[Tensor | None]]:
    """y; the plans; x as it is kept, gate, up, every H."""
    laid_out = backend.laid_out(x)
    plans: list[Any] = []
    made: list[Tensor] = []
    hs: list[Tensor | None] = []
    hidden = None
    with no_autocast(x):
        for which, seed in _first(seeds):
            plan = backend.plan(laid_out, projections[which])
            together = backend.gated(laid_out, projections[which], activation, seed, plan)
            if together is None:
                ys, ranks = backend.forward(laid_out, projections[which], seed, plan)
            else:
                ys, hidden, ranks = together
            plans.append(plan)
            made += ys
            hs += ranks
        gate, up = made
        if hidden is None:
            hidden = _gated(gate, up, activation)
        plans.append(backend.plan(hidden, projections[2:]))
        if _now.output:
            (y,), ranks = backend.forward(hidden, projections[2:], seeds[-1], plans[-1])
        else:
            ranks = backend.ranks(hidden, projections[2:], seeds[-1], plans[-1])
            y = hidden.new_zeros(()).expand(*hidden.shape[:-1], projections[2].shape[0])
    return y, plans, [laid_out, gate, up, *hs, *ranks]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Any, x: Tensor, *given: Tensor | None) -> Tensor:
        seeds, projections, activation = call
        backend = choose(x)
        y, plans, between = _forward(backend, x, projections, activation, seeds)
        ctx.shape, ctx.backend, ctx.plans, ctx.activation = x.shape, backend, plans, activation
        ctx.save_for_backward(*between, *kept(ctx, projections, given), *seeds)
        ctx.seeds = len(seeds)
        return y if x.dim() == y.dim() else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, gate, up, *saved = ctx.saved_tensors
        hs, seeds = saved[:3], saved[len(saved) - ctx.seeds :]
        projections, need = restored(ctx, saved[3:])
        early = _asked(need, slice(2), need.x)
        last = _asked(need, slice(2, None), need.x or any(map(any, early[1:5])))
        backend = ctx.backend
        found = Grads(None, [None] * 2, [None] * 2, [None] * 2, [None] * 2)
        with no_autocast(x):
            grad = backend.laid_out(grad)

            def down(hidden: Tensor, need: Need) -> Grads:
                return backend.backward(  # type: ignore[no-any-return]
                    [grad], hidden, hs[2:], projections[2:], seeds[-1], need, ctx.plans[-1]
                )

            # Of the hidden state all but A's gradient needs the shape alone, which is gate's.
            late = down(gate, last._replace(lora_A=(False,)))
            hidden = None
            if late.x is not None:
                grads, hidden = _gated_backward(
                    late.x.view(gate.shape), gate, up, ctx.activation, last.lora_A[0]
                )
            elif last.lora_A[0]:
                hidden = _gated(gate, up, ctx.activation)
            if hidden is not None:
                of_A = down(hidden, Need(False, (True,), *((False,),) * 3, need.grads))
                late = late._replace(lora_A=of_A.lora_A)
                del hidden
            if late.x is not None:
                parts = []
                for (which, seed), plan in zip(_first(seeds), ctx.plans, strict=False):
                    asked = _asked(need, which, need.x)
                    parts.append(
                        backend.backward(
                            grads[which], x, hs[which], projections[which], seed, asked, plan
                        )
                    )
                found = _joined(parts)
        dx = found.x
        if dx is not None and dx.shape != ctx.shape:
            dx = dx.view(ctx.shape)
        return (None, dx, *by_projection(found), *by_projection(late))


def _asked(need: Need, which: slice, x: bool) -> Need:
    """What is asked for of some of the projections."""
    return Need(
        x,
        need.lora_A[which],
        need.lora_B[which],
        need.bias[which],
        need.lora_bias[which],
        need.grads,
    )


def _joined(parts: Sequence[Grads]) -> Grads:
    """The gradients of one x, added up in the first one's memory, and of all projections."""
    found = parts[0]
    for other in parts[1:]:
        dx = found.x if found.x is None or other.x is None else found.x.add_(other.x)
        found = Grads(dx, *([*a, *b] for a, b in zip(found[1:], other[1:], strict=True)))
    return found


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if blocks.fused(gate):
        return cuda_blocks.glu(gate, up, activation)
    return blocks.activated(gate, activation) * up


def _gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of gate and up, one in the memory of ``grad`` where that serves; and with
    ``again`` their product once more."""
    if blocks.fused(gate):
        first, second, hidden = cuda_blocks.glu_backward(
            grad, gate, up, activation, in_place=True, again=again
        )
        assert second is not None
        return [first, second], hidden
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        out = blocks.activated(gate, activation) * up
    return list(torch.autograd.grad(out, (gate, up), grad)), out.detach() if again else None
