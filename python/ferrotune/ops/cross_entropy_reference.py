"""The steps of linear cross-entropy by PyTorch, on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .cross_entropy_types import LIFT, OUT_OF_RANGE, Facts
from .products import product_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from .cross_entropy_types import Settings

__all__ = ["chunk_rows", "kind", "prepare", "rows", "scale_gradient", "stride"]

_WORKSPACE = {"cpu": 128 << 20}  # bytes, of a chunk's logits and what is computed beside them
_WORKSPACE_ELSEWHERE = 500 << 20


def kind(x: Tensor) -> torch.dtype:
    """The type of the products and so of the logits."""
    return product_dtype(x)


def stride(x: Tensor, classes: int) -> int:
    """Elements between two rows of logits."""
    return classes


def chunk_rows(x: Tensor, classes: int, softcap: bool) -> int:
    """How many rows of x ``[m, d]`` are taken at a time."""
    wide = torch.promote_types(kind(x), torch.float32)
    copies = 2 + softcap  # the logits in `wide`, what sums take, and tanh
    most = _WORKSPACE.get(x.device.type, _WORKSPACE_ELSEWHERE)
    return max(1, most // max(1, classes * (kind(x).itemsize + copies * wide.itemsize)))


def prepare(
    labels: Tensor, classes: int, settings: Settings, x: Tensor, divisor: Tensor | None
) -> Facts:
    """Checks the labels ``[m]``; on other devices than the CPU they are checked there, later."""
    wide = torch.promote_types(x.dtype, torch.float32)
    counted = labels != settings.ignore_index
    bad = counted & ((labels < 0) | (labels >= classes))
    if labels.device.type == "cpu":
        if bad.any():
            label = int(labels[bad][0])
            raise IndexError(
                f"label {label} is neither ignore_index ({settings.ignore_index}) nor one of the "
                f"{classes} classes that the weight has rows for"
            )
    else:
        torch._assert_async(~bad.any(), OUT_OF_RANGE)
    count = counted.sum()
    if divisor is None:
        divisor = count if settings.reduction == "mean" else torch.ones_like(count)
    divisor = divisor.to(wide)
    inverse = divisor.reciprocal()
    finite = inverse.isfinite()
    mantissa, exponent = torch.frexp(torch.where(finite, inverse, 1.0))
    lift = LIFT if x.dtype == torch.float16 else 1.0
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    scale = torch.where(finite, scale, torch.where(count == 0, 0.0, inverse))
    return Facts(divisor, mantissa * lift, scale / lift)


def rows(
    logits: Tensor, labels: Tensor, losses: Tensor, multiplier: Tensor | None, settings: Settings
) -> None:
    """Writes the losses ``[rows]``, and over the logits ``[rows, V]`` their gradient."""
    ignore_index, smoothing, softcap, _ = settings
    classes = logits.shape[1]
    found = logits.to(losses.dtype)
    if softcap:
        tangent = (found / softcap).tanh_()
        found = tangent * softcap
    ignored = labels == ignore_index
    places = labels.masked_fill(ignored, 0).unsqueeze(1)
    normaliser = torch.logsumexp(found, 1)
    loss = normaliser - found.gather(1, places).squeeze(1)
    if smoothing:
        loss += smoothing * (normaliser - found.mean(1) - loss)
    losses.copy_(loss.masked_fill_(ignored, 0))
    if multiplier is None:
        return
    found.sub_(normaliser.unsqueeze(1)).exp_()
    if smoothing:
        found.sub_(smoothing / classes)
    found.scatter_add_(1, places, found.new_full(places.shape, smoothing - 1))
    if softcap:
        found.mul_(tangent.square_().neg_().add_(1))
    found.mul_(multiplier).masked_fill_(ignored.unsqueeze(1), 0)
    if found is not logits:
        logits.copy_(found)


def scale_gradient(gradient: Tensor, scale: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient · scale · grad``, rounded once to ``dtype``."""
    return (gradient.to(scale.dtype) * (scale * grad)).to(dtype)
