"""Layers that share an input: run as one operation, with the masks of one seed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import ops
from . import four_bit, lora, runs
from .classes import Replaced
from .sharing import GIVEN, SHARED, Part, SharedSeed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


@contextmanager
def shared(members: Sequence[nn.Module | None]) -> Iterator[SharedSeed]:
    """Inside, the masks of ``members``, which are called in this order, are of one seed."""
    live = [(i, one) for i, one in enumerate(members) if isinstance(one, Replaced)]
    seed = next((found for _, one in live if (found := _of_dropouts(one))), None) or SharedSeed()
    for i, member in live:
        member.__dict__[SHARED] = (seed, i)
    try:
        yield seed
    finally:
        for _, member in live:
            member.__dict__.pop(SHARED, None)
            member.__dict__.pop(GIVEN, None)
        seed.end()


def _of_dropouts(layer: Any) -> SharedSeed | None:
    """What `index_dropout` gave the layer's own dropouts: PEFT's forward draws from it, too."""
    for dropout in getattr(layer, "lora_dropout", {}).values():
        if SHARED in dropout.__dict__:
            return dropout.__dict__[SHARED][0]  # type: ignore[no-any-return]
    return None


def run_ahead(members: Sequence[nn.Module | None], x: Any, seed: SharedSeed) -> None:
    """Runs the members that ferrotune replaced as one operation on x, where they can be.

    Each finds its output when it is called on x; one whose hooks change x runs by itself.
    """
    live = [(i, one) for i, one in enumerate(members) if isinstance(one, Replaced)]
    if len(live) < 2 or runs.not_for_ferrotune(x) is not None:
        return
    parts = together([(one, i) for i, one in live], x)
    if parts is None:
        return
    found = ops.lora_linear_group(
        x.to(parts[0].dtype), [part.projection for part in parts], seed=seed.draw(parts, x)
    )
    for (_, member), part, y in zip(live, parts, found, strict=True):
        member.__dict__[GIVEN] = (x, y if part.out is None else y.to(part.out))


def together(layers: Sequence[tuple[nn.Module, int]], x: Tensor) -> list[Part] | None:
    """Layers, each with its mask's stream, as one operation takes them; None where it cannot."""
    parts: list[Part] = []
    for layer, stream in layers:
        found = _part(layer, x, stream)
        if found is None or found.dtype != (parts or [found])[0].dtype:
            return None
        parts.append(found)
    return parts


def _part(layer: Any, x: Tensor, stream: int) -> Part | None:
    if isinstance(layer, lora.LoraForward):
        return lora.part(layer, x, stream)
    if isinstance(layer, four_bit.FourBitForward):
        return four_bit.part(layer, x, stream)
    return None
