"""transformers' norms, MLPs and attentions run by ferrotune on CUDA.

On other devices, under ``torch.compile`` (which fuses them itself) and for inputs that no kernel
takes, a block keeps its own forward; its LoRA layers stay ferrotune's all the same.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import ops
from ..ops.blocks import fused, rms_norm_and_x
from ..ops.mlp import without_output
from . import groups, recompute, runs
from .architectures import ACTIVATIONS, DECODER_LAYERS, MLPS, NORMS, entry, members_of
from .base import held, is_bypassed, is_plain
from .classes import Replaced

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .given import Part


_SWITCH = "_gradient_checkpointing_func"
# In a layer's `__dict__`: the same, for torch.compile.
COMPILED_SWITCH = "_ferrotune_switch"


class NormForward(Replaced):
    """RMSNorm as one kernel."""

    ferrotune_block = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        y = self.normed(x)
        if recompute.offers():
            recompute.offer(y, self.normed, x)
        return y

    def normed(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return super().forward(x)  # type: ignore[no-any-return]
        weight = held(self, "weight")
        found: Tensor = ops.rms_norm(x, weight, norm_eps(self), offset=entry(NORMS, self) or 0.0)
        return found

    def takes(self, x: Tensor) -> bool:
        weight = held(self, "weight")
        alike = is_plain(weight) and weight.device == x.device and weight.dtype == x.dtype
        return alike and takes(x)


def norm_eps(norm: Any) -> float:
    eps: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return eps


class DecoderForward(Replaced):
    """A layer whose norms add the residuals, and in backward the gradients of them."""

    ferrotune_block = True

    @property
    def _gradient_checkpointing_func(self) -> Any:
        """What transformers, or the user, set; see `recompute.faster`."""
        if torch.compiler.is_compiling():  # where `__dict__` gives this property again
            return self._ferrotune_switch
        if _SWITCH not in self.__dict__:
            raise AttributeError(_SWITCH)
        return recompute.faster(self.__dict__[_SWITCH])

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        self.__dict__[_SWITCH] = self.__dict__[COMPILED_SWITCH] = function

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        del self.__dict__[_SWITCH]
        self.__dict__.pop(COMPILED_SWITCH, None)

    _ferrotune_switch = staticmethod(recompute.plain)

    def take_switch(self) -> None:
        """For one that was set before the layer was replaced."""
        if _SWITCH in self.__dict__:
            self._gradient_checkpointing_func = self.__dict__[_SWITCH]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        kwargs |= {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
        }
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, **kwargs)
        names = entry(DECODER_LAYERS, self)
        assert names is not None
        first, attention, second, mlp = [held(self, name) for name in names]
        if not (_norms(first, hidden_states) and _norms(second, hidden_states)):
            return super().forward(hidden_states, **kwargs)
        offset = entry(NORMS, first) or 0.0
        normed, residual = rms_norm_and_x(
            hidden_states, held(first, "weight"), norm_eps(first), offset
        )
        if recompute.offers():
            recompute.offer(normed, first.normed, hidden_states)
        found, _ = attention(hidden_states=normed, **kwargs)
        if found.dtype == residual.dtype:
            normed, residual = ops.rms_norm(
                found, held(second, "weight"), norm_eps(second), offset=offset, residual=residual
            )
            if recompute.offers():
                recompute.offer(normed, second.normed, residual)
        else:
            residual = residual + found
            normed = second(residual)
        # Nothing keeps what the MLP gives to the sum.
        unused = recompute.is_again() and isinstance(mlp, MlpForward) and not is_bypassed(mlp)
        unused = unused and not self._forward_hooks  # which some versions run again as well
        with without_output() if unused else nullcontext():
            return residual + mlp(normed)


def _norms(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm is ferrotune's kernel on x, and nothing else happens when it is called."""
    return isinstance(norm, NormForward) and not is_bypassed(norm) and norm.takes(x)


class ActivationForward(Replaced):
    """GELU by tanh as PyTorch's one kernel."""

    ferrotune_block = True

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


