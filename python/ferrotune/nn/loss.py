"""The loss of a linear head as a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .. import ops

if TYPE_CHECKING:
    from torch import Tensor


class LinearCrossEntropyLoss(nn.Module):
    """``nn.CrossEntropyLoss`` of ``hidden·weightᵀ + bias``, without ever holding those logits.

    It has no parameters: the head's are given with each call. The arguments are those of
    `ops.linear_cross_entropy`, which raises what does not fit.

    Args:
        ignore_index: the label of tokens without a loss.
        label_smoothing: the part of a label that is spread over all classes, from 0 to 1.
        softcap: logits are ``softcap · tanh(logits / softcap)``; None: they are as they are.
        reduction: "mean" or "sum".
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.reduction = reduction

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of hidden ``[..., d]``, weight ``[V, d]``, labels ``[...]``, bias ``[V]``."""
        return ops.linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            reduction=self.reduction,
            num_items=num_items,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"softcap={self.softcap}, reduction={self.reduction!r}"
        )
