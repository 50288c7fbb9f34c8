"""bitsandbytes' Linear4bit as a source: read where it lies. It is not imported for that."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from .. import ops

if TYPE_CHECKING:
    from torch import nn


def view(linear: nn.Module) -> ops.Quant4bit | None:
    """The weight of a quantised bitsandbytes layer; None if ``linear`` is none.

    Raises ``ValueError`` if its tensors do not fit its quant state.
    """
    if not _is_linear4bit(linear):
        return None
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        # FSDP replaces the parameter and loses its attributes: the layer holds the state as well.
        state = getattr(linear, "quant_state", None)
    if state is None:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked this weight for its CPU inference, which rounded its "
            "absmax: take the layer before its first evaluation on the CPU, or load it again"
        )
    return ops.Quant4bit.from_bitsandbytes(weight.data, state)


def settings(linear: nn.Module) -> dict[str, Any] | None:
    """With what a bitsandbytes layer that is not quantised yet would be; None for other layers."""
    if not _is_linear4bit(linear):
        return None
    weight: Any = linear.weight
    return {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "double_quant": weight.compress_statistics,
        "quant_storage": weight.quant_storage,
    }


def compute_dtype(linear: nn.Module) -> torch.dtype | None:
    """The type in which a bitsandbytes layer was told to compute."""
    # A layer that was told none notes the type of its first input there.
    if not _is_linear4bit(linear):
        return None
    found = linear.compute_dtype
    return found if isinstance(found, torch.dtype) else None


def _is_linear4bit(linear: nn.Module) -> bool:
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(linear, library.nn.Linear4bit)
