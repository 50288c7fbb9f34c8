"""The tensors of a 4-bit weight as a module holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import ops

if TYPE_CHECKING:
    from torch import Tensor


def kind_of(module: object) -> str:
    """The full name of a module's class, for errors."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def held_as(packed: Tensor, storage: torch.dtype) -> Tensor:
    """The same bytes, zeros appended up to a whole element, ``[elements, 1]``."""
    if packed.dtype == storage:
        return packed
    flat = packed.reshape(-1).view(torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % storage.itemsize))
    return flat.view(storage).unsqueeze(1)


def alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype


def unset(
    shape: tuple[int, int],
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    device: torch.device | str | int | None,
    dtype: torch.dtype,
) -> ops.Quant4bit:
    """The parts of a weight of this shape, with no values in them."""
    elements = shape[0] * shape[1]
    blocks = -(-elements // blocksize) if blocksize > 0 else 0
    nested = double_quant

    def empty(size: tuple[int, ...], kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, device=device, dtype=kind)

    return ops.Quant4bit(
        packed=empty((-(-elements // 2), 1), torch.uint8),
        absmax=empty((blocks,), torch.uint8 if nested else torch.float32),
        nested_absmax=empty((-(-blocks // 256),)) if nested else None,
        nested_code=empty((256,)) if nested else None,
        nested_offset=empty(()) if nested else None,
        quant_type=quant_type,
        blocksize=blocksize,
        nested_blocksize=256 if nested else 0,
        shape=shape,
        dtype=dtype,
    )
