"""Forward passes: a language model's losses, a classifier's logits; with virtual tokens, too."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from .batches import IGNORE, Inputs, Tokens, of_labelled, of_texts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .loading import Loaded

_LOGITS = 1 << 24  # held at once where losses are wanted token by token


class Forward:
    """What a loaded model computes of the trainer's batches."""

    def __init__(
        self, loaded: Loaded, outline: Mapping[str, Any], method: str, device: torch.device
    ) -> None:
        self._model: Any = loaded.model
        self._base = loaded.base
        self._backbone = loaded.base.base_model
        self._autocast = loaded.autocast
        self._device = device
        self._virtual = outline["virtual_tokens"]
        self._is_prompt = method == "prompt"
        self._causal = loaded.base.config.model_type != "bert"

    def loss(self, batch: Tokens) -> Tensor:
        """A language model's summed loss (nats), on the graph."""
        inputs = of_texts(batch, self._device, self._virtual > 0)
        with self._precision():
            hidden, targets, _ = self._predicting(inputs)
            weight = self._head_weight()
            if weight.dtype != hidden.dtype and self._autocast is None:
                hidden = hidden.to(weight.dtype)
            return ops.linear_cross_entropy(hidden, weight, targets, reduction="sum")

    def row_losses(self, batch: Tokens) -> Tensor:
        """Each row's summed loss and number of targets, ``[rows, 2]``, float64."""
        inputs = of_texts(batch, self._device, self._virtual > 0)
        with self._precision():
            hidden, targets, rows = self._predicting(inputs)
            weight = self._head_weight()
            step = max(1, _LOGITS // weight.shape[0])
            losses = [
                functional.cross_entropy(
                    functional.linear(part.to(weight.dtype), weight).float(),
                    targets[at : at + step],
                    reduction="none",
                )
                for at in range(0, len(targets), step)
                for part in (hidden[at : at + step],)
            ]
        found = torch.zeros(len(batch.ids), 2, dtype=torch.float64, device=self._device)
        if losses:
            every = torch.cat(losses).double()
            found.index_add_(0, rows, torch.stack([every, torch.ones_like(every)], dim=1))
        return found

    def class_loss(self, batch: Tokens) -> Tensor:
        """A classifier's summed loss (nats), on the graph."""
        logits, labels = self._classes(batch)
        return functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")

    def logits(self, batch: Tokens) -> Tensor:
        """A classifier's logits, ``[rows, labels]``, float32."""
        return self._classes(batch)[0]

    def _head_weight(self) -> Tensor:
        return self._base.get_output_embeddings().weight  # type: ignore[no-any-return]

    def _predicting(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the tokens that have a target, the targets, and the tokens' rows."""
        hidden = self._run(inputs).last_hidden_state[:, -inputs.ids.shape[1] :]
        chosen = inputs.targets != IGNORE
        rows = inputs.owner[:, None].expand_as(chosen)[chosen]
        return hidden[chosen], inputs.targets[chosen], rows

    def _classes(self, batch: Tokens) -> tuple[Tensor, Tensor]:
        inputs, lengths, labels = of_labelled(batch, self._device, self._causal)
        with self._precision():
            out = self._run(inputs)
            if self._causal:
                hidden = out.last_hidden_state
                # A prompt's own tokens stand among the hidden states, a prefix's do not.
                first = hidden.shape[1] - inputs.ids.shape[1]
                pooled = hidden[torch.arange(len(lengths)), first + lengths - 1]
                head = self._base.score
            else:
                pooled, head = out.pooler_output, self._base.classifier
            if self._autocast is None:
                pooled = pooled.float()
            return head(pooled).float(), labels

    def _run(self, inputs: Inputs) -> Any:
        """The model below its head."""
        given: dict[str, Any] = {"attention_mask": inputs.mask, "position_ids": inputs.positions}
        if self._causal:
            given["use_cache"] = False
        if self._virtual == 0:
            return self._backbone(input_ids=inputs.ids, **given)
        rows = len(inputs.ids)
        if inputs.mask is not None:
            ones = inputs.mask.new_ones(rows, self._virtual)
            given["attention_mask"] = torch.cat([ones, inputs.mask], dim=1)
        virtual = self._model.get_prompt(batch_size=rows)
        if not self._is_prompt:
            return self._backbone(input_ids=inputs.ids, past_key_values=virtual, **given)
        embedded = self._backbone.get_input_embeddings()(inputs.ids)
        embedded = torch.cat([virtual.to(embedded.dtype), embedded], dim=1)
        return self._backbone(inputs_embeds=embedded, **given)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._autocast)
