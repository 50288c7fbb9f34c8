"""Memory of the CPU's operations that lasts from call to call, by thread.

The system would hand out large new memory page by page: slower than the work that is done in it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_BLOCK_BYTES = 2 << 20  # of a block of rows: what a core's caches hold
_FEWEST_ROWS = 16
_FEW = 1 << 14  # elements, for which the allocator has memory at hand


class _Scratch(threading.local):
    """As large as the largest that was asked for, by purpose and dtype."""

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}


_SCRATCH = _Scratch()


def scratch(purpose: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Unset memory on the CPU, valid until the thread's next call for this purpose and dtype."""
    elements = 1
    for size in shape:
        elements *= size
    flat = _SCRATCH.flat.get((purpose, dtype))
    if flat is None or flat.numel() < elements:
        with torch.inference_mode(False):
            flat = torch.empty(elements, dtype=dtype, device="cpu")
        _SCRATCH.flat[purpose, dtype] = flat
    return flat[:elements].view(tuple(shape))


def wide_rows(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """x ``[m, k]`` in ``dtype``, by blocks of rows: x itself, whole, if it is of that dtype.

    On the CPU the blocks of a large x share memory that stays in the caches: one is valid until the
    next.
    """
    if x.dtype == dtype or x.device.type != "cpu" or x.numel() <= _FEW:
        yield slice(None), x.to(dtype)
        return
    m, k = x.shape
    rows = max(_FEWEST_ROWS, _BLOCK_BYTES // max(1, k * dtype.itemsize))
    for start in range(0, m, rows):
        block = slice(start, min(start + rows, m))
        narrow = x[block]
        yield block, scratch("rows", narrow.shape, dtype).copy_(narrow)
