"""The blocks of transformers' models that ferrotune knows, by the names of their classes.

An architecture that is not here still gets its LoRA and 4-bit layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .base import held
from .classes import defined_in, stock_of

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
_LIKE_BERT = ("bert", "roberta")
_QKV = ("q_proj", "k_proj", "v_proj")
_CLASS_NAMES = {"phi3": "Phi3", "roberta": "Roberta"}


def _name(model: str, part: str) -> tuple[str, str]:
    prefix = _CLASS_NAMES.get(model, model.capitalize())
    return f"transformers.models.{model}.modeling_{model}", prefix + part


# Norms, with what is added to their weights.
NORMS = {_name(model, "RMSNorm"): 0.0 for model in (*_LIKE_LLAMA, "phi3")} | {
    _name(model, "RMSNorm"): 1.0 for model in ("gemma", "gemma2", "gemma3")
}
# MLPs, with the names of gate and up (or of both in one), of down and of the activation.
MLPS = {
    _name(model, "MLP"): ("gate_proj", "up_proj", "down_proj", "act_fn") for model in _LIKE_LLAMA
} | {_name("phi3", "MLP"): ("gate_up_proj", None, "down_proj", "activation_fn")}
# Attentions, with the names of the projections of their first argument, in the order of calls.
ATTENTIONS = (
    {_name(model, "Attention"): _QKV for model in _LIKE_LLAMA}
    | {_name("phi3", "Attention"): ()}
    | {_name(model, "SelfAttention"): ("query", "key", "value") for model in _LIKE_BERT}
)
# Decoder layers of one form: hidden += attention(norm(hidden)), hidden += mlp(norm(hidden)), by the
# names of its parts.
DECODER_LAYERS = dict.fromkeys(
    (_name(model, "DecoderLayer") for model in ("llama", "mistral", "qwen2", "qwen3", "gemma")),
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
)
# Activations, as ``ops.glu`` names them.
ACTIVATIONS = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "GELUActivation"): "gelu",
}


def entry(table: dict[tuple[str, str], _T], module: nn.Module) -> _T | None:
    """What a table says of the class whose forward the module, or its stock class, has."""
    stock = stock_of(module)
    if torch.compiler.is_compiling():
        return _entry(table, stock)
    key = (id(table), stock, stock.forward)  # tables are constants
    if key not in _entries:
        _entries[key] = _entry(table, stock)
    found: _T | None = _entries[key]
    return found


_entries: dict[tuple[int, type[nn.Module], object], Any] = {}


def _entry(table: dict[tuple[str, str], _T], stock: type[nn.Module]) -> _T | None:
    for cls in stock.__mro__:
        found = table.get((cls.__module__, cls.__qualname__))
        if found is not None:
            return found if defined_in(stock, cls.__module__, cls.__qualname__) else None
    return None


def members_of(module: nn.Module) -> list[nn.Module | None]:
    """The linear layers of a block, by their kind's names, in the order of their calls."""
    names: tuple[str | None, ...] | None = entry(ATTENTIONS, module)
    if names is None:
        mlp = entry(MLPS, module)
        names = () if mlp is None else mlp[:3]
    return [None if name is None else held(module, name) for name in names]
