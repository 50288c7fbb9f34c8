"""A callback of transformers' Trainer that patches for the time of training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch import nn

try:
    from transformers import TrainerCallback as _TrainerCallback
except ImportError as error:
    raise ImportError(
        "ferrotune.TrainerCallback needs transformers: pip install 'ferrotune[torch]'"
    ) from error

from .memory import policy_of
from .patcher import apply, restore

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .report import PatchReport

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")


class TrainerCallback(_TrainerCallback):
    """Patches the model when training begins, restores it at the end, and logs the speed.

    ``Trainer(..., callbacks=[ferrotune.TrainerCallback()])``, and so TRL's trainers. Each log of
    a training step gets ``tokens_per_second``: positions of the input, padding included, that
    this process trained on since the last log. Layers that were patched before stay patched. A
    training that ends by an exception leaves the model patched: call ``ferrotune.unpatch``.

    Args:
        strict: as for ``ferrotune.patch``.
        fused_loss: as for ``ferrotune.patch``.
        memory: as for ``ferrotune.patch``.
        show: prints the report when training begins.
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        fused_loss: bool = False,
        memory: str | float | None = None,
        show: bool = True,
    ):
        self.strict = strict
        self.fused_loss = fused_loss
        self.memory = memory
        self.show = show
        self.report: PatchReport | None = None
        """What was patched; None before training."""
        self._replaced: list[nn.Module] = []
        self._policed: list[nn.Module] = []
        self._hook: RemovableHandle | None = None
        self._tokens = 0
        self._since = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            raise ValueError("the Trainer gave its callback no model to patch")
        self._end()  # of a training that was broken off
        self.report, self._replaced = apply(
            model, strict=self.strict, fused_loss=self.fused_loss, memory=self.memory
        )
        self._policed = [model] if self.memory is not None else []
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._tokens, self._since = 0, time.perf_counter()
        if self.show and state.is_local_process_zero:
            print(self.report)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._tokens == 0:
            return
        now = time.perf_counter()
        speed = round(self._tokens / max(now - self._since, 1e-9), 1)
        self._tokens, self._since = 0, now
        logs["tokens_per_second"] = speed
        if state.log_history and state.log_history[-1].get("loss") == logs["loss"]:
            state.log_history[-1]["tokens_per_second"] = speed

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        restore(self._replaced)
        for model in self._policed:
            for policy in policy_of(list(model.modules())):
                policy.remove()
        self._replaced, self._policed = [], []

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        given: Any = next((kwargs[name] for name in _INPUTS if kwargs.get(name) is not None), None)
        if given is None and args:
            given = args[0]
        if hasattr(given, "shape") and len(given.shape) >= 2:
            self._tokens += int(given.shape[0]) * int(given.shape[1])
