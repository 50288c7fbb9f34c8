"""Tiny random models of every family the engine runs, with and without a classification head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llamas import IGNORE, Array, Batch, Computed, computing_in, save

VOCABULARY, LABELS = 97, 5
Config = dict[str, Any]

SIZES: dict[str, Config] = {
    "llama": {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "bert": {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
    },
}  # fmt: skip
CLASSES = {"llama": "Llama", "gpt2": "GPT2", "bert": "Bert"}


def build(
    family: str, kind: str = "ForSequenceClassification", seed: int = 0, **changes: Any
) -> Any:
    """A model whose norms, biases and heads are random as well; `kind` ends its class's name."""
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(seed)
    config: Any = getattr(transformers, f"{CLASSES[family]}Config")
    sizes = {**SIZES[family], "pad_token_id": 0, **changes}
    if kind == "ForSequenceClassification":
        sizes = {"num_labels": LABELS, **sizes}
    model: Any = getattr(transformers, f"{CLASSES[family]}{kind}")(config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=1.2 * min(parameter.shape) ** -0.5)
    return model.eval()


def saved(
    family: str, folder: Path, kind: str = "ForSequenceClassification", **changes: Any
) -> Path:
    return save(build(family, kind, **changes), folder)


def load(folder: Path, kind: str, dtype: str = "float64") -> Any:
    """What transformers reads, computing in `dtype`."""
    import transformers

    model: Any = getattr(transformers, f"AutoModel{kind}")
    return computing_in(model.from_pretrained(folder, attn_implementation="sdpa"), dtype)


@dataclass(frozen=True)
class Rows:
    """Padded texts: `ids` `[rows, columns]`, `lengths` and `labels` `[rows]`."""

    ids: npt.NDArray[np.uint32]
    lengths: list[int]
    labels: npt.NDArray[np.int64]

    def batch(self) -> Batch:
        """As the engine reads it: the label at each row's last token."""
        targets = np.full(self.ids.shape, IGNORE, np.int32)
        for row, length in enumerate(self.lengths):
            targets[row, length - 1] = self.labels[row]
        positions = np.tile(np.arange(self.ids.shape[1], dtype=np.uint32), (len(self.lengths), 1))
        return Batch(self.ids, targets, positions)


def rows(lengths: list[int], seed: int = 0, padding: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    ids = np.full((len(lengths), max(lengths)), padding, np.uint32)
    for row, length in enumerate(lengths):
        ids[row, :length] = random.integers(3, VOCABULARY, length)
    return Rows(ids, lengths, random.integers(0, LABELS, len(lengths)))


def classified(model: Any, data: Rows) -> Computed:
    """transformers' logits `[rows, labels]`, the summed loss, and its gradients by name."""
    import torch

    ids = torch.from_numpy(data.ids.astype(np.int64))
    lengths = torch.tensor(data.lengths)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    model.zero_grad()
    logits = model(ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.labels), reduction="sum")
    loss.backward()
    return Computed(logits.detach().numpy(), float(loss.detach()), gradients(model))


def gradients(model: Any) -> dict[str, Array]:
    """By name, in the layout of linear layers: a Conv1D's are turned over."""
    from transformers.pytorch_utils import Conv1D

    turned = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    return {
        name: (parameter.grad.T if name in turned else parameter.grad).numpy().ravel()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def cancelling(truth: Mapping[str, Array]) -> dict[str, float]:
    """What some gradients are small differences of.

    Those of BERT's queries and keys pass through soft-max, whose gradient is p∘(dp − Σ p∘dp): in an
    attention that every token shares, the difference of sums as large as the values' own gradient.
    A key's bias moves all of a row's scores alike, and its gradient is nothing but rounding. The
    bias of the norm before a classification head sums what few rows pull to either side, with sizes
    that its weight's shows.
    """
    sizes: dict[str, float] = {}
    for name in truth:
        attention, found, _ = name.rpartition(".self.")
        if found and (".query." in name or ".key." in name):
            parts = (x for other, x in truth.items() if other.startswith(f"{attention}.self."))
            sizes[name] = float(np.sqrt(sum(np.square(x).sum() for x in parts)))
        elif name.endswith(".ln_f.bias"):
            sizes[name] = float(np.linalg.norm(truth[f"{name.removesuffix('bias')}weight"]))
    return sizes
