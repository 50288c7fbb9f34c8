"""What a block leaves for its layers before it calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .. import ops

# In a layer's `__dict__`: input and output of a call that was made for it already.
GIVEN = "_ferrotune_given"


class Part(NamedTuple):
    """A layer as a group's operation takes it."""

    projection: ops.Projection
    dtype: torch.dtype  # that x is cast to before
    out: torch.dtype | None  # that y is cast to; None: as it comes


def given_output(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a group's call found for this layer and this very input, once."""
    given: tuple[Tensor, Tensor] | None = layer.__dict__.pop(GIVEN, None)
    return given[1] if given is not None and given[0] is x else None
