"""Parts of a layer run again in backward, instead of keeping what they gave.

A whole layer, or its MLP, is PyTorch's checkpoint; the last product of a gated MLP at its end,
whose result nothing keeps, is then left out. The results of norms and activations alone are made
again, from what the operations before them keep anyway, where a later operation asks for them.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from . import offload
from .base import is_instance

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Key = tuple[int, int, torch.dtype]

_REENTRANT = "use_reentrant"
_CACHE = ("transformers.cache_utils", "Cache")
# In an MLP's `__dict__`: it keeps its input alone.
MLP_AGAIN = "_ferrotune_again"


class _Now(threading.local):
    again = False  # whether a checkpoint's part runs for the second time
    offers: dict[Key, tuple[Recipe, Tensor, int]] | None = None


_now = _Now()


def is_again() -> bool:
    """Whether what runs is the second forward of a checkpoint of this module's, and of nothing
    inside it: its result is not used."""
    return _now.again


class _Again:
    """Sets `is_again`; a forward of several backwards enters it for each."""

    def __init__(self, again: bool) -> None:
        self.again = again
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(_now.again)
        _now.again = self.again

    def __exit__(self, *_: object) -> None:
        _now.again = self.before.pop()


def _contexts() -> tuple[_Again, _Again]:
    return _Again(False), _Again(True)


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` of a layer or an MLP, which keeps ``args`` alone."""
    settings: dict[str, Any] = {}
    on_cuda = any(isinstance(one, torch.Tensor) and one.is_cuda for one in args)
    if on_cuda and torch.cuda.is_current_stream_capturing() and not _draws(function):
        settings["preserve_rng_state"] = False  # which cannot be read in a capture
    return checkpoint(function, *args, use_reentrant=False, context_fn=_contexts, **settings)


def plain(function: Callable[..., Any], *args: Any) -> Any:
    """PyTorch's checkpoint as torch.compile takes it: without contexts."""
    return checkpoint(function, *args, use_reentrant=False)


def _draws(function: Any) -> bool:
    """Whether a layer's forward, or its MLP's, can draw random numbers."""
    if isinstance(function, functools.partial):
        held = (*function.args, getattr(function.func, "__self__", None))
    else:
        held = (function.__self__,)
    return any(
        isinstance(value, float) and value > 0 and ("dropout" in name or name == "p")
        for layer in held
        if isinstance(layer, torch.nn.Module)
        for module in layer.modules()
        for name, value in vars(module).items()
    )


def reentrant(function: Callable[..., Any], *args: Any) -> Any:
    """`checkpointed` by PyTorch's older way, whose first forward records no gradients."""

    def marked(*given: Any) -> Any:
        with _Again(torch.is_grad_enabled()):
            return function(*given)

    return checkpoint(marked, *args, use_reentrant=True)


def faster(function: Any) -> Any:
    """For a layer's checkpointing function one of those above, if it does just the same."""
    if torch.compiler.is_compiling() or type(function) is not functools.partial:
        return function
    if function.func is not checkpoint or function.args or [*function.keywords] != [_REENTRANT]:
        return function
    return {False: checkpointed, True: reentrant}.get(function.keywords[_REENTRANT], function)


class Whole:
    """A layer's checkpointing function by which it keeps its input alone, or not even that.

    ``run`` is `checkpointed`, or one like it that the user asked for.
    """

    def __init__(self, run: Any, *, offloaded: bool = False) -> None:
        self.run = run
        self.ours = run is checkpointed or run is reentrant
        self.offloaded = offloaded

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain(function, *args) if self.ours else self.run(function, *args)
        if not torch.is_grad_enabled():
            return function(*args)
        # What is positional keeps transformers from leaving caches out, which a second forward
        # would fill again.
        args = tuple(None if is_instance(one, *_CACHE) else one for one in args)
        with offload.layer(_first(args), moves=self.offloaded, hooks=True) as outputs:
            outputs.append(self.run(function, *args))
        return outputs[0]


def _first(args: tuple[Any, ...]) -> Tensor | None:
    """The first tensor: a layer's input."""
    return next((one for one in args if isinstance(one, torch.Tensor)), None)


class Elementwise:
    """A layer's checkpointing function by which it makes the results of its norms and activations
    again: those for which it calls `offer`. ``spilled``: what else it keeps waits on the host."""

    def __init__(self, *, spilled: bool = False) -> None:
        self.spilled = spilled

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return function(*args)
        before, _now.offers = _now.offers, {}
        try:
            with (
                offload.layer(_first(args), moves=self.spilled, hooks=False) as outputs,
                torch.autograd.graph.saved_tensors_hooks(_pack, _unpack),
            ):
                outputs.append(function(*args))
            return outputs[0]
        finally:
            _now.offers = before


def offers() -> bool:
    """Whether `offer` is of use."""
    return _now.offers is not None


def offer(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    """``function(*inputs)`` gives ``result`` again, to the bit; the inputs are kept anyway."""
    if _now.offers is not None and result.numel() and result.is_contiguous():
        kind = result.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        held = tuple(None if one is None else one.detach() for one in inputs)
        # With the result, so that no other tensor has its address while the layer runs.
        recipe = Recipe(function, held, kind, *autocast)
        _now.offers[_key(result)] = (recipe, result.detach(), result._version)


class Recipe(NamedTuple):
    """How to make a result again; autograd holds it in the result's place, with its shape."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | offload.Place | None, ...]
    device: str
    autocast: bool
    dtype: torch.dtype

    def kept(self) -> Recipe:
        """With inputs as the running layer keeps them."""
        held = tuple(
            offload.hold(one) if isinstance(one, torch.Tensor) else one for one in self.inputs
        )
        return self._replace(inputs=held)

    def made(self) -> Tensor:
        inputs = [None if one is None else offload.given(one) for one in self.inputs]
        with torch.no_grad(), torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast):
            return self.function(*inputs)


def _key(tensor: Tensor) -> Key:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def _pack(tensor: Tensor) -> Any:
    found = None if _now.offers is None else _now.offers.get(_key(tensor))
    if found is None or not tensor.is_contiguous() or tensor._version != found[2]:
        return offload.hold(tensor)
    return found[0].kept(), tensor.shape


def _unpack(held: Any) -> Tensor:
    if isinstance(held, (torch.Tensor, offload.Place)):
        return offload.given(held)
    recipe, shape = held
    return recipe.made().view(shape)  # type: ignore[no-any-return]
