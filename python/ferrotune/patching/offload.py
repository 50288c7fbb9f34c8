"""The inputs of checkpoints in pinned memory of the host, and back in time.

The copies have a stream of their own. In backward, when one input is asked for, the one before it
is on its way: it arrives while the layer after it is computed. On the CPU nothing is copied.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_LEAST = 1 << 16  # bytes that are worth a copy


class _Input:
    """An input of a checkpoint, and the one of the checkpoint before."""

    def __init__(self, tensor: Tensor, offloaded: bool, before: _Input | None) -> None:
        self.before = None if before is None else weakref.ref(before)
        self.device = tensor.device
        self.on_device: Tensor | None = tensor
        self.host: Tensor | None = None
        self.arrived: Any = None
        if offloaded:
            side = _side(tensor.device)
            side.wait_stream(torch.cuda.current_stream(tensor.device))
            self.host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            with torch.cuda.stream(side):
                self.host.copy_(tensor, non_blocking=True)
            tensor.record_stream(side)
            self.on_device = None

    def fetch(self) -> None:
        """Sends it on its way."""
        if self.on_device is not None or self.host is None:
            return
        side = _side(self.device)
        self.on_device = torch.empty_like(self.host, device=self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))  # the memory was another's
        with torch.cuda.stream(side):
            self.on_device.copy_(self.host, non_blocking=True)
            self.arrived = side.record_event()
        self.on_device.record_stream(side)

    def get(self) -> Tensor:
        self.fetch()
        found = self.on_device
        assert found is not None
        if self.host is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
            self.on_device = None
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return found


class _Latest(threading.local):
    input: weakref.ref[_Input] | None = None


_latest = _Latest()
_sides: dict[torch.device, Any] = {}


def _side(device: torch.device) -> Any:
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _sides[device]


@contextmanager
def inputs(offloaded: bool) -> Iterator[None]:
    """For one checkpoint, whose inputs are kept on the device or, ``offloaded``, on the host.

    While a CUDA graph is captured they stay on the device.
    """

    def pack(tensor: Tensor) -> Any:
        large = tensor.numel() * tensor.element_size() >= _LEAST and tensor.is_floating_point()
        if not tensor.is_cuda or not large or type(tensor) is not torch.Tensor:
            return tensor if tensor.grad_fn is None else tensor.detach()
        moves = offloaded and not torch.cuda.is_current_stream_capturing()
        latest = None if _latest.input is None else _latest.input()
        found = _Input(tensor.detach(), moves, latest)
        _latest.input = weakref.ref(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(held: Any) -> Tensor:
    return held.get() if isinstance(held, _Input) else held
