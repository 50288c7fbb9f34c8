"""A run on PyTorch, from its first process's side and from the others'."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import torch

from .. import ranks
from .group import Group
from .learner import Learner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..results import TrainResult
    from .slots import Flat

# Calls that every process makes; the others need the first one alone.
_TOGETHER = ("clear", "add", "missing", "norm", "update", "judge")
_BUILD, _WEIGHTS, _MOMENTS, _END = "build", "set_weights", "set_moments", "end"


class EndedError(RuntimeError):
    """The first process ended a run without a result, and has said why."""


class Session:
    """Makes the trainer's learner, and tells the other processes of its calls.

    As a context it gives PyTorch's number of threads back, and lets the others go. `result` is what
    they return.
    """

    def __init__(self) -> None:
        _import()
        self._group = Group()
        self._settings: Mapping[str, Any] = {}
        self._threads = torch.get_num_threads()
        self.result: TrainResult | None = None

    def settle(self, settings: Mapping[str, Any]) -> None:
        """The settings of the run that is built next."""
        self._settings = settings

    def build(self, outline: str, weights: Sequence[Flat]) -> Any:
        """Called by the trainer, with what `src/engine/jobs/learning.rs` has in an Outline."""
        self._group.tell((_BUILD, (dict(self._settings), outline)))
        learner = _build(self._settings, outline, self._group)
        first = _First(learner, self._group) if self._group.size > 1 else learner
        first.set_weights(weights)
        return first

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if not self._group.failed:
            # Others that failed by themselves are gone, and the first error is the one to tell.
            with contextlib.suppress(RuntimeError):
                self._group.tell((_END, self.result))
        self._group.close()


class _First:
    """The first process's learner: the others are told of each call before it is made."""

    def __init__(self, learner: Learner, group: Group) -> None:
        self._learner, self._group = learner, group
        self.facts, self.weights, self.moments = learner.facts, learner.weights, learner.moments

    def __getattr__(self, name: str) -> Any:
        if name not in _TOGETHER:
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self._group.tell((name, arguments))
            return getattr(self._learner, name)(*arguments)

        return call

    def set_weights(self, weights: Sequence[Flat]) -> None:
        self._group.tell((_WEIGHTS, (None,)))
        self._learner.set_weights(weights)

    def set_moments(self, averages: Sequence[Flat], squares: Sequence[Flat]) -> None:
        self._group.tell((_MOMENTS, (None, None)))
        self._learner.set_moments(averages, squares)


def follow() -> TrainResult:
    """Takes part in the run of the first process, to its end; returns its result.

    Ctrl-C is the first process's to answer: it ends the run in order.
    """
    import signal

    _import()
    group = Group()
    learner: Learner | None = None
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    threads = torch.get_num_threads()
    try:
        while True:
            name, arguments = group.hear()
            if name == _END:
                if arguments is None:
                    raise EndedError(f"the run's first process ended it; {ranks.SAID_ELSEWHERE}")
                return arguments  # type: ignore[no-any-return]
            if name == _BUILD:
                learner = None  # its memory first
                settings, outline = arguments
                learner = _build(settings, outline, group)
            else:
                getattr(learner, name)(*arguments)
    finally:
        signal.signal(signal.SIGINT, before)
        torch.set_num_threads(threads)
        group.close()


def _build(settings: Mapping[str, Any], outline: str, group: Group) -> Learner:
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    return Learner(settings, json.loads(outline), group)


def _import() -> None:
    """Here rather than later, in the trainer's thread."""
    import peft
    import transformers

    _ = peft, transformers
