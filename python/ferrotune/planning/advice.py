"""What to change where a run does not fit, dearest last."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .memory import memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .memory import Level, Setup
    from .shapes import Shape

_MULTIPLE = 64  # tokens: a longest sequence is rounded down to it
_LONGEST = 1 << 24


@dataclass(frozen=True, slots=True)
class Change:
    """One change more, and the peak with all changes up to it, in bytes."""

    change: str
    peak: int
    fits: bool


def changes(
    shape: Shape, setup: Setup, available: float, levels: Sequence[Level] | None = None
) -> tuple[Change, ...]:
    """Changes in the order of what they cost, up to the one with which the run fits.

    All that there are where none does. ``levels`` are the blocks', as for `memory`.
    """
    found = []
    for text, changed in _changed(setup, levels is not None):
        peak = memory(shape, changed, levels).peak
        found.append(Change(text, peak, peak <= available))
        if peak <= available:
            break
    return tuple(found)


def _changed(setup: Setup, settled: bool) -> Iterator[tuple[str, Setup]]:
    def change(**values: Any) -> Setup:
        nonlocal setup
        setup = dataclasses.replace(setup, **values)
        return setup

    if not setup.fused_loss:
        yield "fused_loss=True: no logits of the whole batch", change(fused_loss=True)
    if setup.optimizer == "adamw" and setup.method == "full":
        yield "optimizer adamw_8bit: states of 1 byte", change(optimizer="adamw_8bit")
    while setup.batch_size > 1:
        half = max(1, setup.batch_size // 2)
        yield f"batch size {half}, with gradient accumulation", change(batch_size=half)
    if not (setup.checkpointing or settled):
        yield "gradient checkpointing: blocks are computed twice", change(checkpointing=True)
    if setup.method == "full":
        yield "method lora: the model itself is frozen", change(method="lora")
    if setup.method == "lora":
        yield "method qlora: the frozen model in 4 bits", change(method="qlora")


def longest_sequence(
    shape: Shape, setup: Setup, available: float, levels: Sequence[Level] | None = None
) -> int | None:
    """Tokens of the longest sequence with which the run fits, else None; ``levels`` as above."""

    def fits(length: int) -> bool:
        longer = dataclasses.replace(setup, sequence_length=length)
        return memory(shape, longer, levels).peak <= available

    low, high = 0, _LONGEST // _MULTIPLE  # multiples: the longest that fits, one that does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * _MULTIPLE) else (low, middle)
    return low * _MULTIPLE or None
