"""Which implementation runs an operation."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

from . import reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from .types import Grads, Need, Projection, Quant4bit


class Backend(Protocol):
    """What `reference` does on every device; another one does the same, faster."""

    def laid_out(self, x: Tensor) -> Tensor:
        """See `reference.laid_out`: x or a gradient as `forward` and `backward` take it."""

    def plan(self, x: Tensor, projections: Sequence[Projection]) -> Any:
        """See `reference.plan`."""

    def forward(
        self,
        x: Tensor,
        projections: Sequence[Projection],
        seed: Tensor | None,
        how: Any = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """See `reference.forward`; ``how`` is their plan, made now if None."""

    def gated(
        self,
        x: Tensor,
        projections: Sequence[Projection],
        activation: str,
        seed: Tensor | None,
        how: Any,
    ) -> tuple[list[Tensor], Tensor, list[Tensor | None]] | None:
        """What `forward` returns of gate and up, between the two lists ``activation(gate)·up``;
        None where nothing does all of it at once."""

    def ranks(
        self,
        x: Tensor,
        projections: Sequence[Projection],
        seed: Tensor | None,
        how: Any = None,
    ) -> list[Tensor | None]:
        """The second list that `forward` returns, alone."""

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
        how: Any = None,
    ) -> Grads:
        """See `reference.backward`; ``how`` is the plan that forward ran by."""

    def quantize_4bit(
        self, values: Tensor, blocksize: int, quant_type: str, double_quant: bool
    ) -> Quant4bit:
        """See `reference.quantize_4bit`."""

    def dequantize_4bit(self, quant: Quant4bit, dtype: torch.dtype) -> Tensor:
        """See `reference.dequantize_4bit`."""


def choose(x: Tensor) -> Backend:
    """The implementation for tensors on x's device."""
    if x.is_cuda:
        return _on_cuda(x.device.index)
    return _on_cpu() if x.device.type == "cpu" else reference


@functools.cache
def _on_cuda(index: int) -> Backend:
    from . import cuda, cuda_lora

    return cuda_lora if cuda.usable(index) else reference


@functools.cache
def _on_cpu() -> Backend:
    from . import cpu_lora

    return cpu_lora if cpu_lora.usable() else reference
