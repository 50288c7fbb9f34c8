"""The truth to hold both models against: a copy of the stock one, all in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import ops
from .base import is_4bit, is_plain, quant_of
from .patcher import restore

if TYPE_CHECKING:
    from collections.abc import Iterator

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_SPARE = 2  # times the copy's weights that must be free, for its activations and gradients


def why_not(model: nn.Module) -> str | None:
    """Why a float64 copy does not fit, or None."""
    needed, device = 0, torch.device("cpu")
    layers: list[Any] = list(model.modules())
    for module in layers:
        if is_4bit(module):
            needed += 8 * module.in_features * module.out_features
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if not is_plain(parameter) and not is_4bit(module):
                return f"the model has a parameter of type {type(parameter).__name__}"
            device = parameter.device
            needed += 8 * parameter.numel()
    free = _free_bytes(device)
    if free is not None and needed * _SPARE > free:
        return f"it takes {needed * _SPARE / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return None


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    lines = (line.split() for line in info.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy with stock layers, 4-bit weights as dense ones, and every float in float64."""
    made = copy.deepcopy(model)
    restore(list(made.modules()))
    for module in list(made.modules()):
        for name, child in module.named_children():
            if is_4bit(child):
                setattr(module, name, _dense(child))
    return nn.Module.to(made, torch.float64)  # past transformers' refusal to cast 4-bit models


def _dense(layer: Any) -> nn.Linear:
    quant = quant_of(layer)
    if quant is None:
        raise NotImplementedError("a 4-bit weight in bitsandbytes' CPU inference packing")
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(ops.dequantize_4bit(quant).double(), requires_grad=False)
    made.bias = layer.bias
    made.training = layer.training
    return made


def float64_batch(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: float64_batch(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(float64_batch(value) for value in batch)
    return batch


class _Widen(TorchFunctionMode):
    """A model's own casts to a narrower type (norms, softmax, losses) go to float64."""

    _CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._CASTS:
            func = Tensor.double
        wide = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


@contextmanager
def in_float64(device: str) -> Iterator[None]:
    """What calls PyTorch's functions inside computes in float64 throughout."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast(device, enabled=False), _Widen():
            yield
    finally:
        torch.set_default_dtype(default)
