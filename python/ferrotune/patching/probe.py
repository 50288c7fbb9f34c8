"""Runs of a model that leave no trace: what `verify` compares."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import is_4bit


@dataclass(frozen=True, slots=True)
class Outcome:
    """One forward and backward."""

    loss: float
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    """Of every parameter that requires one; None where it got none."""
    generators: Generators
    """State of the random number generators afterwards."""


class Generators:
    """State of PyTorch's, Python's and numpy's random number generators."""

    def __init__(self, model: nn.Module):
        self._devices = sorted(
            {(p.device.type, p.device.index) for p in model.parameters()} - {("cpu", None)},
            key=str,
        )
        self._states = self._read()

    def again(self, model: nn.Module) -> Generators:
        """The state now."""
        return Generators(model)

    def restore(self) -> None:
        torch.set_rng_state(self._states[0])
        random.setstate(self._states[1])
        if self._states[2] is not None:
            sys.modules["numpy"].random.set_state(self._states[2])
        for (kind, index), state in zip(self._devices, self._states[3:], strict=True):
            torch.get_device_module(kind).set_rng_state(state, index or 0)

    def same_torch(self, other: Generators) -> bool:
        mine, its = ([s for s in g._states if isinstance(s, Tensor)] for g in (self, other))
        return all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))

    def _read(self) -> list[Any]:
        numpy = sys.modules.get("numpy")
        return [
            torch.get_rng_state(),
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
            *(
                torch.get_device_module(kind).get_rng_state(index or 0)
                for kind, index in self._devices
                if kind != "meta"
            ),
        ]


def run(model: nn.Module, batch: Any, start: Generators) -> Outcome:
    """Forward and backward from the random state ``start``."""
    start.restore()
    for parameter in model.parameters():
        parameter.grad = None
    with torch.enable_grad():
        found = _call(model, batch)
        outputs = dict(_tensors(found, "output"))
        if not outputs:
            raise TypeError(f"{type(model).__name__} returned no float tensor: nothing to compare")
        loss = _loss(outputs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    detached = {name: tensor.detach() for name, tensor in outputs.items()}
    return Outcome(loss.item(), detached, gradients, start.again(model))


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


_NO_OUTPUTS = {"past_key_values"}  # caches, and no result of their own


def _tensors(found: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield name, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            if key not in _NO_OUTPUTS:
                yield from _tensors(value, str(key))
    elif isinstance(found, Sequence) and not isinstance(found, str):
        for index, value in enumerate(found):
            yield from _tensors(value, f"{name}[{index}]")


def _loss(outputs: dict[str, Tensor]) -> Tensor:
    """The model's own loss, else the sum of the means of its outputs under fixed random signs."""
    own = outputs.get("loss")
    if own is not None and own.numel() == 1:
        return own.reshape(())
    terms = []
    generator = torch.Generator().manual_seed(0)
    for tensor in outputs.values():
        signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        terms.append((wide * signs).mean() if tensor.numel() else wide.sum())
    return torch.stack([term.to(torch.float64) for term in terms]).sum()


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Training mode, gradients, buffers, classes, generators and what bitsandbytes decides at a
    first call are afterwards as they were."""
    generators = Generators(model)
    modules = list(model.modules())
    classes = [(module, type(module), module.training) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    values = {
        id(b): b.detach().clone() for _, named in buffers for b in named.values() if b is not None
    }
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    hooks = [(p, dict(h)) for p, _ in grads if (h := p._post_accumulate_grad_hooks)]
    decided = [
        (module, module.compute_dtype, module.compute_type_is_set, module.bias)
        for module in modules
        if is_4bit(module)
    ]
    biases = [(bias, bias.data) for *_, bias in decided if isinstance(bias, Tensor)]
    for parameter, _ in hooks:
        parameter._post_accumulate_grad_hooks.clear()
    try:
        yield
    finally:
        for module, cls, training in classes:
            module.__class__ = cls
            module.training = training
        for module, named in buffers:
            module._buffers.update(named)
            for buffer in named.values():
                if buffer is not None:
                    _put_back(buffer, values[id(buffer)])
        for parameter, grad in grads:
            parameter.grad = grad
        for parameter, saved in hooks:
            parameter._post_accumulate_grad_hooks.update(saved)
        for module, dtype, is_set, _ in decided:
            module.compute_dtype, module.compute_type_is_set = dtype, is_set
        for bias, data in biases:
            bias.data = data
        generators.restore()


@torch.no_grad()
def _put_back(tensor: Tensor, value: Tensor) -> None:
    if not torch.equal(tensor, value):
        tensor.copy_(value)