class MlpForward(Replaced):
    """A gated MLP as one node of autograd where its layers allow, with the activation fused."""

    ferrotune_block = True

    def forward(self, x: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(x)
        if recompute.MLP_AGAIN in self.__dict__ and self.training and torch.is_grad_enabled():
            return recompute.checkpointed(self._run, x)
        return self._run(x)

    def _run(self, x: Tensor) -> Any:
        with without_output() if self._is_again() else nullcontext():
            return self._output(x)

    def _is_again(self) -> bool:
        return recompute.is_again() and recompute.MLP_AGAIN in self.__dict__

    def _output(self, x: Tensor) -> Any:
        activation = activation_of(self)
        if activation is None:
            return super().forward(x)
        if not takes(x):
            return super().forward(x)
        gate, up, down = members_of(self)
        assert gate is not None
        assert down is not None
        if up is None:
            return down(_offered_glu(gate(x), None, activation))
        whole = None if any(map(is_bypassed, (gate, up, down))) else _whole(gate, up, down, x)
        if whole is None:
            with groups.run_ahead((gate, up), x):
                first, second = gate(x), up(x)
            return down(_offered_glu(first, second, activation))
        first, second, third = (part.projection for part in whole)
        y = ops.gated_mlp(
            x.to(whole[0].dtype), first, second, third, activation, seed=_seeds(whole, x)
        )
        return y if whole[2].out is None else y.to(whole[2].out)


def _offered_glu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    made = functools.partial(ops.glu, activation=activation)
    hidden: Tensor = made(gate, up)
    recompute.offer(hidden, made, gate, up)
    return hidden


def _seeds(parts: list[Part], x: Tensor) -> list[Tensor | None] | None:
    """Of layers that drop, drawn in the order in which they would be called; None if none does."""
    seeds = [ops.dropout_seed(x) if part.projection.dropout_p else None for part in parts]
    return None if all(seed is None for seed in seeds) else seeds


def _whole(gate: nn.Module, up: nn.Module, down: nn.Module, x: Tensor) -> list[Part] | None:
    """All layers of an MLP for one operation: those that take x, and the one that takes the rest.

    The last one's input is of the type that the first ones give, of the width that it has.
    """
    first = groups.together([gate, up], x, dropped=True)
    if first is None:
        return None
    dtype = first[0].out or (
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else first[0].dtype
    )
    hidden = x.new_empty(0, first[0].projection.shape[0], dtype=dtype)
    last = groups.together([down], hidden, dropped=True)
    if last is None or last[0].dtype != first[0].dtype:
        return None
    return [*first, *last]


def activation_of(mlp: Any) -> str | None:
    """As ``ops.glu`` names it; None for another one, or one with hooks."""
    names = entry(MLPS, mlp)
    activation = None if names is None else getattr(mlp, names[3], None)
    if not isinstance(activation, nn.Module) or is_bypassed(activation):
        return None
    return entry(ACTIVATIONS, activation)


class AttentionForward(Replaced):
    """Attention whose projections of one input are one operation, and whose positions one kernel.

    Everything else of it is transformers' own code.
    """

    ferrotune_block = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        x = args[0] if args else kwargs.get("hidden_states")
        stock: Any = self.ferrotune_stock
        with groups.run_ahead(members_of(self) if takes(x) else (), x):
            return with_fused_rope(stock)(self, *args, **kwargs)


def takes(x: Any) -> bool:
    """Whether the kernels run on x now."""
    return isinstance(x, torch.Tensor) and fused(x) and runs.not_for_ferrotune(x) is None


_ROPE = "apply_rotary_pos_emb"


@functools.cache
def with_fused_rope(stock: type[Any]) -> Callable[..., Any]:
    """The class's forward, its own code, with `ops.rope` for the function of transformers' that it
    calls: the function keeps its name in a copy of the globals, and the library its module."""
    forward: Callable[..., Any] = stock.forward
    if not isinstance(forward, FunctionType) or not turns(stock):
        return forward
    scope = {**forward.__globals__, _ROPE: _fused_rope(forward.__globals__[_ROPE])}
    made = FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def turns(stock: type[Any]) -> bool:
    """Whether the class's forward is plain code that calls transformers' rotary embeddings."""
    forward = stock.forward
    code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return code is not None and _ROPE in code.co_names and _ROPE in scope


def _fused_rope(stock: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        fits = not args and not kwargs and takes(q) and q.dim() == 4 and cos.dim() == 3
        if fits and q.dtype == k.dtype == cos.dtype == sin.dtype:
            return ops.rope(q, k, cos, sin)
        return stock(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb
