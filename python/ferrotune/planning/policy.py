"""What each block of a model keeps and what it recomputes, so that a step fits into memory.

Blocks give up what is cheapest to recompute first, each kind in all blocks before the next kind in
any (see `memory.LEVELS`). The first blocks come first: their backward is the last, when what the
others kept is gone, so that what they recompute finds room.

What waits on the host comes and goes while blocks are computed. So that no block waits for it, as
many blocks spill, evenly spread, as their copies take no longer than the forward.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .memory import CHECKPOINTS, LEVELS, Level, host_bytes, level_bytes, memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .memory import Memory, Setup
    from .shapes import Shape

MARGIN = 0.03  # of the peak: by what the memory model may be short
# Bytes that move in a block's forward, for an operation of its products: what PCI Express moves
# while a card computes (H100 and H200: 55 GB/s at 700 TFLOP/s; A100: 25 at 250).
_MOVED = 7.5e-5
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for end, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*")
_TEXTS: dict[Level, str] = {
    "keep": "keeps all",
    "elementwise": "recomputes norms and activations",
    "mlp": "recomputes its MLP",
    "spill": "recomputes its MLP, and the rest waits in the host's memory",
    "layer": "recomputes all from its input",
    "offload": "recomputes all from its input, which waits in the host's memory",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """The level of each block, from the first, and the step's memory with them (bytes)."""

    levels: tuple[Level, ...]
    kept: tuple[int, ...]
    """By each block, on the device, from its forward to its backward."""
    memory: Memory
    peak: int
    available: int
    fits: bool

    @property
    def counts(self) -> dict[Level, int]:
        """Blocks at each level that any is at, cheapest first."""
        found = Counter(self.levels)
        return {level: found[level] for level in LEVELS if found[level]}

    def __str__(self) -> str:
        each = dict(zip(self.levels, self.kept, strict=True))
        return "; ".join(
            f"{count} {'layer' if count == 1 else 'layers'}: {_TEXTS[level]}"
            f" ({size_text(each[level])}{'' if count == 1 else ' each'})"
            for level, count in self.counts.items()
        )


def choose(
    shape: Shape,
    setup: Setup,
    available: float,
    ladder: Sequence[Level] = LEVELS,
    lasting: tuple[int, int] | None = None,
) -> Policy:
    """The policy that recomputes least of those whose peak is at most ``available`` bytes.

    Where none fits, the smallest one.

    Args:
        ladder: the levels that the model's blocks can be at, cheapest first.
        lasting: bytes of weights, adapters and the optimiser's states, and of what is trained, if
            known better than by ``shape`` and ``setup``.
    """
    each = {level: level_bytes(shape, setup, level)[0] for level in ladder}
    least: Policy | None = None
    spilled = _spilled(shape, setup) if "spill" in ladder else []
    for levels in _policies(shape.layers, ladder, spilled):
        found = memory(shape, setup, levels)
        more = 0
        if lasting is not None:
            total, trained = lasting
            found = replace(found, gradients=trained, update=trained)
            more = total - found.weights - found.adapters - found.optimizer
        peak = found.peak + more
        kept = tuple(each[level] for level in levels)
        policy = Policy(levels, kept, found, peak, int(available), peak <= available)
        if policy.fits:
            return policy
        if least is None or peak <= least.peak:
            least = policy
    assert least is not None
    return least


def smallest(layers: int) -> tuple[Level, ...]:
    """The levels of the least memory."""
    *_, last, least = LEVELS
    return (least,) * (layers - 1) + (last,)


def _spilled(shape: Shape, setup: Setup) -> list[int]:
    """The blocks that may spill; the others' inputs may be moved as well. Not the last block: what
    it keeps is needed at once, and its way would be waited for."""
    operations = 2 * setup.tokens * sum(one.n * one.k for one in shape.linears)
    entry, whole = host_bytes(shape, setup, "offload"), host_bytes(shape, setup, "spill")
    part = min(1.0, max(0.0, (_MOVED * operations - entry) / (whole - entry)))
    count = min(shape.layers - 1, int(part * shape.layers))
    return [i * (shape.layers - 1) // count for i in range(count)]


def _policies(
    layers: int, ladder: Sequence[Level], spilled: Sequence[int]
) -> Iterator[tuple[Level, ...]]:
    """From the one that keeps the most on, one block further at a time."""
    now = [ladder[0]] * layers
    yield tuple(now)
    others = [i for i in range(layers) if i not in spilled]
    for level in ladder[1:]:
        if level == "spill":
            chosen = list(spilled)
        elif level in CHECKPOINTS:  # these reach blocks that spill last
            chosen = others
        else:
            chosen = list(range(layers))
        for i in chosen:
            if level == "offload" and i == layers - 1:
                continue  # as above: its input is needed at once
            now[i] = level
            yield tuple(now)
    for i in spilled:
        now[i] = "offload"
        yield tuple(now)


def size_of(size: str | float) -> int:
    """Bytes: of a number, or of a text as ``24 GiB``, ``20GB`` or ``20e9``.

    Raises ``ValueError`` for what is none, or not above 0.
    """
    number = math.nan
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.lower())
        if found is not None and found[2] in _UNITS and found[1].count(".") <= 1:
            number = float(found[1]) * _UNITS[found[2]] if found[1] != "." else math.nan
    elif not isinstance(size, bool):
        number = float(size)
    if not (math.isfinite(number) and number >= 1):
        raise ValueError(f"memory must be 'auto' or a size such as '24 GiB' or 20e9, not {size!r}")
    return int(number)


def size_text(number: float) -> str:
    """Bytes as a person reads them."""
    unit, name = (1 << 30, "GiB") if number >= 1 << 28 else (1 << 20, "MiB")
    return f"{number / unit:.2f} {name}"
