"""The sizes of a decoder's parts, from its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import SettingError, nearest

_MOST = 2**40


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a block: ``n`` outputs of ``k`` inputs."""

    name: str
    n: int
    k: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of blocks that are alike: norm, attention, norm, MLP."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    linears: tuple[Linear, ...]  # of one block
    norms: int  # of ``hidden`` weights, in one block
    head_norms: bool  # of queries and keys, ``head_dim`` weights each
    fused: bool  # q, k and v are one layer, and gate and up
    gated: bool = True  # else the MLP is up, activation, down

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.key_value_heads * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Of all blocks, without biases."""
        return self.layers * sum(one.n * one.k for one in self.linears)

    @property
    def other_parameters(self) -> int:
        """Embedding, head, norms and biases."""
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        norms = self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        biases = sum(one.n for one in self.linears if one.bias)
        return tables + self.layers * (norms + biases) + self.hidden

    def adapter_parameters(self, r: int) -> int:
        """LoRA adapters of rank ``r`` on every linear layer of every block."""
        return self.layers * sum(r * (one.n + one.k) for one in self.linears)


@dataclass(frozen=True, slots=True)
class _Family:
    """What config.json leaves to the model's own code; a text names the key that decides."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    tied: bool = False  # where config.json does not say
    head_dim: int | None = None  # likewise; None: hidden_size / num_attention_heads
    norms: int = 2
    head_norms: bool = False
    fused: bool = False


_FAMILIES = {
    "llama": _Family("attention_bias", "attention_bias", "mlp_bias"),
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family("attention_bias", "attention_bias", head_dim=128, head_norms=True),
    "gemma": _Family("attention_bias", "attention_bias", tied=True, head_dim=256),
    "gemma2": _Family("attention_bias", "attention_bias", tied=True, head_dim=256, norms=4),
    "gemma3_text": _Family(
        "attention_bias", "attention_bias", tied=True, head_dim=256, norms=4, head_norms=True
    ),
    "phi3": _Family(fused=True),
}


def read(model: str | Path) -> Shape:
    """The shape of a model folder, or of a config.json.

    Raises:
        SettingError: a file that is no such JSON, a kind of model that is not known, sizes that are
            missing or contradict each other.
        OSError: a file that cannot be read.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SettingError(f"{path} holds no object of settings")
    return shape_of(config, str(path))


def shape_of(config: Mapping[str, Any], source: str) -> Shape:
    """The shape that a config describes; ``source`` is what errors call it."""
    kind = config.get("model_type")
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        close = nearest(kind, _FAMILIES) if isinstance(kind, str) else ""
        raise SettingError(
            f"{source}: model_type {kind!r} is not one whose memory is known{close}: "
            f"{', '.join(_FAMILIES)}"
        )

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < _MOST:
            raise SettingError(f"{source}: {name} must be a whole number above 0, not {value!r}")
        return value

    def flag(of: bool | str) -> bool:
        return bool(config.get(of, False)) if isinstance(of, str) else of

    hidden, intermediate = size("hidden_size"), size("intermediate_size")
    heads = size("num_attention_heads")
    key_value_heads = size("num_key_value_heads", heads)
    head_dim = size("head_dim", family.head_dim or max(1, hidden // heads))
    if heads % key_value_heads:
        raise SettingError(
            f"{source}: {heads} attention heads cannot share {key_value_heads} key-value heads"
        )
    queries, keys = heads * head_dim, key_value_heads * head_dim
    qkv, out, mlp = map(flag, (family.qkv_bias, family.output_bias, family.mlp_bias))
    first = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    second = {"gate_proj": intermediate, "up_proj": intermediate}
    if family.fused:
        first, second = {"qkv_proj": queries + 2 * keys}, {"gate_up_proj": 2 * intermediate}
    linears = (
        *(Linear(name, n, hidden, qkv) for name, n in first.items()),
        Linear("o_proj", hidden, queries, out),
        *(Linear(name, n, hidden, mlp) for name, n in second.items()),
        Linear("down_proj", hidden, intermediate, mlp),
    )
    return Shape(
        model_type=str(kind),
        layers=size("num_hidden_layers"),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        linears=linears,
        norms=family.norms,
        head_norms=family.head_norms,
        fused=family.fused,
    )
