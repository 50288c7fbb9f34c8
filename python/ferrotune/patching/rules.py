"""Which modules ferrotune replaces, what must hold for them, and what they get instead.

A rule is all that `patch` knows of a kind of module; a further kind is one more rule in `RULES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import four_bit, lora, loss
from .base import (
    FLOATS,
    describe_base,
    dtype_name,
    is_4bit,
    is_bypassed,
    is_conv1d,
    is_dense,
    is_instance,
    is_offloaded,
    is_plain,
    is_sharded,
    quant_of,
)
from .block_rules import BLOCK_RULES
from .classes import Replaced, defined_in, stock_of
from .errors import PatchError, UnsupportedLayerError
from .report import FOUR_BIT, LORA, LOSS
from .rule import Rule

if TYPE_CHECKING:
    from torch import Tensor, nn


def rule_of(module: nn.Module, blocks: bool = False, fused_loss: bool = False) -> Rule | None:
    """The first that matches; those of `block_rules`, and of losses, if asked for, or where one was
    replaced before."""
    for rule in (*RULES, *BLOCK_RULES):
        asked = blocks if rule in BLOCK_RULES else fused_loss or rule.kind != LOSS
        if rule.matches(module) and (asked or isinstance(module, Replaced)):
            return rule
    return None


# ---- PEFT's LoRA layers

_FOUR_BIT_LORA = ("peft.tuners.lora.bnb", "Linear4bit")
_LINEAR_LORA = ("peft.tuners.lora.layer", "Linear")


def _is_lora(module: nn.Module) -> bool:
    return is_instance(module, "peft.tuners.lora.layer", "LoraLayer")


def _why_not_lora(layer: Any) -> str | None:
    stock = stock_of(layer)
    if not any(defined_in(stock, *place) for place in (_LINEAR_LORA, _FOUR_BIT_LORA)):
        what = _WHAT_IT_IS.get(stock.__name__, "a class")
        return f"lora.{stock.__name__} is {what} that ferrotune has no forward for"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance (a hook of accelerate, X-LoRA or the like)"
    if is_offloaded(layer.base_layer):
        return "its weights are offloaded: accelerate brings them for the time of a call"
    names = lora.active(layer) or list(layer.lora_A)
    return next((found for name in names if (found := lora.why_not_adapter(layer, name))), None)


_WHAT_IT_IS = {
    "Embedding": "an embedding",
    "Conv1d": "a convolution",
    "Conv2d": "a convolution",
    "Conv3d": "a convolution",
    "MultiheadAttention": "an attention layer",
    "ParamWrapper": "a LoRA on a bare parameter",
    "Linear8bitLt": "an 8-bit layer",
}


def _check_lora(name: str, layer: Any) -> None:
    base = layer.get_base_layer()
    if layer.merged:
        raise PatchError(
            f"{name}: adapter {', '.join(map(repr, layer.merged_adapters))} is merged into the "
            "weight; call unmerge_adapter() on the model first",
            name,
        )
    if is_4bit(base):
        _check_4bit(name, base)
    elif is_dense(base) or is_conv1d(base):
        _check_tensor(name, "base weight", base.weight)
    shape = (layer.out_features, layer.in_features)
    for adapter in layer.lora_A:
        lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
        _check_tensor(name, f"lora_A['{adapter}']", lora_A.weight)
        _check_tensor(name, f"lora_B['{adapter}']", lora_B.weight)
        r = layer.r[adapter]
        _check_shape(name, f"lora_A['{adapter}']", lora_A.weight, (r, shape[1]), "[r, k]")
        _check_shape(name, f"lora_B['{adapter}']", lora_B.weight, (shape[0], r), "[n, r]")
        if lora_B.bias is not None:
            _check_shape(name, f"lora_B['{adapter}'].bias", lora_B.bias, shape[:1], "[n]")
        device = getattr(getattr(base, "weight", None), "device", lora_A.weight.device)
        if lora_A.weight.device != device:
            raise UnsupportedLayerError(
                f"{name}: adapter '{adapter}' is on {lora_A.weight.device}, its base weight on "
                f"{device}; each layer must be on one device",
                name,
            )
    if is_dense(base) and is_plain(base.weight):
        _check_shape(name, "base weight", base.weight, shape, "[n, k]")
    elif is_conv1d(base) and is_plain(base.weight):
        _check_shape(name, "base weight", base.weight, shape[::-1], "[k, n]")


def _check_tensor(name: str, part: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise UnsupportedLayerError(
            f"{name}: {part} is on the meta device, without values; load the weights first", name
        )
    if tensor.dtype not in FLOATS:
        raise UnsupportedLayerError(
            f"{name}: {part} is {dtype_name(tensor.dtype)}; ferrotune computes in float32, "
            "float16 and bfloat16",
            name,
        )


def _check_shape(
    name: str, part: str, tensor: Tensor, expected: tuple[int, ...], meaning: str
) -> None:
    if tuple(tensor.shape) != expected:
        raise PatchError(
            f"{name}: {part} has shape {list(tensor.shape)}, but {meaning} of this layer is "
            f"{list(expected)}",
            name,
        )


def _describe_lora(layer: Any) -> str:
    return f"lora.{stock_of(layer).__name__} on {describe_base(layer.get_base_layer())}"


def _adapters(layer: Any) -> str:
    names = [*layer.lora_A] or [*layer.lora_embedding_A]
    active = set(layer.active_adapters)
    texts = []
    for name in names:
        text = f"{name} r={layer.r[name]}"
        dropout = getattr(layer.lora_dropout[name], "p", 0.0) if name in layer.lora_dropout else 0
        text += f" dropout={dropout:g}" if dropout else ""
        texts.append(text if name in active else f"{text} (inactive)")
    return ", ".join(texts)


def _notes_lora(layer: Any) -> str | None:
    """What of a replaced layer stays the libraries' own."""
    reasons = [lora.why_not_adapter(layer, name) for name in layer.lora_A]
    notes = [f"PEFT runs it where active: {reason}" for reason in reasons if reason]
    base = _why_not_base(layer.base_layer)
    if base is not None:
        notes.append(f"its base layer {base}, so it runs by itself; the LoRA term is ferrotune's")
    return "; ".join(notes) or None


