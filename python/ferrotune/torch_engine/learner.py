"""What the trainer asks of PyTorch; `src/python/learner.rs` is the other side.

Arrays of tokens are int64 ``[rows, columns]``, weights and moments flat float32 in the order and of
the lengths of the outline's parameters.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ranks
from .batches import IGNORE, Tokens
from .forward import Forward
from .loading import load
from .slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .batches import Array
    from .group import Group
    from .slots import Flat

    Moments = tuple[list[Flat], list[Flat]]


class GroupError(RuntimeError):
    """Another process of the run failed."""


class Learner:
    """A model with AdamW. All processes of a group make the same calls; see `_TOGETHER`."""

    def __init__(
        self, settings: Mapping[str, Any], outline: Mapping[str, Any], group: Group
    ) -> None:
        loaded = load(settings, outline, group.device)
        self._group = group
        self._classes = len(outline["labels"])
        self._slots = Slots(loaded.model, outline)
        self._forward = Forward(loaded, outline, settings["method"], group.device)
        self._facts = {**loaded.facts, "processes": group.size}
        self._optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": settings["weight_decay"] if decay else 0.0}
                for decay, parameters in self._slots.groups()
            ],
            lr=0.0,
            betas=(settings["beta1"], settings["beta2"]),
            eps=settings["eps"],
        )
        for parameter in self._slots.parameters:
            self._optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._dropouts = [
            module
            for name, module in loaded.model.named_modules()
            if ".lora_dropout." in name and isinstance(module, nn.Dropout) and module.p > 0
        ]

    def facts(self) -> str:
        """`quantized_bytes` and what is to be said of the engine, as JSON."""
        return json.dumps(self._facts)

    def clear(self) -> None:
        """Forgets the gradients of the step before."""
        self._optimizer.zero_grad(set_to_none=True)

    def add(self, ids: Array, targets: Array, positions: Array, seed: int) -> tuple[float, int]:
        """The summed loss over the targets and their number; its gradient is added."""

        def compute() -> float:
            if not (batch.targets != IGNORE).any():
                return 0.0
            with self._dropping(seed):
                loss = self._forward.class_loss if self._classes else self._forward.loss
                found = loss(batch)
                value = float(found.detach())
                if np.isfinite(value):
                    found.backward()  # type: ignore[no-untyped-call]
            return value

        batch = Tokens(ids, targets, positions).part(self._group.mine(len(ids)))
        value = self._together(torch.zeros(1, dtype=torch.float64), compute)
        return float(value[0]), int((targets != IGNORE).sum())

    def missing(self) -> str | None:
        """The first tensor without a gradient; the processes' gradients become their sum."""
        filled = torch.tensor(
            [float(one.grad is not None) for one in self._slots.parameters], dtype=torch.float64
        )
        self._group.sum(filled)
        for parameter, found in zip(self._slots.parameters, filled.tolist(), strict=True):
            if not found:
                return self._slots.name_of(parameter)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._group.sum(parameter.grad)
        return None

    def norm(self) -> tuple[float, str | None]:
        """The gradients' L2 norm, and the first tensor whose gradient is not finite."""
        parts = [
            torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)
            for parameter in self._slots.parameters
            if parameter.grad is not None
        ]
        norms = torch.stack(parts).cpu()
        if not norms.isfinite().all():
            first = int((~norms.isfinite()).nonzero()[0])
            return float("nan"), self._slots.name_of(self._slots.parameters[first])
        return float(torch.linalg.vector_norm(norms)), None

    @torch.no_grad()
    def update(self, step: int, scale: float, learning_rate: float) -> None:
        """Step number `step` (from 1) with the gradient `scale` · sums."""
        gradients = [one.grad for one in self._slots.parameters if one.grad is not None]
        torch._foreach_mul_(gradients, scale)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter in self._slots.parameters:
            self._optimizer.state[parameter]["step"].fill_(step - 1)
        self._optimizer.step()

    def judge(self, ids: Array, targets: Array, positions: Array) -> Any:
        """Of a language model (loss, [(loss, targets) of each row]), of a classifier its logits."""

        @torch.no_grad()
        def compute() -> Tensor | None:
            if len(batch.ids) == 0:
                return None
            found = self._forward.logits if self._classes else self._forward.row_losses
            return found(batch).double().cpu()

        mine = self._group.mine(len(ids))
        batch = Tokens(ids, targets, positions).part(mine)
        shape = (len(ids), self._classes or 2)
        found = self._together(torch.zeros(shape, dtype=torch.float64), compute, mine)
        if self._classes:
            return found.float().numpy().reshape(-1)
        rows = [(loss, int(count)) for loss, count in found.tolist()]
        return sum(loss for loss, _ in rows), rows

    def weights(self) -> list[Flat]:
        """A copy of the trained weights."""
        return self._slots.read(lambda parameter: parameter)

    def set_weights(self, weights: Sequence[Flat] | None) -> None:
        """Overwrites the trained weights of all processes; the first one gives them."""
        if weights is not None:
            self._slots.write(weights, lambda parameter: parameter)
        for parameter in self._slots.parameters:
            self._group.spread(parameter.data)

    def moments(self) -> Moments:
        """A copy of AdamW's averages: of the gradients, and of their squares."""
        averages, squares = (
            self._slots.read(self._moment(name)) for name in ("exp_avg", "exp_avg_sq")
        )
        return averages, squares

    def set_moments(self, averages: Sequence[Flat] | None, squares: Sequence[Flat] | None) -> None:
        """Overwrites AdamW's averages of all processes; the first one gives them."""
        for name, arrays in (("exp_avg", averages), ("exp_avg_sq", squares)):
            moment = self._moment(name)
            if arrays is not None:
                self._slots.write(arrays, moment)
            for parameter in self._slots.parameters:
                self._group.spread(moment(parameter))

    def _moment(self, name: str) -> Callable[[nn.Parameter], Tensor]:
        return lambda parameter: self._optimizer.state[parameter][name]

    def _together(
        self, found: Tensor, compute: Callable[[], Any], mine: slice = slice(None)
    ) -> Tensor:
        """`found` with this process's part in it, summed over all; fails where any of them does."""
        failure = None
        try:
            part = compute()
            if part is not None:
                found[mine] = part
        except Exception as error:
            failure = error
        failed = torch.tensor([float(failure is not None)], dtype=torch.float64)
        whole = self._group.sum(torch.cat([found.reshape(-1), failed]))
        if failure is not None:
            self._group.failed = True
            raise failure
        if whole[-1]:
            self._group.failed = True
            raise GroupError(f"another process of the run failed; {ranks.SAID_ELSEWHERE}")
        return whole[:-1].reshape(found.shape)

    @contextlib.contextmanager
    def _dropping(self, seed: int) -> Iterator[None]:
        """With LoRA's dropout on; PyTorch's own generators are afterwards as they were."""
        if not self._dropouts:
            yield
            return
        device = self._group.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((seed + self._group.rank) % (1 << 63))
            for module in self._dropouts:
                module.train()
            try:
                yield
            finally:
                for module in self._dropouts:
                    module.eval()
