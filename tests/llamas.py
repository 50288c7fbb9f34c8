"""Tiny Llamas for the parity tests: transformers builds and saves them, and is the reference.

The reference runs in float64 wherever transformers lets it: its RMSNorm, which computes in
float32 whatever its input, is replaced. Rotary angles stay float32, as transformers defines them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORE = -100
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """`ids`, `targets` and `positions`, all `[rows, columns]`; targets are shifted already."""

    ids: npt.NDArray[np.uint32]
    targets: npt.NDArray[np.int32]
    positions: npt.NDArray[np.uint32]

    def row(self, row: int, begin: int, end: int) -> Batch:
        """One document as a batch of its own."""
        part = (slice(row, row + 1), slice(begin, end))
        return Batch(self.ids[part].copy(), self.targets[part].copy(), self.positions[part].copy())


@dataclass(frozen=True)
class Computed:
    """Logits `[rows, columns, vocabulary]`, the summed loss in nats, its gradients by name."""

    logits: Array
    loss: float
    gradients: dict[str, Array]


def llama(seed: int = 0, **changes: Any) -> Any:
    """A random LlamaForCausalLM in float32 whose norms and biases are random as well."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(2)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(
                    std=0.3 if parameter.dim() == 1 else 1.5 * parameter.shape[1] ** -0.5
                )
    return model.eval()


def save(model: Any, folder: Path, dtype: str = "float32", shard: str | None = None) -> Path:
    """Writes the model in `dtype`; `shard` is transformers' max_shard_size."""
    import torch

    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    assert (folder / "model.safetensors.index.json").exists() == (shard is not None)
    return folder


def edit_config(folder: Path, remove: Sequence[str] = (), **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in remove:
        del config[key]
    path.write_text(json.dumps({**config, **changes}))


def batch(
    vocab_size: int, rows: int, columns: int, seed: int = 0, documents: Sequence[Sequence[int]] = ()
) -> Batch:
    """Random tokens. `documents` gives, for each row, where documents after the first begin."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocab_size, (rows, columns), dtype=np.uint32)
    targets = np.full((rows, columns), IGNORE, np.int32)
    targets[:, :-1] = ids[:, 1:]
    positions = np.tile(np.arange(columns, dtype=np.uint32), (rows, 1))
    for row, starts in enumerate(documents):
        for start in starts:
            targets[row, start - 1] = IGNORE
            positions[row, start:] = np.arange(columns - start)
    if columns == 1:
        targets[:] = random.integers(0, vocab_size, (rows, 1))
    return Batch(ids, targets, positions)


def engine(folder: Path, data: Batch, **options: Any) -> Computed:
    """What the engine computes for the batch."""
    from ferrotune import _native

    logits, loss, gradients = _native.compute(
        folder, data.ids, data.targets, data.positions, **options
    )
    # A classifier's are one row a text.
    rows = data.ids.shape if logits.size % data.ids.size == 0 else data.ids.shape[:1]
    return Computed(logits.reshape(*rows, -1), loss, gradients)


def load(folder: Path, dtype: str = "float64") -> Any:
    """The folder's model as transformers reads it, computing in `dtype`."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(2)
    model: Any = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return computing_in(model, dtype)


def computing_in(model: Any, dtype: str) -> Any:
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class RMSNorm(LlamaRMSNorm):
        def forward(self, x: Any) -> Any:
            return (
                self.weight
                * x
                * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            )

    model = model.to(getattr(torch, dtype)).eval()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = RMSNorm
    return model


def reference(model: Any, data: Batch) -> Computed:
    """What torch computes; gradients are those of the parameters that require one."""
    import torch

    ids, targets = (torch.from_numpy(x.astype(np.int64)) for x in (data.ids, data.targets))
    positions = data.positions.astype(np.int64)
    # Attention is causal and stays in its document; a document starts where its position is 0.
    document = np.cumsum(positions == 0, axis=1)
    same = document[:, :, None] == document[:, None, :]
    mask = torch.from_numpy(same & np.tri(ids.shape[1], dtype=bool))[:, None]
    model.zero_grad()
    logits = model(
        ids, attention_mask=mask, position_ids=torch.from_numpy(positions), use_cache=False
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: parameter.grad.numpy().ravel()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Computed(logits.detach().numpy(), float(loss.detach()), gradients)


def relative(found: Array, truth: Array) -> float:
    """‖found − truth‖ / ‖truth‖ in float64; the plain norm of `found` where the truth is zero."""
    found, truth = found.astype(np.float64).ravel(), truth.astype(np.float64).ravel()
    assert found.shape == truth.shape
    assert np.isfinite(found).all()
    norm = float(np.linalg.norm(truth))
    return float(np.linalg.norm(found - truth)) / (norm or 1.0)


def largest(found: Array, truth: Array) -> float:
    """The largest difference of two arrays as a part of the largest true value."""
    assert found.shape == truth.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def check_gradients(
    found: Mapping[str, Array],
    truth: Mapping[str, Array],
    torchs: Mapping[str, Array],
    scales: Mapping[str, float] | None = None,
) -> None:
    """`torchs` is torch's own float32, whose error may be met twice where it is above 1e-5.

    A gradient that is zero in truth (attention over one token) is held to the whole one's size.
    Where `scales` gives the size of what cancels in a gradient, the error may be four units in the
    last place of float32 of it.
    """
    whole = float(np.sqrt(sum(np.square(x).sum() for x in truth.values())))
    for name, gradient in found.items():
        size = float(np.linalg.norm(truth[name]))
        scale = (scales or {}).get(name, 0.0)
        rounding = 4 * float(np.finfo(np.float32).eps) * scale
        if size > 1e-9 * whole:
            own = relative(torchs[name], truth[name])
            allowed = max(1e-5, 2 * own, rounding / size)
            assert relative(gradient, truth[name]) <= allowed, name
        else:
            assert np.linalg.norm(gradient) <= (rounding or 1e-6 * whole), name
