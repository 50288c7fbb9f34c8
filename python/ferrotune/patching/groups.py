"""Layers that share an input, run as one operation.

Every layer's mask has a seed of its own, drawn when the layer is called, so that stock, compiled
and patched models drop the same elements; a group has one seed, and is made where nothing is
dropped.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import ops
from . import four_bit, lora, runs
from .classes import Replaced
from .given import GIVEN, Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


@contextmanager
def run_ahead(members: Sequence[nn.Module | None], x: Any) -> Iterator[None]:
    """Runs the members that ferrotune replaced as one operation on x, where they can be.

    Inside, each finds its output when it is called on x; one whose hooks change x runs by itself.
    """
    live = [one for one in members if isinstance(one, Replaced)]
    parts = None
    if len(live) > 1 and runs.not_for_ferrotune(x) is None:
        parts = together(live, x)
    if parts is None:
        yield
        return
    projections = [part.projection for part in parts]
    found = ops.lora_linear_group(x.to(parts[0].dtype), projections)
    for member, part, y in zip(live, parts, found, strict=True):
        member.__dict__[GIVEN] = (x, y if part.out is None else y.to(part.out))
    try:
        yield
    finally:
        for member in live:
            member.__dict__.pop(GIVEN, None)


def together(layers: Sequence[nn.Module], x: Tensor, *, dropped: bool = False) -> list[Part] | None:
    """Layers as one operation on x takes them; None where it cannot, as with dropout unless the
    operation takes seeds of their own."""
    parts: list[Part] = []
    for layer in layers:
        found = _part(layer, x)
        if (
            found is None
            or (found.projection.dropout_p and not dropped)
            or found.dtype != (parts or [found])[0].dtype
        ):
            return None
        parts.append(found)
    return parts


def _part(layer: Any, x: Tensor) -> Part | None:
    if isinstance(layer, lora.LoraForward):
        return lora.part(layer, x)
    if isinstance(layer, four_bit.FourBitForward):
        return four_bit.part(layer, x)
    return None
