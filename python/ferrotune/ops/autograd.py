"""The eager path: one autograd node for a group of projections, straight to the backend."""

from __future__ import annotations

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

__all__ = ["apply", "as_rows"]

_WIDTH = 4  # bias, lora_A, lora_B and lora_bias of a projection may get gradients


class _LoraGroup(torch.autograd.Function):
    """Takes the seed and the projections, and by itself every tensor that may get a gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Tensor | None, Sequence[Projection]], x: Tensor, *_: Tensor | None
    ) -> tuple[Tensor, ...]:
        seed, projections = call
        backend = choose(x)
        laid_out = backend.laid_out(x)
        plan = backend.plan(laid_out, projections)
        with no_autocast(x):
            ys, hs = backend.forward(laid_out, projections, seed, plan)
        ctx.shape, ctx.backend, ctx.plan = x.shape, backend, plan
        # The frozen parts of a 4-bit weight are the layer's own memory. Everything else is saved:
        # autograd then sees writes to it, and its hooks (checkpointing, FSDP) may let go of it.
        ctx.frozen = [(one.quant, one.scaling, one.dropout_p, one.stream) for one in projections]
        ctx.save_for_backward(
            laid_out,
            seed,
            *hs,
            *[
                tensor
                for one in projections
                for tensor in (one.weight, one.bias, one.lora_A, one.lora_B, one.lora_bias)
            ],
        )
        ctx.set_materialize_grads(False)
        if x.dim() == ys[0].dim():
            return tuple(ys)
        return tuple([y.view(*x.shape[:-1], y.shape[1]) for y in ys])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return _once(ctx, *grads)
        return _backward(ctx, *grads)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    backend, frozen = ctx.backend, ctx.frozen
    count = len(frozen)
    x, seed, *saved = ctx.saved_tensors
    hs = saved[:count]
    projections = []
    at = count
    for quant, scaling, dropout_p, stream in frozen:
        weight, bias, lora_A, lora_B, lora_bias = saved[at : at + 5]
        at += 5
        projections.append(
            Projection(weight, quant, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, stream)
        )
    _, need_x, *asked = ctx.needs_input_grad
    bias, lora_A, lora_B, lora_bias = [tuple(asked[i::_WIDTH]) for i in range(_WIDTH)]
    need = Need(need_x, lora_A, lora_B, bias, lora_bias)
    laid_out = [None if grad is None else backend.laid_out(grad) for grad in grads]
    with no_autocast(x):
        found = backend.backward(laid_out, x, hs, projections, seed, need, ctx.plan)
    dx = found.x
    if dx is not None and dx.dim() != len(ctx.shape):
        dx = dx.view(ctx.shape)
    columns = (found.bias, found.lora_A, found.lora_B, found.lora_bias)
    return (None, dx, *[column[i] for i in range(count) for column in columns])


_once = once_differentiable(_backward)  # where a second derivative is prepared, to refuse it


def apply(x: Tensor, projections: Sequence[Projection], seed: Tensor | None) -> tuple[Tensor, ...]:
    """``y`` of every projection, ``[..., n]``."""
    tensors = [
        tensor
        for one in projections
        for tensor in (one.bias, one.lora_A, one.lora_B, one.lora_bias)
    ]
    return _LoraGroup.apply((seed, projections), x, *tensors)  # type: ignore[no-any-return]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device: for products whose types are decided already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
