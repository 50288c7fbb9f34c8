"""PEFT's LoRA layers run by ferrotune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import ops
from . import four_bit, runs
from .base import FLOATS, dense_weight, is_4bit, is_bypassed, is_dense, is_plain
from .classes import Replaced
from .masks import IndexDropout

if TYPE_CHECKING:
    from torch import Tensor

_DROPOUTS = (nn.Identity, nn.Dropout, IndexDropout)
_KEYWORDS = {"adapter_names", "alora_offsets"}  # PEFT's own; all others go to the base layer


class LoraForward(Replaced):
    """``y = base(x) + Σ scaling·(dropout(x)·Aᵀ·Bᵀ + lora_bias)`` over the active adapters.

    The base and the first adapter are one operation, further adapters are LoRA terms added to it.
    What is not plain LoRA runs through PEFT's own forward.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = _why_not_now(self, x, args, kwargs)
        runs.note(self, reason)
        if reason is not None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        return _run(self, x)


def _why_not_now(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if layer.disable_adapters:
        return runs.DISABLED
    if kwargs.get("adapter_names") is not None:
        return runs.MIXED
    if layer.merged:
        return runs.MERGED
    if args or not _KEYWORDS.issuperset(kwargs):
        return "arguments for the base layer besides the input"
    names = active(layer)
    if not names:
        return runs.INACTIVE
    reason = runs.not_for_ferrotune(x)
    if reason is None and x.dtype not in FLOATS:
        reason = f"the input is {x.dtype}"
    return reason or next(
        (found for name in names if (found := why_not_adapter(layer, name, x))), None
    )


def active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    adapters = layer.lora_A
    return [name for name in layer.active_adapters if name in adapters]


def why_not_adapter(layer: Any, name: str, x: Tensor | None = None) -> str | None:
    """Why an adapter of the layer is not ferrotune's, in words that follow "PEFT runs it:"."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant).__name__ not in _PLAIN_VARIANTS:
        return f"adapter '{name}' is {_variant_name(variant)}, not plain LoRA"
    lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    for part, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not is_dense(module) or not is_plain(module.weight):
            return f"{part}['{name}'] is no plain nn.Linear ({type(module.weight).__name__})"
        if is_bypassed(module):
            return f"{part}['{name}'] has hooks or a forward of its own"
    if lora_A.bias is not None:
        return f"lora_A['{name}'] has a bias"
    if type(dropout) not in _DROPOUTS:
        return f"lora_dropout['{name}'] is a {type(dropout).__name__}"
    if is_bypassed(dropout):
        return f"lora_dropout['{name}'] has hooks or a forward of its own"
    if not isinstance(layer.scaling[name], (int, float)):
        return f"the scaling of adapter '{name}' is a {type(layer.scaling[name]).__name__}"
    return None if x is None else _why_not_input(layer, name, lora_A.weight, lora_B.weight, x)


def _why_not_input(layer: Any, name: str, A: Tensor, B: Tensor, x: Tensor) -> str | None:
    if A.device != x.device or B.device != x.device:
        return f"adapter '{name}' is on {A.device}, the input on {x.device}"
    if torch.is_autocast_enabled(x.device.type):
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


def _run(layer: Any, x: Tensor) -> Tensor:
    first, *others = active(layer)
    y = _base_with(layer, first, x)
    if y is None:
        y = layer.base_layer(x)
        others.insert(0, first)
    dtype = y.dtype
    for name in others:
        y = y + _term(layer, name, x)
    return y.to(dtype)


def _base_with(layer: Any, name: str, x: Tensor) -> Tensor | None:
    """The base layer and one adapter as one operation; None where the base must run by itself."""
    base = layer.base_layer
    if is_bypassed(base):
        return None
    if is_4bit(base):
        return _base_4bit_with(layer, name, x)
    weight = dense_weight(base, x)
    if weight is None:
        return None
    return ops.lora_linear(x, weight, bias=base.bias, **_adapter(layer, name))


def _base_4bit_with(layer: Any, name: str, x: Tensor) -> Tensor | None:
    base = layer.base_layer
    quant = four_bit.readable(base, x)
    if quant is None:
        return None
    dtype = four_bit.compute_dtype(base, x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        together = dtype == torch.get_autocast_dtype(kind)
    else:
        together = torch.promote_types(x.dtype, dtype) == dtype
    if not together:  # the adapter is not rounded to a compute dtype that is the base's alone
        return (four_bit.product(base, quant, x) + _term(layer, name, x)).to(x.dtype)
    bias = four_bit.bias_as(base, dtype)
    y = ops.lora_linear(x.to(dtype), quant, bias=bias, **_adapter(layer, name))
    return y.to(x.dtype)


def _term(layer: Any, name: str, x: Tensor) -> Tensor:
    """The LoRA term alone, in the wider of x's and the adapter's dtypes."""
    wide = torch.promote_types(x.dtype, layer.lora_A[name].weight.dtype)
    return ops.lora_linear(x.to(wide), None, **_adapter(layer, name))


def _adapter(layer: Any, name: str) -> dict[str, Any]:
    lora_B, dropout = layer.lora_B[name], layer.lora_dropout[name]
    # Identity has no p; a dropout outside training drops nothing.
    dropped = dropout.p if dropout.training and type(dropout) is not nn.Identity else 0.0
    return {
        "lora_A": layer.lora_A[name].weight,
        "lora_B": lora_B.weight,
        "scaling": layer.scaling[name],
        "lora_bias": lora_B.bias,
        "dropout_p": dropped,
    }
