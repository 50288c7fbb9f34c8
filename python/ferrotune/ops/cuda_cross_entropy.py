"""The steps of linear cross-entropy by ferrotune's CUDA kernels, in one pass over a chunk's logits.

Nothing here waits for the device, so CUDA graphs capture it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _native
from .cross_entropy_types import LIFT, OUT_OF_RANGE, Facts
from .cuda import NAMES, address, raw_stream

if TYPE_CHECKING:
    from torch import Tensor

    from .cross_entropy_types import Settings

__all__ = ["chunk_rows", "kind", "prepare", "rows", "scale_gradient", "stride"]

WORKSPACE = 504 << 20
"""Bytes that a chunk's logits may take."""
_TILE, _HALF_TILE = 128, 64  # rows of a tile of cuBLAS's products
_FEWEST_ROWS = 1024  # with fewer, the products wait for the weight
_TILES_AREA = 128 * 128 * 256  # elements of the gradient of x, of as many tiles as there are SMs
_ALIGNMENT = 16  # bytes


def kind(x: Tensor) -> torch.dtype:
    return x.dtype


def stride(x: Tensor, classes: int) -> int:
    """Rows start at multiples of 16 bytes, which cuBLAS's products like, too."""
    elements = _ALIGNMENT // x.dtype.itemsize
    return -(-classes // elements) * elements


def chunk_rows(x: Tensor, classes: int, softcap: bool) -> int:
    """The fewest rows with which both products are efficient, of chunks of one size.

    The gradient of x sums over all classes, so its tiles alone keep the device busy: with rows for
    one of each SM, as far as `WORKSPACE` goes.
    """
    m, d = x.shape
    most = max(1, WORKSPACE // max(1, stride(x, classes) * x.dtype.itemsize))
    rows = min(max(_FEWEST_ROWS, _TILES_AREA // max(1, d)), most)
    chunks = -(-m // (rows // _TILE * _TILE or rows))
    even = -(-m // max(1, chunks))
    return min(most, -(-even // _HALF_TILE) * _HALF_TILE)


def prepare(
    labels: Tensor, classes: int, settings: Settings, x: Tensor, divisor: Tensor | None
) -> Facts:
    """A label that is out of range stops the device, as in PyTorch's own cross-entropy."""
    index = x.device.index
    facts = x.new_empty(4, dtype=torch.float32)
    divisor = None if divisor is None else divisor.float()
    _native.cuda_cross_entropy_prepare(
        index,
        raw_stream(index),
        _labels(labels, classes, settings),
        settings.reduction,
        address(divisor),
        LIFT if x.dtype == torch.float16 else 1.0,
        facts.data_ptr(),
    )
    torch._assert_async(facts[3], OUT_OF_RANGE)
    return Facts(facts[0], facts[1], facts[2])


def _labels(labels: Tensor, classes: int, settings: Settings) -> tuple[int, int, int, int]:
    return labels.data_ptr(), labels.shape[0], settings.ignore_index, classes


def rows(
    logits: Tensor, labels: Tensor, losses: Tensor, multiplier: Tensor | None, settings: Settings
) -> None:
    """As ``cross_entropy_reference.rows``, of rows of logits at multiples of 16 bytes."""
    index = logits.device.index
    _native.cuda_cross_entropy(
        index,
        raw_stream(index),
        logits.data_ptr(),
        NAMES[logits.dtype],
        logits.stride(0),
        _labels(labels, logits.shape[1], settings),
        settings.label_smoothing,
        settings.softcap,
        address(multiplier),
        losses.data_ptr(),
    )


def scale_gradient(gradient: Tensor, scale: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``cross_entropy_reference.scale_gradient``, without a copy in float32."""
    index = gradient.device.index
    gradient, grad = gradient.contiguous(), grad.float()
    if gradient.data_ptr() % _ALIGNMENT:
        gradient = gradient.clone()
    out = torch.empty_like(gradient, dtype=dtype)
    _native.cuda_scale_gradient(
        index,
        raw_stream(index),
        gradient.data_ptr(),
        NAMES[gradient.dtype],
        gradient.numel(),
        scale.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        NAMES[dtype],
    )
    return out
