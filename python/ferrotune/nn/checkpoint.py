"""A 4-bit weight under bitsandbytes' names in a state dict.

``weight`` holds the packed codes; below it ``absmax``, ``quant_map`` (the 16 values), with double
quantisation ``nested_absmax`` and ``nested_quant_map``, and ``quant_state.bitsandbytes__nf4`` (or
``__fp4``): the numbers as JSON, in the bytes of a uint8 tensor.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import torch

from .. import ops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_STATE = "quant_state.bitsandbytes__"
_TOLERANCE = 1e-6  # of a value of quant_map, as in bitsandbytes' own comparison
_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def to_tensors(quant: ops.Quant4bit) -> dict[str, Tensor]:
    """All but the packed codes, by their names below ``weight.``; reads the offset on the host."""
    device = quant.absmax.device
    numbers: dict[str, Any] = {
        "quant_type": quant.quant_type,
        "blocksize": quant.blocksize,
        "dtype": _name(quant.dtype),
        "shape": list(quant.shape),
    }
    found = {
        "absmax": quant.absmax,
        "quant_map": _quant_map(quant.quant_type).to(device, copy=True),
    }
    if quant.nested_absmax is not None:
        assert quant.nested_code is not None
        assert quant.nested_offset is not None
        offset = 0.0 if quant.nested_offset.is_meta else quant.nested_offset.item()
        numbers |= {
            "nested_blocksize": quant.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
        # Cloned, as layers may share it: safetensors refuses to store shared tensors.
        found |= {
            "nested_absmax": quant.nested_absmax,
            "nested_quant_map": quant.nested_code.clone(),
        }
    state = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8, device="cpu")
    found[_STATE + quant.quant_type] = state.to("meta") if device.type == "meta" else state
    return found


def from_tensors(packed: Tensor, tensors: Mapping[str, Tensor]) -> ops.Quant4bit:
    """A view of what ``to_tensors``, or bitsandbytes, wrote.

    Raises ``ValueError`` naming the tensor that is missing or does not fit.
    """
    states = [name for name in tensors if name.startswith(_STATE)]
    if len(states) != 1:
        raise ValueError(f"needs one tensor '{_STATE}nf4' or '{_STATE}fp4', has {states}")
    unknown = sorted(set(tensors) - {*_TENSORS, states[0]})
    if unknown:
        raise ValueError(f"has tensors that no 4-bit weight has: {unknown}")
    numbers = _numbers(states[0], tensors[states[0]])
    nested = "nested_blocksize" in numbers
    needed = _TENSORS if nested else _TENSORS[:2]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"lacks the tensors {missing}")
    quant_type = numbers["quant_type"]
    quant_map = tensors["quant_map"].cpu()
    wanted = _quant_map(quant_type)
    if quant_map.shape != wanted.shape or not torch.allclose(quant_map, wanted, 0, _TOLERANCE):
        raise ValueError(f"quant_map is not that of {quant_type}: {quant_map.tolist()}")
    offset = numbers["nested_offset"] if nested else None
    found = ops.Quant4bit(
        packed=packed,
        absmax=tensors["absmax"],
        nested_absmax=tensors["nested_absmax"] if nested else None,
        nested_code=tensors["nested_quant_map"] if nested else None,
        nested_offset=torch.tensor(offset, device=packed.device) if nested else None,
        quant_type=quant_type,
        blocksize=numbers["blocksize"],
        nested_blocksize=numbers["nested_blocksize"] if nested else 0,
        shape=tuple(numbers["shape"]),
        dtype=numbers["dtype"],
    )
    found.check()
    return found


def _numbers(key: str, state: Tensor) -> dict[str, Any]:
    kinds: dict[str, type] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    try:
        numbers = json.loads(bytes(state.cpu().tolist()))
        if "nested_blocksize" in numbers:
            kinds |= {"nested_blocksize": int, "nested_offset": float}
        for name, kind in kinds.items():
            if not isinstance(numbers[name], kind):
                raise ValueError(f"{name} is {numbers[name]!r}")
        if numbers["quant_type"] not in ("nf4", "fp4"):
            raise ValueError(f"quant_type is {numbers['quant_type']!r}")
        dtype = getattr(torch, numbers["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {numbers['dtype']!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{key} is not a quant state in JSON: {error!r}") from error
    return {**numbers, "dtype": dtype}


@functools.cache
def _quant_map(quant_type: str) -> Tensor:
    """The values of the codes 0 to 15, f32: a block with every code once and an absmax of 1."""
    codes = [(2 * i << 4) | (2 * i + 1) for i in range(8)]
    packed = torch.tensor(codes, dtype=torch.uint8, device="cpu")
    absmax = torch.ones(1, device="cpu")
    block = ops.Quant4bit(packed, absmax, None, None, None, quant_type, 32, 0, (16,), torch.float32)
    return ops.dequantize_4bit(block)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
