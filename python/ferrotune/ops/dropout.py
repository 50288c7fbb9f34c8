"""Dropout by masks that depend on a seed, a stream and the element's index alone.

Element i (row-major in ``[m, k]``) takes 16 bits of Philox4x32-7 (Salmon et al., 2011: the fewest
rounds that pass BigCrush), with the seed as key and ``(i // 8, stream)`` as counter; it is kept if
they are at least ``p·2¹⁶``, rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 0xFFFF_FFFF


def apply(values: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    """``mask · values / (1 − p)``, in the dtype of ``values``; a 2-D or flat tensor."""
    if not p:
        return values
    if seed is None:
        raise ValueError("dropout needs a seed: ops.dropout_seed(x)")
    if values.device.type != "cpu" or values.dtype == torch.float64:
        scale = mask(values.numel(), p, seed, stream).view_as(values)
        return (values * scale).to(values.dtype)
    from .. import _native

    wide = values.float().contiguous()
    out = torch.empty_like(wide)
    _native.dropout_at(
        wide.data_ptr(), out.data_ptr(), wide.numel(), p, int(seed.item()) % 2**64, stream
    )
    return out.to(values.dtype)


def mask(elements: int, p: float, seed: Tensor, stream: int) -> Tensor:
    """0 or 1/(1 − p), f32, ``[elements]``, on the seed's device."""
    if seed.device.type == "cpu":
        return apply(torch.ones(elements, dtype=torch.float32), p, seed, stream)
    if seed.is_cuda:
        from . import cuda

        if cuda.usable(seed.device.index):
            return cuda.dropout_mask(1, elements, p, seed, stream, torch.float32).view(elements)
    return mask_by_torch(elements, p, seed, stream)


def mask_by_torch(elements: int, p: float, seed: Tensor, stream: int) -> Tensor:
    """``mask`` in PyTorch's integers, on any device."""
    lanes = torch.arange(-(-elements // 8), device=seed.device)
    key = seed.reshape(())
    words = _philox(
        [lanes & _WORD, lanes >> 32, torch.full_like(lanes, stream), torch.zeros_like(lanes)],
        [key & _WORD, (key >> 32) & _WORD],
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    uniform = torch.stack(halves, dim=1).reshape(-1)[:elements]
    scale = torch.full((), _scale(p), dtype=torch.float32, device=seed.device)
    return torch.where(uniform >= round(p * 65_536), scale, torch.zeros_like(scale))


def _scale(p: float) -> float:
    """1/(1 − p) as f32 arithmetic gives it."""
    return float(1 / (1 - torch.tensor(p, dtype=torch.float32)))


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Seven rounds on 32-bit words held in int64."""
    for _ in range(7):
        low = _multiply(counter[0], 0xD251_1F53)
        high = _multiply(counter[2], 0xCD9E_8D57)
        counter = [
            high[0] ^ counter[1] ^ key[0],
            high[1],
            low[0] ^ counter[3] ^ key[1],
            low[1],
        ]
        key = [(key[0] + 0x9E37_79B9) & _WORD, (key[1] + 0xBB67_AE85) & _WORD]
    return counter


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 by 32 bit product, without leaving int64's positive range."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
