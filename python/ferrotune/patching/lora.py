"""PEFT's LoRA layers run by ferrotune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import ops
from . import four_bit, runs
from .base import (
    FLOATS,
    dense_weight,
    held,
    is_4bit,
    is_bypassed,
    is_dense,
    is_plain,
    is_sharded,
)
from .classes import Replaced
from .given import Part, given_output
from .masks import IndexDropout

if TYPE_CHECKING:
    from torch import Tensor

_DROPOUTS = (nn.Identity, nn.Dropout, IndexDropout)
_KEYWORDS = {"adapter_names", "alora_offsets"}  # PEFT's own; all others go to the base layer


class Adapter(NamedTuple):
    """One adapter of a layer, as ``ops.lora_linear`` takes it."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    lora_bias: Tensor | None
    dropout_p: float


class LoraForward(Replaced):
    """``y = base(x) + Σ scaling·(dropout(x)·Aᵀ·Bᵀ + lora_bias)`` over the active adapters.

    The base and the first adapter are one operation, further adapters are LoRA terms added to it.
    What is not plain LoRA runs through PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = given_output(self, x)
        if given is not None and not args and not kwargs:
            return given
        adapters = adapters_now(self, x, args, kwargs)
        if isinstance(adapters, str):
            runs.note(self, adapters)
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        runs.note(self, None)
        return _run(self, adapters, x)


def part(layer: Any, x: Tensor) -> Part | None:
    """The layer for a group's call on x; None if it runs alone."""
    adapters = adapters_now(layer, x, (), {})
    base = held(layer, "base_layer")
    if isinstance(adapters, str) or len(adapters) != 1 or is_bypassed(base):
        return None
    found = _part(base, adapters[0], x)
    if found is not None:
        runs.note(layer, None)
    return found


def adapters_now(
    layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Adapter] | str:
    """What this forward takes; or why it is PEFT's."""
    if layer.disable_adapters:
        return runs.DISABLED
    if kwargs and kwargs.get("adapter_names") is not None:
        return runs.MIXED
    if layer.merged:
        return runs.MERGED
    if args or (kwargs and not _KEYWORDS.issuperset(kwargs)):
        return "arguments for the base layer besides the input"
    names = active(layer)
    if not names:
        return runs.INACTIVE
    reason = runs.not_for_ferrotune(x)
    if reason is None and x.dtype not in FLOATS:
        reason = f"the input is {x.dtype}"
    if reason is not None:
        return reason
    autocast = torch.is_autocast_enabled(x.device.type)
    found = []
    for name in names:
        adapter = _read(layer, name)
        if isinstance(adapter, str):
            return adapter
        reason = _why_not_input(layer, name, adapter, x, autocast)
        if reason is not None:
            return reason
        found.append(adapter)
    return found


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    adapters = held(layer, "lora_A")._modules
    return [name for name in layer.active_adapters if name in adapters]


def why_not_adapter(layer: Any, name: str) -> str | None:
    """Why an adapter of the layer is not ferrotune's, whatever the input."""
    found = _read(layer, name, between=True)
    return found if isinstance(found, str) else None


