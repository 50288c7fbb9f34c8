"""The steps of linear cross-entropy by ferrotune's CUDA kernels, in one pass over a chunk's logits.

Nothing here waits for the device, so CUDA graphs capture it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import _native, chunks
from .cross_entropy_types import LIFT, OUT_OF_RANGE, Facts
from .cuda import NAMES, address, raw_stream

if TYPE_CHECKING:
    from torch import Tensor

    from .cross_entropy_types import Settings

__all__ = ["chunk_rows", "kind", "prepare", "rows", "scale_gradient", "stride"]

_ALIGNMENT = 16  # bytes


def kind(x: Tensor) -> torch.dtype:
    return x.dtype


def stride(x: Tensor, classes: int) -> int:
    """Rows start at multiples of 16 bytes, which cuBLAS's products like, too."""
    elements = _ALIGNMENT // x.dtype.itemsize
    return -(-classes // elements) * elements


def chunk_rows(x: Tensor, classes: int, softcap: bool) -> int:
    m, d = x.shape
    return chunks.chunk_rows(m, d, stride(x, classes) * x.dtype.itemsize)


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
