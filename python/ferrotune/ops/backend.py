"""Which implementation runs an operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from . import reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from .types import Grads, Need, Projection, Quant4bit


class Backend(Protocol):
    """What `reference` does on every device; another one does the same, faster."""

    def forward(
        self, x: Tensor, projections: Sequence[Projection], seed: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """See `reference.forward`."""

    def saved(
        self, x: Tensor, projections: Sequence[Projection]
    ) -> list[tuple[tuple[int, int], torch.dtype] | None]:
        """See `reference.saved`: the form of the second list that `forward` returns."""

    def backward(
        self,
        grads: Sequence[Tensor | None],
        x: Tensor,
        hs: Sequence[Tensor | None],
        projections: Sequence[Projection],
        seed: Tensor | None,
        need: Need,
    ) -> Grads:
        """See `reference.backward`."""

    def quantize_4bit(
        self, values: Tensor, blocksize: int, quant_type: str, double_quant: bool
    ) -> Quant4bit:
        """See `reference.quantize_4bit`."""

    def dequantize_4bit(self, quant: Quant4bit, dtype: torch.dtype) -> Tensor:
        """See `reference.dequantize_4bit`."""


def choose(x: Tensor) -> Backend:
    """The implementation for tensors on x's device."""
    if x.is_cuda:
        from . import cuda, cuda_lora

        if cuda.usable(x.device.index):
            return cuda_lora
    return reference
