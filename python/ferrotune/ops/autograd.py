"""The eager path: one autograd node for a group of projections, straight to the backend."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from .backend import choose
from .reference import as_rows
from .types import Need, Projection

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from .backend import Backend
    from .types import Grads

__all__ = [
    "TRAINED",
    "apply",
    "as_rows",
    "by_projection",
    "kept",
    "no_autocast",
    "restored",
    "trained_tensors",
]

# What of a projection may get a gradient, in the order of its fields.
TRAINED = ("bias", "lora_A", "lora_B", "lora_bias")


def _forward(
    backend: Backend, x: Tensor, projections: Sequence[Projection], seed: Tensor | None
) -> tuple[tuple[Tensor, ...], Any, Tensor, list[Tensor | None]]:
    """``y`` of every projection; the plan; x as it is kept, and every H."""
    laid_out = backend.laid_out(x)
    plan = backend.plan(laid_out, projections)
    with no_autocast(x):
        ys, hs = backend.forward(laid_out, projections, seed, plan)
    if x.dim() != ys[0].dim():
        ys = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    return tuple(ys), plan, laid_out, hs


class _LoraGroup(torch.autograd.Function):
    """Takes the seed and the projections, and by itself every tensor that may get a gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Tensor | None, Sequence[Projection]], x: Tensor, *given: Tensor | None
    ) -> tuple[Tensor, ...]:
        seed, projections = call
        backend = choose(x)
        ys, plan, laid_out, hs = _forward(backend, x, projections, seed)
        ctx.shape, ctx.backend, ctx.plan = x.shape, backend, plan
        ctx.save_for_backward(laid_out, seed, *hs, *kept(ctx, projections, given))
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _once(ctx, *grads)
        return _backward(ctx, *grads)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    backend = ctx.backend
    count = len(ctx.frozen)
    x, seed, *saved = ctx.saved_tensors
    hs = saved[:count]
    projections, need = restored(ctx, saved[count:])
    laid_out = [None if grad is None else backend.laid_out(grad) for grad in grads]
    with no_autocast(x):
        found = backend.backward(laid_out, x, hs, projections, seed, need, ctx.plan)
    dx = found.x
    if dx is not None and dx.dim() != len(ctx.shape):
        dx = dx.view(ctx.shape)
    return (None, dx, *by_projection(found))


def kept(
    ctx: Any, projections: Sequence[Projection], given: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The tensors of projections that a node saves; it keeps the rest in ``ctx.frozen``.

    ``given`` are the node's `trained_tensors`, whose type the adapters' gradients may have.

    The frozen parts of a 4-bit weight are the layer's own memory. Everything else is saved:
    autograd then sees writes to it, and its hooks (checkpointing, FSDP) may let go of it.
    """
    asked = {tensor.dtype for tensor in given if tensor is not None and tensor.requires_grad}
    ctx.grads = torch.float32 if asked == {torch.float32} else None
    ctx.frozen = [(one.quant, one.scaling, one.dropout_p, one.stream) for one in projections]
    found: list[Tensor | None] = []
    for weight, _, bias, lora_A, lora_B, lora_bias, _, _, _ in projections:
        found += (weight, bias, lora_A, lora_B, lora_bias)
    return found


def restored(ctx: Any, saved: Sequence[Tensor | None]) -> tuple[list[Projection], Need]:
    """The projections of `kept`, and what is asked for of a node taking ``call, x, *trained``."""
    projections = []
    width = 1 + len(TRAINED)
    for i, (quant, scaling, dropout_p, stream) in enumerate(ctx.frozen):
        weight, bias, lora_A, lora_B, lora_bias = saved[i * width : (i + 1) * width]
        projections.append(
            Projection(weight, quant, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, stream)
        )
    return projections, _need(ctx.needs_input_grad, ctx.grads)


@functools.lru_cache(maxsize=1024)
def _need(asked: tuple[bool, ...], grads: torch.dtype | None) -> Need:
    _, need_x, *trained = asked
    need = {name: tuple(trained[i :: len(TRAINED)]) for i, name in enumerate(TRAINED)}
    return Need(need_x, **need, grads=grads)


def by_projection(found: Grads) -> list[Tensor | None]:
    """Gradients in the order of ``TRAINED``, for one projection after the other."""
    columns = (found.bias, found.lora_A, found.lora_B, found.lora_bias)
    return [grad for one in zip(*columns, strict=True) for grad in one]


_once = once_differentiable(_backward)  # where a second derivative is prepared, to refuse it


def apply(
    x: Tensor,
    projections: Sequence[Projection],
    seed: Tensor | None,
    given: Sequence[Projection],
) -> tuple[Tensor, ...]:
    """``y`` of every projection, ``[..., n]``.

    ``given`` are the projections whose tensors get the gradients: ``projections`` themselves, or
    what those were cast from; autograd casts the gradients back.
    """
    if not torch.is_grad_enabled():  # no node: its making takes longer than a small product
        return _forward(choose(x), x, projections, seed)[0]
    return _LoraGroup.apply((seed, projections), x, *trained_tensors(given))  # type: ignore[no-any-return]


def trained_tensors(projections: Sequence[Projection]) -> list[Tensor | None]:
    """All that may get a gradient, for one projection after the other."""
    found: list[Tensor | None] = []
    for _, _, bias, lora_A, lora_B, lora_bias, _, _, _ in projections:
        found += (bias, lora_A, lora_B, lora_bias)
    return found


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device: for products whose types are decided already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
