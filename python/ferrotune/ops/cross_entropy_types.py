"""What the parts of linear cross-entropy hand to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Head(NamedTuple):
    """``logits = x·weightᵀ + bias + h·lora_Bᵀ`` of V classes."""

    weight: Tensor  # [V, d]
    bias: Tensor | None = None  # [V]
    h: Tensor | None = None  # [m, r]: scaling · dropout(x) · lora_Aᵀ
    lora_B: Tensor | None = None  # [V, r]


class Settings(NamedTuple):
    """Of the loss of logits."""

    ignore_index: int
    label_smoothing: float
    softcap: float  # 0: none
    reduction: str  # "mean" or "sum"


class Gradients(NamedTuple):
    """Of the loss, or what has to be scaled to be that; None where none was asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    h: Tensor | None
    lora_B: Tensor | None


class Asked(NamedTuple):
    """Which gradients are."""

    hidden: bool
    weight: bool
    bias: bool
    h: bool
    lora_B: bool


class Facts(NamedTuple):
    """Of all rows, each a tensor of one element: nothing of them is read on the host.

    The gradient of the summed losses is ``multiplier · scale = 1 / divisor`` times too large: the
    logits' gradients are multiplied by the first, whose mantissa that is, before they are rounded;
    what is computed of them by the second, a power of two, which rounds nothing. So a gradient is
    rounded no more often than without this, and in float16 none vanishes in between.
    """

    divisor: Tensor
    multiplier: Tensor
    scale: Tensor


class Found(NamedTuple):
    """Of one call. Gradients of sums over the rows (weights, biases) are in float32."""

    loss: Tensor
    scale: Tensor  # that the gradients lack
    gradients: Gradients


LIFT = 64.0
"""By which float16 logits' gradients are larger: probabilities down to 1e-6 are normal numbers."""
OUT_OF_RANGE = "linear_cross_entropy: a label is neither ignore_index nor a class of the weight"
