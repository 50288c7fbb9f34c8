"""The rules of `patch` for what stands around the linear layers (see `blocks`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import architectures as known
from .base import is_offloaded
from .blocks import (
    ActivationForward,
    AttentionForward,
    DecoderForward,
    MlpForward,
    NormForward,
    activation_of,
    norm_eps,
    turns,
)
from .classes import stock_of
from .rule import Rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def _why_not(module: Any) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (a hook of accelerate or the like)"
    return "its weights are offloaded" if is_offloaded(module) else None


def _why_not_mlp(module: Any) -> str | None:
    reason = _why_not(module)
    if reason is None and activation_of(module) is None:
        return "its activation is none of SiLU, GELU and GELU by tanh, or has hooks"
    return reason


def _is_gelu(module: nn.Module) -> bool:
    where = ("transformers.activations", "NewGELUActivation")
    return known.entry({where: True}, module) is True


def _of(module: nn.Module) -> str:
    return stock_of(module).__name__


def _attention_details(module: Any) -> str:
    names = known.entry(known.ATTENTIONS, module) or ()
    parts = [", ".join(names)] if names else []
    return "; ".join([*parts, "rotary positions"] if turns(stock_of(module)) else parts)


def _rule(
    kind: str,
    matches: Callable[[nn.Module], bool],
    details: Callable[[Any], str],
    replacement: Any,
    product: str,
    why_not: Callable[[Any], str | None] = _why_not,
) -> Rule:
    return Rule(
        kind=kind,
        matches=matches,
        why_not=why_not,
        check=lambda name, module: None,
        describe=_of,
        details=details,
        notes=lambda module: None,
        replacement=replacement,
        product=product,
    )


BLOCK_RULES = [
    _rule(
        "norm",
        lambda module: known.entry(known.NORMS, module) is not None,
        lambda module: f"eps={norm_eps(module):g}",
        NormForward,
        "RMSNorm, on CUDA",
    ),
    _rule(
        "MLP",
        lambda module: known.entry(known.MLPS, module) is not None,
        lambda module: activation_of(module) or "",
        MlpForward,
        "gated MLP, on CUDA",
        _why_not_mlp,
    ),
    _rule(
        "attention",
        lambda module: known.entry(known.ATTENTIONS, module) is not None,
        _attention_details,
        AttentionForward,
        "groups and rotary positions, on CUDA",
    ),
    _rule(
        "decoder layer",
        lambda module: known.entry(known.DECODER_LAYERS, module) is not None,
        lambda module: "",
        DecoderForward,
        "residuals in its norms, on CUDA",
    ),
    _rule("activation", _is_gelu, lambda module: "", ActivationForward, "GELU by tanh"),
]
