"""What layers keep for their backward in pinned memory of the host, and back in time.

The copies have a stream of their own. What a layer keeps goes as its forward ends and is let go of
on the device as the next one's ends, when the copy is waited for. What its backward needs first
comes back as the gradient of the next layer's output is known, while that layer's backward is
computed, and the rest as that is asked for. No memory is handed to the copies' stream: what is on
the device is as much as is planned, however far the host is ahead of it. On the CPU, and while a
CUDA graph is captured, nothing is copied.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..planning.memory import LEAST_MOVED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    Key = tuple[int, int, torch.dtype, int]


class Held:
    """The elements of a tensor, flat, that a batch keeps; ``uses``: how often it is asked for."""

    def __init__(self, flat: Tensor, batch: _Batch) -> None:
        self.batch = batch
        self.on_device: Tensor | None = flat
        self.host: Tensor | None = None
        self.copied: Any = None  # when a copy, either way, is done that nothing has waited for
        self.uses = self.left = 0

    def get(self) -> Tensor:
        """As it was; after its last use nothing of it is left on the device."""
        self.batch.fetch([self])
        found = self.on_device
        assert found is not None
        self.wait()
        self.left -= 1
        if self.left <= 0 and self.host is not None:
            self.on_device, self.left = None, self.uses
        self.batch.fetch_rest(self)
        return found

    def wait(self) -> None:
        """Makes what is computed next wait for the copy."""
        if self.copied is not None:
            torch.cuda.current_stream(self.batch.device).wait_event(self.copied)
            self.copied = None

    def __del__(self) -> None:
        self.wait()  # its memory is about to be another's


class Place:
    """A use of what is held, with the shape and the strides that it has there."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.size, self.stride = held, tensor.size(), tensor.stride()

    def get(self) -> Tensor:
        return self.held.get().as_strided(self.size, self.stride)


class _Batch:
    """What one layer keeps, in the order of its forward: what is asked for first is the last.

    The graph has it; nothing else keeps it alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: weakref.WeakValueDictionary[Key, Held] = weakref.WeakValueDictionary()
        self.leaving = False
        self.asked = False  # for its first in the backward that runs

    def hold(self, tensor: Tensor) -> Place:
        # Two tensors of other shapes can be the same memory: attention's output is one.
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version)
        found = self.held.get(key)
        if found is None:
            flat = tensor.detach().as_strided((tensor.numel(),), (1,))
            found = self.held[key] = Held(flat, self)
        found.uses += 1
        found.left += 1
        return Place(found, tensor)

    def send(self) -> None:
        side, all_ = _side(self.device), [*self.held.values()]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for held in all_:
                assert held.on_device is not None
                held.host = torch.empty_like(held.on_device, device="cpu", pin_memory=True)
                held.host.copy_(held.on_device, non_blocking=True)
            sent = side.record_event()
        for held in all_:
            held.copied = sent
        self.leaving = True

    def let_go(self) -> None:
        """Of the device's memory, once it is copied."""
        if self.leaving:
            self.leaving = False
            for held in self.held.values():
                held.wait()
                held.on_device = None

    def fetch(self, which: Sequence[Held]) -> None:
        """Sends on the way back what of these is away."""
        self.let_go()
        away = [one for one in which if one.on_device is None]
        if not away:
            return
        side = _side(self.device)
        for held in away:
            assert held.host is not None
            held.on_device = torch.empty_like(held.host, device=self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))  # the memory was another's
        with torch.cuda.stream(side):
            for held in away:
                assert held.on_device is not None
                assert held.host is not None
                held.on_device.copy_(held.host, non_blocking=True)
            arrival = side.record_event()
        for held in away:
            held.copied = arrival

    def fetch_first(self) -> None:
        self.fetch([*self.held.values()][-1:])

    def fetch_rest(self, first: Held) -> None:
        """All others, as the first is asked for: they arrive while what needs that is computed."""
        self.asked, before = True, self.asked
        if not before:
            self.fetch([one for one in self.held.values() if one is not first])
        if all(one.on_device is None for one in self.held.values()):
            self.asked = False  # for another backward


class _Now(threading.local):
    batch: _Batch | None = None  # of the layer that runs
    latest: weakref.ref[_Batch] | None = None  # of the layer before, if it moved
    pending: _Batch | None = None  # that is still on the device


_now = _Now()
_sides: dict[torch.device, Any] = {}


def _side(device: torch.device) -> Any:
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _sides[device]


def hold(tensor: Tensor) -> Tensor | Place:
    """What stands for a tensor that the running layer keeps: itself, where it does not move."""
    batch = _now.batch
    if batch is None or not _moves(tensor):
        return tensor if tensor.grad_fn is None else tensor.detach()  # else a node keeps itself
    return batch.hold(tensor)


def given(held: Tensor | Place) -> Tensor:
    return held.get() if isinstance(held, Place) else held


def _moves(tensor: Tensor) -> bool:
    """Large, of activations, and without gaps; parameters stay, and so do views of them."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_floating_point()
        and tensor.numel() * tensor.element_size() >= LEAST_MOVED
        and not isinstance(tensor._base, torch.nn.Parameter)
        and torch.ops.aten.is_non_overlapping_and_dense(tensor)
    )


@contextmanager
def layer(example: Tensor | None, *, moves: bool, hooks: bool) -> Iterator[list[Any]]:
    """For one layer's forward, whose outputs are put into the list that is given.

    With ``moves`` what it keeps by `hold` goes to the host; with ``hooks`` that is all that its
    operations save, else the caller has hooks of its own.
    """
    on_cuda = example is not None and example.is_cuda
    if on_cuda and torch.cuda.is_current_stream_capturing():
        on_cuda = moves = False
    outputs: list[Any] = []
    before = None if _now.latest is None else _now.latest()
    _now.latest = None
    batch = _Batch(example.device) if moves and example is not None else None
    outer, _now.batch = _now.batch, batch
    saved: AbstractContextManager[Any] = nullcontext()
    if hooks and batch is not None:
        saved = torch.autograd.graph.saved_tensors_hooks(hold, given)
    try:
        with saved:
            yield outputs
    finally:
        _now.batch = outer
    if on_cuda and _now.pending is not None:
        _now.pending.let_go()
        _now.pending = None
    if before is not None:
        _ahead(outputs, before)
    if batch is not None and on_cuda:
        batch.send()
        _now.pending, _now.latest = batch, weakref.ref(batch)


def _ahead(outputs: list[Any], before: _Batch) -> None:
    """Fetches a batch's first when the gradient of a layer's output, the next one, is known."""
    seen = weakref.ref(before)

    def fetch(_: Tensor) -> None:
        batch = seen()
        if batch is not None:
            batch.fetch_first()

    for output in outputs:
        one = output[0] if isinstance(output, tuple) and output else output
        if isinstance(one, torch.Tensor) and one.requires_grad:
            one.register_hook(fetch)  # type: ignore[no-untyped-call]
            return