def _why_not_base(base: Any) -> str | None:
    if is_bypassed(base):
        return "has hooks"
    if is_4bit(base):
        packed = _is_repacked(base)
        return "was repacked by bitsandbytes for inference on this CPU" if packed else None
    if not (is_dense(base) or is_conv1d(base)):
        return f"is a {type(base).__module__}.{type(base).__qualname__}"
    if not is_plain(base.weight) and not is_sharded(base.weight):
        return f"has a {type(base.weight).__name__} as weight"
    return "is trained" if base.weight.requires_grad else None


def _is_repacked(layer: Any) -> bool:
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    return bool(getattr(state, "packing_format_for_cpu", False))


# ---- bitsandbytes' 4-bit layers


def _why_not_4bit(layer: Any) -> str | None:
    if "forward" in layer.__dict__ and is_bypassed(layer):
        return "its forward is replaced on the instance (a hook of accelerate or the like)"
    if is_offloaded(layer):
        return "its weights are offloaded: accelerate brings them for the time of a call"
    if _is_repacked(layer):
        return "bitsandbytes repacked its weight for inference on this CPU"
    return None


def _check_4bit(name: str, layer: Any) -> None:
    weight = layer.weight
    if weight.device.type == "meta":
        _check_tensor(name, "4-bit weight", weight)
    state = getattr(weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise PatchError(
            f"{name}: its weight is not quantised yet; move the model to its device first", name
        )
    if _is_repacked(layer) or is_sharded(weight):
        return
    try:
        quant = quant_of(layer)
    except ValueError as error:
        raise PatchError(
            f"{name}: its 4-bit weight does not fit together: {error}", name
        ) from error
    shape = (layer.out_features, layer.in_features)
    if quant is not None and quant.shape != shape:
        raise PatchError(
            f"{name}: its 4-bit weight is {list(quant.shape)}, but the layer is {list(shape)}", name
        )
    if layer.bias is not None and tuple(layer.bias.shape) != shape[:1]:
        _check_shape(name, "bias", layer.bias, shape[:1], "[n]")


def _details_4bit(layer: Any) -> str:
    dtype = layer.compute_dtype
    return f"computes in {'its input type' if dtype is None else dtype_name(dtype)}"


RULES: list[Rule] = [
    Rule(
        kind=LORA,
        matches=_is_lora,
        why_not=_why_not_lora,
        check=_check_lora,
        describe=_describe_lora,
        details=_adapters,
        notes=_notes_lora,
        replacement=lora.LoraForward,
        product="LoRA linear",
    ),
    Rule(
        kind=FOUR_BIT,
        matches=is_4bit,
        why_not=_why_not_4bit,
        check=_check_4bit,
        describe=describe_base,
        details=_details_4bit,
        notes=lambda _: None,
        replacement=four_bit.FourBitForward,
        product="4-bit linear",
    ),
    Rule(
        kind=LOSS,
        matches=loss.is_causal_lm,
        why_not=loss.why_not,
        check=lambda _, __: None,
        describe=lambda model: stock_of(model).__name__,
        details=loss.details,
        notes=lambda _: "in training with labels, without logits",
        replacement=loss.CausalLMForward,
        product="linear cross-entropy",
    ),
]
