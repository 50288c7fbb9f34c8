"""What layers that share an input leave for each other while the block around them runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .. import ops

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# What such a layer finds in its `__dict__`: the input and output of a call that was made for it
# already; where the seed of its masks comes from, and its place in the group.
GIVEN = "_ferrotune_given"
SHARED = "_ferrotune_shared"


class Part(NamedTuple):
    """A layer as a group's operation takes it."""

    projection: ops.Projection
    dtype: torch.dtype  # that x is cast to before
    out: torch.dtype | None  # that y is cast to; None: as it comes
    adapter: str  # its name; "" without


class SharedSeed:
    """One draw of PyTorch's generator for all masks of a group: each member has its own stream.

    Members come in the order of their places; one that does not come after the last begins a new
    round, of a new seed.
    """

    def __init__(self) -> None:
        self._rounds: dict[str, tuple[Tensor, int]] = {}

    def take(self, adapter: str, place: int, x: Tensor) -> Tensor:
        """The seed for the member at ``place``, whose stream is ``place``."""
        seed, last = self._rounds.get(adapter, (None, place))
        if seed is None or place <= last:
            seed = ops.dropout_seed(x)
        self._rounds[adapter] = (seed, place)
        return seed

    def draw(self, parts: list[Part], x: Tensor) -> Tensor | None:
        """The seed of a group that is run at once; None if it drops nothing.

        Members that run by themselves after all take it, too.
        """
        for part in parts:
            if part.projection.dropout_p:
                seed = ops.dropout_seed(x)
                self._rounds[part.adapter] = (seed, -1)
                return seed
        return None

    def end(self) -> None:
        """The next member begins a new round."""
        self._rounds.clear()


def given_output(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a group's call found for this layer and this very input, once."""
    given: tuple[Tensor, Tensor] | None = layer.__dict__.pop(GIVEN, None)
    return given[1] if given is not None and given[0] is x else None
