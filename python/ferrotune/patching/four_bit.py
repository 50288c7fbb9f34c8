"""bitsandbytes' Linear4bit run by ferrotune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import ops
from ..ops.autograd import no_autocast
from . import runs
from .base import held, quant_of
from .classes import Replaced
from .given import Part, given_output

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class FourBitForward(Replaced):
    """``y = x·Wᵀ + bias`` in the layer's compute dtype; y in x's dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = given_output(self, x)
        if given is not None and not args and not kwargs:
            return given
        reason = "arguments besides the input" if args or kwargs else runs.not_for_ferrotune(x)
        quant = None if reason else readable(self, x)
        if reason is None and quant is None:
            reason = UNREADABLE
        runs.note(self, reason)
        if quant is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return product(self, quant, x)


UNREADABLE = (
    "its 4-bit weight is in bitsandbytes' packing for inference on this CPU or on another device, "
    "or the input is of another type or width"
)


def readable(base: Any, x: Tensor) -> ops.Quant4bit | None:
    """The weight, where x's dtype, device and width allow its use."""
    if x.dtype not in _FLOATS:
        return None
    quant = quant_of(base, check=False)  # patch did
    if quant is None or quant.packed.device != x.device or quant.shape[1] != x.shape[-1]:
        return None
    return quant


def compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    """The type bitsandbytes computes in; decided at the layer's first call if not set before."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype: torch.dtype | None = base.compute_dtype
    return x.dtype if dtype is None else dtype


def bias_as(base: Any, dtype: torch.dtype) -> Tensor | None:
    bias: Tensor | None = held(base, "bias")
    return None if bias is None else bias.to(dtype)


def part(layer: Any, x: Tensor) -> Part | None:
    """The layer for a group's call on x; None if it runs alone."""
    quant = readable(layer, x)
    if quant is None:
        return None
    dtype = compute_dtype(layer, x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
        return None  # bitsandbytes' product takes no part in autocast
    runs.note(layer, None)
    return Part(ops.Projection(quant=quant, bias=bias_as(layer, dtype)), dtype, x.dtype)


def product(base: Any, quant: ops.Quant4bit, x: Tensor) -> Tensor:
    """The layer alone, without adapter. bitsandbytes' product takes no part in autocast."""
    dtype = compute_dtype(base, x)
    with no_autocast(x):
        y = ops.lora_linear(x.to(dtype), quant, bias=bias_as(base, dtype))
    return y.to(x.dtype)