def _read(layer: Any, name: str, *, between: bool = False) -> Adapter | str:
    """The adapter if it is plain LoRA, else what it is; ``between`` forwards it may be sharded."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant).__name__ not in _PLAIN_VARIANTS:
        return f"adapter '{name}' is {_variant_name(variant)}, not plain LoRA"
    parts = layer._modules
    lora_A = parts["lora_A"]._modules[name]
    lora_B = parts["lora_B"]._modules[name]
    dropout = parts["lora_dropout"]._modules[name]
    weights: list[Any] = []
    for part, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        weight = held(module, "weight")
        if not is_dense(module) or not (is_plain(weight) or (between and is_sharded(weight))):
            return f"{part}['{name}'] is no plain nn.Linear ({type(weight).__name__})"
        if is_bypassed(module):
            return f"{part}['{name}'] has hooks or a forward of its own"
        weights.append(weight)
    if held(lora_A, "bias") is not None:
        return f"lora_A['{name}'] has a bias"
    if type(dropout) not in _DROPOUTS:
        return f"lora_dropout['{name}'] is a {type(dropout).__name__}"
    if is_bypassed(dropout):
        return f"lora_dropout['{name}'] has hooks or a forward of its own"
    scaling = layer.scaling[name]
    if not isinstance(scaling, (int, float)):
        return f"the scaling of adapter '{name}' is a {type(scaling).__name__}"
    # nn.Identity has no p; outside training nothing is dropped.
    p = dropout.p if dropout.training and type(dropout) is not nn.Identity else 0.0
    return Adapter(weights[0], weights[1], scaling, held(lora_B, "bias"), p)


def _why_not_input(
    layer: Any, name: str, adapter: Adapter, x: Tensor, autocast: bool
) -> str | None:
    A, B = adapter.lora_A, adapter.lora_B
    if A.device != x.device or B.device != x.device:
        return f"adapter '{name}' is on {A.device}, the input on {x.device}"
    if autocast:
        return None
    if A.dtype != B.dtype:
        return f"lora_A['{name}'] is {A.dtype}, lora_B {B.dtype}"
    if A.dtype != x.dtype and not layer.cast_input_dtype_enabled:
        return "casting of the input is off (disable_input_dtype_casting)"
    return None


_PLAIN_VARIANTS = {"MiCALinearVariant"}  # differs in its start and in what is trained alone
_VARIANTS = {
    "ALoraLinearVariant": "aLoRA",
    "ArrowLinearVariant": "Arrow",
    "BdLoraLinearVariant": "BD-LoRA",
    "DoraLinearVariant": "DoRA",
    "KasaLinearVariant": "KaSA",
    "MontecloraLinearVariant": "MonteCLoRA",
    "VeloraLinearVariant": "VeLoRA",
}


def _variant_name(variant: object) -> str:
    return _VARIANTS.get(type(variant).__name__, type(variant).__name__)


def _run(layer: Any, adapters: list[Adapter], x: Tensor) -> Tensor:
    base = held(layer, "base_layer")
    first, *others = adapters
    y = None if is_bypassed(base) else _base_with(base, first, x)
    if y is None:
        y = base(x)
        others = adapters
    dtype = y.dtype
    for adapter in others:
        y = y + _term(adapter, x)
    return y.to(dtype)


def _base_with(base: Any, adapter: Adapter, x: Tensor) -> Tensor | None:
    """The base layer and one adapter as one operation; None where the base must run by itself."""
    found = _part(base, adapter, x)
    if found is not None:
        (y,) = ops.lora_linear_group(x.to(found.dtype), [found.projection])
        return y if found.out is None else y.to(found.out)
    quant = four_bit.readable(base, x) if is_4bit(base) else None
    if quant is None:
        return None
    # The adapter is not rounded to a compute dtype that is the base's alone.
    return (four_bit.product(base, quant, x) + _term(adapter, x)).to(x.dtype)


def _part(base: Any, adapter: Adapter, x: Tensor) -> Part | None:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if not is_4bit(base):
        dense = dense_weight(base, x, autocast is not None)
        if dense is None:
            return None
        weight, bias = dense
        return Part(_projection(adapter, weight, None, bias), x.dtype, None)
    quant = four_bit.readable(base, x)
    if quant is None:
        return None
    dtype = four_bit.compute_dtype(base, x)
    if autocast is not None:
        together = dtype == autocast
    else:
        together = torch.promote_types(x.dtype, dtype) == dtype
    if not together:
        return None
    bias = four_bit.bias_as(base, dtype)
    return Part(_projection(adapter, None, quant, bias), dtype, x.dtype)


def _projection(
    adapter: Adapter,
    weight: Tensor | None = None,
    quant: ops.Quant4bit | None = None,
    bias: Tensor | None = None,
) -> ops.Projection:
    lora_A, lora_B, scaling, lora_bias, dropout_p = adapter
    return ops.Projection(weight, quant, bias, lora_A, lora_B, lora_bias, scaling, dropout_p)


def _term(adapter: Adapter, x: Tensor) -> Tensor:
    """The LoRA term alone, in the wider of x's and the adapter's dtypes."""
    wide = torch.promote_types(x.dtype, adapter.lora_A.dtype)
    return ops.lora_linear_group(x.to(wide), [_projection(adapter)])[0]
