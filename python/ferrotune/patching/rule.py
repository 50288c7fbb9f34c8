"""What `patch` knows of a kind of module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from .classes import Replaced


class Rule(NamedTuple):
    """One kind of module.

    ``matches`` says whether a module is of the kind; it imports nothing, for of a library that is
    not imported there are no modules. ``why_not`` says why one keeps its own forward, or None.
    ``check`` raises ``PatchError`` for one that is broken. ``describe`` and ``details`` are what
    the report shows. ``replacement`` brings the forward.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    why_not: Callable[[Any], str | None]
    check: Callable[[str, Any], None]
    describe: Callable[[Any], str]
    details: Callable[[Any], str]
    notes: Callable[[Any], str | None]
    replacement: type[Replaced]
    product: str
    """What the report says a replaced module is."""
