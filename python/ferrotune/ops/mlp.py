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


def apply(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    seed: Tensor | None,
    given: Sequence[Projection],
) -> Tensor:
    """``down(activation(gate(x))·up(x))``; the projections are gate, up and down.

    ``given`` is as for `autograd.apply`.
    """
    if not torch.is_grad_enabled():  # no node, as in `autograd.apply`
        y = _forward(choose(x), x, projections, activation, seed)[0]
        return y if x.dim() == y.dim() else y.view(*x.shape[:-1], y.shape[-1])
    call = (seed, projections, activation)
    return _GatedMlp.apply(call, x, *trained_tensors(given))  # type: ignore[no-any-return]


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
    seed: Tensor | None,
) -> tuple[Tensor, tuple[Any, Any], list[Tensor | None]]:
    """y; the plans of gate and up, and of down; x as it is kept, gate, up, every H."""
    laid_out = backend.laid_out(x)
    plan = backend.plan(laid_out, projections[:2])
    with no_autocast(x):
        together = backend.gated(laid_out, projections[:2], activation, seed, plan)
        if together is None:
            (gate, up), hs = backend.forward(laid_out, projections[:2], seed, plan)
            hidden = _gated(gate, up, activation)
        else:
            (gate, up), hidden, hs = together
        down_plan = backend.plan(hidden, projections[2:])
        if _now.output:
            (y,), down_hs = backend.forward(hidden, projections[2:], seed, down_plan)
        else:
            down_hs = backend.ranks(hidden, projections[2:], seed, down_plan)
            y = hidden.new_zeros(()).expand(*hidden.shape[:-1], projections[2].shape[0])
    return y, (plan, down_plan), [laid_out, gate, up, *hs, *down_hs]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Any, x: Tensor, *given: Tensor | None) -> Tensor:
        seed, projections, activation = call
        backend = choose(x)
        y, plans, (laid_out, *between) = _forward(backend, x, projections, activation, seed)
        ctx.shape, ctx.backend, ctx.plans, ctx.activation = x.shape, backend, plans, activation
        ctx.save_for_backward(laid_out, seed, *between, *kept(ctx, projections, given))
        return y if x.dim() == y.dim() else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, seed, gate, up, *saved = ctx.saved_tensors
        hs = saved[:3]
        projections, need = restored(ctx, saved[3:])
        first, last = _split(need)
        backend = ctx.backend
        found = Grads(None, [None] * 2, [None] * 2, [None] * 2, [None] * 2)
        with no_autocast(x):
            grad = backend.laid_out(grad)

            def down(hidden: Tensor, need: Need) -> Grads:
                return backend.backward(  # type: ignore[no-any-return]
                    [grad], hidden, hs[2:], projections[2:], seed, need, ctx.plans[1]
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
                early = down(hidden, Need(False, (True,), *((False,),) * 3, need.grads))
                late = late._replace(lora_A=early.lora_A)
                del hidden
            if late.x is not None:
                found = backend.backward(
                    grads, x, hs[:2], projections[:2], seed, first, ctx.plans[0]
                )
        dx = found.x
        if dx is not None and dx.shape != ctx.shape:
            dx = dx.view(ctx.shape)
        return (None, dx, *by_projection(found), *by_projection(late))


def _split(need: Need) -> tuple[Need, Need]:
    """What is asked for of gate and up, and of down: its input's gradient if anything before is."""

    def part(which: slice, x: bool) -> Need:
        return Need(
            x,
            need.lora_A[which],
            need.lora_B[which],
            need.bias[which],
            need.lora_bias[which],
            need.grads,
        )

    first = part(slice(2), need.x)
    before = (first.lora_A, first.lora_B, first.bias, first.lora_bias)
    return first, part(slice(2, None), need.x or any(map(any, before)))


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
