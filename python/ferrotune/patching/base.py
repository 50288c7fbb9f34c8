"""The frozen layer under an adapter: which kinds ferrotune reads, and when it may."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Quant4bit
from .classes import Replaced, defined_in, stock_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)


def is_dense(module: nn.Module) -> bool:
    """An ``nn.Linear``, or a subclass of it with its forward."""
    return type(module).forward is nn.Linear.forward


def is_conv1d(module: nn.Module) -> bool:
    """transformers' ``Conv1D`` (GPT-2): a linear layer that keeps W as ``[k, n]``."""
    return defined_in(type(module), "transformers.pytorch_utils", "Conv1D")


def is_4bit(module: nn.Module) -> bool:
    """bitsandbytes' ``Linear4bit``."""
    return defined_in(stock_of(module), "bitsandbytes.nn.modules", "Linear4bit")


def is_plain(tensor: Any) -> bool:
    """A dense tensor without behaviour of its own (no DTensor, no quantised subclass)."""
    return type(tensor) in _PLAIN


def is_sharded(tensor: Any) -> bool:
    """A DTensor: FSDP2 puts plain tensors in its place for the time of a forward."""
    return type(tensor).__name__ == "DTensor"


def is_bypassed(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return True
    return "forward" in own and not _only_moves_inputs(module)


def held(module: nn.Module, name: str) -> Any:
    """``getattr`` of a parameter or of a module inside, where it lies: ``nn.Module`` looks there
    last, which takes as long as a kernel's launch. None if it is not there."""
    own = module.__dict__
    for place in ("_parameters", "_modules"):
        if name in own[place]:
            return own[place][name]
    return getattr(module, name, None)


def _only_moves_inputs(module: nn.Module) -> bool:
    """accelerate's hook of a model spread over devices, where the weights stay in their place.

    It moves inputs to the weights' device; who skips it must see that they are there already.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and type(hook).__module__ == "accelerate.hooks"
        and not hook.offload
        and not hook.no_grad
    )


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the weights only for the time of the call."""
    return bool(getattr(module.__dict__.get("_hf_hook"), "offload", False))


def quant_of(base: Any, *, check: bool = True) -> Quant4bit | None:
    """The 4-bit weight where it lies; None where its bytes are not in the usual order.

    Raises ``ValueError`` if the quant state's tensors do not fit its shape, with ``check``.
    """
    weight = held(base, "weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        if getattr(base, "quant_state", None) is None:
            return None  # not quantised yet
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(base)  # FSDP loses the state of the parameter
        weight = base.weight
        state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return None  # bitsandbytes repacked it for inference on this CPU
    return Quant4bit.from_bitsandbytes(weight, state, check=check)


def dense_weight(base: Any, x: Tensor, autocast: bool) -> tuple[Tensor, Tensor | None] | None:
    """W ``[n, k]`` and bias of a frozen dense base that a product with x may use, else None."""
    dense = is_dense(base)
    if not dense and not is_conv1d(base):
        return None
    weight, bias = held(base, "weight"), held(base, "bias")
    if not is_plain(weight) or weight.requires_grad or weight.device != x.device:
        return None
    if autocast:
        if x.dtype == torch.float64:
            return None
    elif weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return None
    return (weight if dense else weight.t()), bias


def describe_base(base: nn.Module) -> str:
    """What the report calls it: ``Linear bfloat16``, ``Linear4bit nf4``."""
    name = stock_of(base).__name__
    weight: Any = getattr(base, "weight", None)
    if is_4bit(base):
        state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
        return f"{name} {getattr(state, 'quant_type', 'not quantised')}"
    if isinstance(weight, Tensor):
        return f"{name} {dtype_name(weight.dtype)}"
    return name


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_instance(module: object, where: str, name: str) -> bool:
    """``isinstance`` of a class of a module that need not be imported: then nothing is of it."""
    cls = getattr(sys.modules.get(where), name, None)
    return cls is not None and isinstance(module, cls)


def is_replaced(module: nn.Module) -> bool:
    return isinstance(module, Replaced)
