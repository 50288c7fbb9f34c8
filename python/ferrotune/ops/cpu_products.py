"""The native products with 4-bit weights on the CPU: which there are, and calls of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .. import _native, threads

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from .types import Projection, Quant4bit

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # what they take


@functools.cache
def unit() -> str | None:
    """What the native product runs on: "tiles", "wide" or "vectors"."""
    find = getattr(_native, "cpu_product_units", None)  # not in builds for other processors
    units: list[str] = [] if find is None else find()
    return next(iter(units), None)


def bias_of(projection: Projection) -> Tensor | None:
    """Both biases together, in float32."""
    bias, lora_bias = projection.bias, projection.lora_bias
    total = None if bias is None else bias.float()
    if lora_bias is not None and projection.lora_A is not None:
        scaled = lora_bias.float() * projection.scaling
        total = scaled if total is None else total + scaled
    return total


def product(
    out: Tensor,
    rows: Tensor,
    projection: Projection,
    narrow: Tensor | None,
    *,
    bias: Tensor | None = None,
    backward: bool = False,
    accumulate: bool = False,
) -> bool:
    """``rows·Wᵀ + narrow·Bᵀ + bias``, or backward ``rows·W + narrow·A``, to ``out``.

    False where the native product declines the values: ``out`` is then unspecified.
    """
    quant = projection.quant
    assert quant is not None
    term = None
    if narrow is not None:
        wide = projection.lora_A if backward else projection.lora_B
        assert wide is not None
        wide, narrow = wide.to(narrow.dtype).contiguous(), narrow.contiguous()
        names = NAMES[narrow.dtype]
        term = (names, narrow.shape[1], narrow.data_ptr(), wide.data_ptr())
    if bias is not None:
        bias = bias.contiguous()
    found = unit()
    assert found is not None
    threads.share_with_torch()
    return _native.cpu_product_at(
        found,
        backward,
        (rows.shape[0], quant.shape[0], quant.shape[1]),
        NAMES[rows.dtype],
        rows.data_ptr(),
        _weight(quant),
        term,
        0 if bias is None else bias.data_ptr(),
        accumulate,
        out.data_ptr(),
    )


def whole(
    out: Tensor | None,
    rows: Tensor,
    narrow: Tensor,
    projection: Projection,
    outer: list[tuple[int, int, int, int, bool]],
    *,
    bias: Tensor | None = None,
    backward: bool = False,
    accumulate: bool = False,
) -> bool:
    """`product` with the term, and ``narrow = scaling·rows·Aᵀ``, backward ``scaling·rows·B``.

    False as there, of ``out`` alone.
    """
    quant, lora_A, lora_B = projection.quant, projection.lora_A, projection.lora_B
    assert quant is not None
    assert lora_A is not None
    assert lora_B is not None
    first, second = lora_A.float().contiguous(), lora_B.float().contiguous()
    by, wide = (second, first) if backward else (first, second)
    if bias is not None:
        bias = bias.contiguous()
    found = unit()
    assert found is not None
    threads.share_with_torch()
    return _native.cpu_lora_at(
        found,
        backward,
        (rows.shape[0], quant.shape[0], quant.shape[1]),
        NAMES[rows.dtype],
        rows.data_ptr(),
        _weight(quant),
        (
            narrow.shape[1],
            narrow.data_ptr(),
            wide.data_ptr(),
            by.data_ptr(),
            float(projection.scaling),
        ),
        outer,
        0 if bias is None else bias.data_ptr(),
        accumulate,
        0 if out is None else out.data_ptr(),
    )


def _weight(quant: Quant4bit) -> Any:
    absmax, nested, code, offset = quant.absmax, quant.nested_absmax, quant.nested_code, 0.0
    if quant.nested_offset is not None:
        offset = quant.nested_offset.item()
    return (
        (quant.packed.data_ptr(), quant.packed.numel() * quant.packed.element_size()),
        (absmax.data_ptr(), absmax.numel()),
        (
            0 if nested is None else nested.data_ptr(),
            0 if nested is None else nested.numel(),
            0 if code is None else code.data_ptr(),
            offset,
            quant.nested_blocksize,
        ),
        (quant.quant_type, quant.blocksize, str(quant.dtype).removeprefix("torch.")),
    )
