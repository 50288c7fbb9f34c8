"""Products of few rows by 4-bit weights, dequantised within the one kernel that writes them.

What decoding does, a token or a few at a time, and short batches: y with its LoRA term and its
biases, and H for backward, in one launch. Of a frozen 4-bit weight no dense copy is made.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .. import _native
from . import cuda
from .cuda import NAMES, address

if TYPE_CHECKING:
    from torch import Tensor

    from .types import Projection

Division = tuple[int, int, int]  # as native calls take it

_ALIGNMENT = 16  # bytes, of what the kernel loads at once
_HALVES = (torch.float16, torch.bfloat16)

# Rows of x up to which the kernel was the faster one, beside dequantising and a dense product; the
# second without an adapter, for which there are launches more, and of weights of fewer elements.
_LARGE = 1 << 24
_MOST_ROWS, _MOST_ROWS_OF_SMALL = 64, 32

# (n, k) of weights for which it is up to another number; benches/cuda_small.py --tune prints it.
CROSSOVERS: dict[tuple[int, int], int] = {}


def division(x: Tensor, m: int, projection: Projection, use: str) -> Division | None:
    """How the kernel divides x ``[m, k]`` by a projection; None where another path is to run.

    ``use`` is "auto", where it is expected to be the faster one; "always", where it can run at all;
    or "never".
    """
    quant, bias, p = projection.quant, projection.bias, projection.dropout_p
    if use == "never" or quant is None or p or m == 0 or x.dtype not in _HALVES:
        return None
    if quant.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return None
    n, k = projection.shape
    large = projection.lora_A is not None or n * k >= _LARGE
    most = _MOST_ROWS if large else _MOST_ROWS_OF_SMALL
    if use == "auto" and m > CROSSOVERS.get((n, k), most):
        return None
    planes = parts_of_adapter(x, projection)
    if planes == 0 or (x.data_ptr() | quant.packed.data_ptr()) % _ALIGNMENT:
        return None
    if any(part is not None and part.device != x.device for part in quant.tensors):
        raise ValueError(f"the parts of a 4-bit weight must all be on {x.device}")
    return _division(x.device.index, m, n, k, projection.rank, planes)


def parts_of_adapter(x: Tensor, projection: Projection) -> int:
    """1, or 3 where the adapter is float32; 0 where the kernel does not take it."""
    lora_A, lora_B, lora_bias = projection.lora_A, projection.lora_B, projection.lora_bias
    if lora_A is None or lora_B is None:
        return int(lora_bias is None)
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in (x.dtype, torch.float32):
        return 0
    if lora_bias is not None and lora_bias.dtype not in NAMES:
        return 0
    if lora_A.shape[0] == 0 or (lora_A.is_contiguous() and lora_A.data_ptr() % _ALIGNMENT):
        return 0
    return 1 if lora_A.dtype == x.dtype else 3


@functools.lru_cache(maxsize=4096)
def _division(index: int, m: int, n: int, k: int, r: int, planes: int) -> Division | None:
    return _native.cuda_small_division(index, (m, n, k, r, planes))


def run(
    x: Tensor,
    m: int,
    projection: Projection,
    how: Division,
    y: Tensor,
    h: Tensor | None = None,
    column: int = 0,
    columns: int = 0,
    *,
    ranks_alone: bool = False,
) -> None:
    """Writes y ``[m, n]``, and to H ``[m, parts · columns]`` from ``column`` on.

    With ``ranks_alone`` y is ``[m, 1]``: the same H, by no more than one row of the weight.
    """
    weight, lora_A, lora_B = projection.quant, projection.lora_A, projection.lora_B
    bias, lora_bias = projection.bias, projection.lora_bias
    assert weight is not None
    numbers, _offset = cuda.parts(weight)
    n, k = weight.shape
    if ranks_alone:
        n = 1
    bias = None if bias is None else bias.contiguous()
    index, kind = x.device.index, x.dtype
    adapter = None
    r, planes = 0, 1
    if lora_A is not None and lora_B is not None:
        r, planes = lora_A.shape[0], 1 if lora_A.dtype == kind else 3
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        lora_bias = None if lora_bias is None else lora_bias.contiguous()
        out = (0, 0, 0)
        if h is not None:
            out = (h.data_ptr() + column * kind.itemsize, planes * columns, columns)
        adapter = (
            (lora_A.data_ptr(), lora_B.data_ptr()),
            (address(lora_bias), NAMES[kind if lora_bias is None else lora_bias.dtype]),
            projection.scaling,
            out,
        )
    _native.cuda_small_linear(
        index,
        cuda.raw_stream(index),
        NAMES[kind],
        (m, n, k, r, planes),
        how,
        (x.data_ptr(), y.data_ptr(), address(bias)),
        numbers,
        adapter,
    )
