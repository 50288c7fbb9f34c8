"""The eager path: one autograd node for a group of projections, straight to the backend."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from . import flat
from .backend import choose
from .types import Need, Projection, Quant4bit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

_WIDTH = len(flat.TENSORS)
_NO_TENSORS: Any = (None,) * 5
_BIAS, _LORA_A, _LORA_B, _LORA_BIAS = (
    flat.TENSORS.index(name) for name in ("bias", "lora_A", "lora_B", "lora_bias")
)


class _LoraGroup(torch.autograd.Function):
    """Takes x, the seed, the projections (for their numbers), and all their tensors flat."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        projections: Sequence[Projection],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        rows = as_rows(x)
        with no_autocast(x):
            ys, hs = choose(x).forward(rows, projections, seed)
        ctx.projections = [without_tensors(projection) for projection in projections]
        ctx.shape = x.shape
        ctx.save_for_backward(rows, seed, *hs, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.projections)
        saved = ctx.saved_tensors
        rows, seed, hs, tensors = saved[0], saved[1], saved[2 : 2 + count], saved[2 + count :]
        projections = [
            with_tensors(projection, tensors[_WIDTH * i : _WIDTH * (i + 1)])
            for i, projection in enumerate(ctx.projections)
        ]
        asked = ctx.needs_input_grad[3:]
        need = Need(
            ctx.needs_input_grad[0],
            *(tuple(asked[i::_WIDTH]) for i in (_LORA_A, _LORA_B, _BIAS, _LORA_BIAS)),
        )
        flat_grads = [None if grad is None else as_rows(grad) for grad in grads]
        with no_autocast(rows):
            found = choose(rows).backward(flat_grads, rows, hs, projections, seed, need)
        result: list[Tensor | None] = [None] * (3 + _WIDTH * count)
        if found.x is not None:
            result[0] = found.x.view(ctx.shape)
        for place, column in (
            (_LORA_A, found.lora_A),
            (_LORA_B, found.lora_B),
            (_BIAS, found.bias),
            (_LORA_BIAS, found.lora_bias),
        ):
            result[3 + place :: _WIDTH] = column
        return tuple(result)


def apply(x: Tensor, projections: Sequence[Projection], seed: Tensor | None) -> tuple[Tensor, ...]:
    """``y`` of every projection, ``[..., n]``."""
    tensors = [tensor for projection in projections for tensor in flat.tensors(projection)]
    return _LoraGroup.apply(x, seed, projections, *tensors)  # type: ignore[no-any-return]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device: for products whose types are decided already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """``[m, k]``, contiguous: strides of expanded or transposed tensors end here."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def without_tensors(projection: Projection) -> Projection:
    """The numbers alone: tensors are kept by ``save_for_backward``."""
    quant = projection.quant
    return projection._replace(
        weight=None,
        quant=None if quant is None else _quant(_NO_TENSORS, quant),
        bias=None, lora_A=None, lora_B=None, lora_bias=None,
    )  # fmt: skip


def with_tensors(projection: Projection, tensors: Sequence[Any]) -> Projection:
    """The opposite of ``without_tensors``; ``tensors`` in the order of ``flat.TENSORS``."""
    quant = projection.quant
    if quant is not None:
        quant = _quant(tensors[1:6], quant)
    weight, bias, lora_A, lora_B, lora_bias = tensors[0], *tensors[6:]
    return projection._replace(
        weight=weight, quant=quant, bias=bias, lora_A=lora_A, lora_B=lora_B, lora_bias=lora_bias
    )


def _quant(tensors: Sequence[Any], numbers: Quant4bit) -> Quant4bit:
    packed, absmax, nested_absmax, nested_code, nested_offset = tensors
    return numbers._replace(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        nested_offset=nested_offset,
    )
