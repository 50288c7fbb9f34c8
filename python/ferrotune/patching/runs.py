"""What each forward of a replaced layer did: by ferrotune, or by the stock layer and why."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Listener = "Callable[[nn.Module, str | None], None]"

DISABLED = "its adapters are disabled"
MERGED = "its adapters are merged into the weight"
INACTIVE = "none of its adapters is active"
MIXED = "adapter_names: every row of the batch has its own adapter"
# What the user asked for: nothing to tell.
_EXPECTED = frozenset({DISABLED, MERGED, INACTIVE, MIXED})

_log = logging.getLogger("ferrotune")
_told: set[str] = set()
_last: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_listeners: list[Any] = []


def note(layer: Any, reason: str | None) -> None:
    """Takes down one forward: by ferrotune if ``reason`` is None."""
    if torch.compiler.is_compiling():
        return
    for listener in _listeners:
        listener(layer, reason)
    if reason is None:
        if _last:
            _last.pop(layer, None)
    elif reason not in _EXPECTED:
        _last[layer] = reason
        if reason not in _told:
            _told.add(reason)
            name = layer.ferrotune_stock.__name__
            _log.warning("a %s layer ran by its own forward, not ferrotune's: %s", name, reason)


def last_reason(layer: nn.Module) -> str | None:
    """Why the latest forward was not by ferrotune, where the user did not ask for that."""
    return _last.get(layer)


@contextmanager
def listening(listener: Callable[[nn.Module, str | None], None]) -> Iterator[None]:
    """Calls ``listener(layer, reason)`` at every forward of a replaced layer of this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def not_for_ferrotune(x: Any) -> str | None:
    """Why no layer of ferrotune can take this input now; None if it can."""
    if type(x) not in (Tensor, nn.Parameter):
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if x.device.type == "meta":
        return "the input is on the meta device"
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces the model"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks for all modules are set (register_module_forward_hook and its like)"
    return None
