"""transformers' causal language models with the loss of `ops.linear_cross_entropy` in training."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from .. import ops
from . import lora, runs
from .base import dtype_name, is_bypassed, is_dense, is_instance, is_plain
from .classes import Replaced, defined_in, stock_of

if TYPE_CHECKING:
    from torch import Tensor

    from .lora import Adapter

_TYPES = "transformers.models.{0}.modeling_{0}"
# The models whose forward is the one of `_fused` but for the loss, and what it returns.
_COVERED = {
    **dict.fromkeys(
        (
            (_TYPES.format("llama"), "LlamaForCausalLM"),
            (_TYPES.format("mistral"), "MistralForCausalLM"),
            (_TYPES.format("qwen2"), "Qwen2ForCausalLM"),
            (_TYPES.format("qwen3"), "Qwen3ForCausalLM"),
            (_TYPES.format("gemma"), "GemmaForCausalLM"),
            (_TYPES.format("gemma2"), "Gemma2ForCausalLM"),
            (_TYPES.format("gemma3"), "Gemma3ForCausalLM"),
            (_TYPES.format("phi3"), "Phi3ForCausalLM"),
        ),
        "CausalLMOutputWithPast",
    ),
    (_TYPES.format("gpt2"), "GPT2LMHeadModel"): "CausalLMOutputWithCrossAttentions",
}


class CausalLMForward(Replaced):
    """In training with labels, the loss without logits: those are then None in the output, and so
    are ``past_key_values`` unless they or ``use_cache`` are given.

    Without labels, in evaluation and where no gradients are recorded, the stock forward runs.
    """

    ferrotune_output: ClassVar[str | None]  # what the stock forward returns

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        from transformers.utils.generic import can_return_tuple

        stock: Any = cls.ferrotune_stock
        cls.ferrotune_output = _output_of_class(stock)
        names = [*inspect.signature(stock.forward).parameters][1:]

        # The Trainer reads the signature: which columns of a data set are inputs.
        @functools.wraps(stock.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, cls):  # unpatched, but a library kept its bound forward
                return stock.forward(self, *args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if not self.training or given.get("labels") is None or not torch.is_grad_enabled():
                return stock.forward(self, *args, **kwargs)
            reason = _why_not_now(self, given)
            if reason is not None:
                runs.note(self, reason)
                return stock.forward(self, *args, **kwargs)
            return fused(self, **given)

        fused = can_return_tuple(_fused)  # type: ignore[no-untyped-call]
        cls.forward = forward


class Head(NamedTuple):
    """What `ops.linear_cross_entropy` takes of a model's head."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter | None


def is_causal_lm(module: nn.Module) -> bool:
    """A transformers model whose loss is that of the next token."""
    if not is_instance(module, "transformers.modeling_utils", "PreTrainedModel"):
        return False
    return _output_of(module) is not None or getattr(module, "loss_type", None) == "ForCausalLM"


def why_not(model: Any) -> str | None:
    """Why a causal model keeps its own forward whatever it is given."""
    if _output_of(model) is None:
        return f"there is no fused loss for {stock_of(model).__name__}"
    if "forward" in model.__dict__:
        return "its forward is replaced on the instance (by accelerate, TRL or the like)"
    return why_not_head(model.get_output_embeddings())


def why_not_head(head: Any) -> str | None:
    """Why a head's product is not ferrotune's, whatever its input."""
    layer = _trained_copy(head)
    if isinstance(layer, str):
        return layer
    if is_instance(layer, "peft.tuners.lora.layer", "LoraLayer"):
        if not defined_in(stock_of(layer), "peft.tuners.lora.layer", "Linear"):
            return f"its head is a lora.{stock_of(layer).__name__}"
        layer = layer.base_layer
    if not is_dense(layer):
        return f"its head is a {stock_of(layer).__name__}, not a dense linear layer"
    return None


def details(model: Any) -> str:
    """The head's size, and its softcap."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    text = f"V={model.config.vocab_size}"
    if weight is not None:
        text += f" d={weight.shape[-1]} {dtype_name(weight.dtype)}"
    softcap = _softcap(model)
    return text + (f" softcap={softcap:g}" if softcap else "")


def _output_of(model: nn.Module) -> str | None:
    return _output_of_class(stock_of(model))


def _output_of_class(stock: type[nn.Module]) -> str | None:
    found = (name for place, name in _COVERED.items() if defined_in(stock, *place))
    return next(found, None)


def _softcap(model: Any) -> float | None:
    found: float | None = getattr(model.config, "final_logit_softcapping", None)
    return found


def _why_not_now(model: Any, given: dict[str, Any]) -> str | None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        return "its loss function is not transformers' own"
    kept = given.get("logits_to_keep", 0)
    if not isinstance(kept, int) or kept != 0:
        return "logits_to_keep asks for some of the logits"
    return why_not_head(model.get_output_embeddings())


def _fused(model: Any, **given: Any) -> Any:
    """The stock forwards' own course, with the loss in place of the head and its logits."""
    labels = given.pop("labels")
    given.pop("logits_to_keep", None)
    if given.get("use_cache") is None and given.get("past_key_values") is None:
        given["use_cache"] = False  # no step reads it, and to fill it copies keys and values
    found = model.base_model(**given)
    hidden = found.last_hidden_state
    head = _head(model.get_output_embeddings(), hidden)
    logits = None
    if isinstance(head, str):
        runs.note(model, head)
        loss, logits = _by_logits(model, hidden, labels, given)
    else:
        runs.note(model, None)
        loss = _loss(model, head, hidden, labels, given)
    import transformers.modeling_outputs as outputs

    name = model.ferrotune_output
    fields = ("past_key_values", "hidden_states", "attentions", "cross_attentions")
    return getattr(outputs, name)(
        loss=loss, logits=logits, **{field: found[field] for field in fields if field in found}
    )


def _loss(model: Any, head: Head, hidden: Tensor, labels: Tensor, given: dict[str, Any]) -> Tensor:
    """As transformers' ``ForCausalLMLoss``, of the same keyword arguments."""
    ignore_index = given.get("ignore_index", -100)
    shifted = given.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    items = given.get("num_items_in_batch")
    if isinstance(items, torch.Tensor):
        items = items.to(hidden.device)
    adapter: dict[str, Any] = {}
    if head.adapter is not None:
        names = ("lora_A", "lora_B", "scaling", "dropout_p")
        adapter = {name: getattr(head.adapter, name) for name in names}
    return ops.linear_cross_entropy(
        hidden,
        head.weight,
        shifted.to(hidden.device).reshape(hidden.shape[:-1]),
        bias=head.bias,
        ignore_index=ignore_index,
        softcap=_softcap(model),
        num_items=items,
        **adapter,
    )


def _by_logits(
    model: Any, hidden: Tensor, labels: Tensor, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """What the stock forward does from here on."""
    logits = model.get_output_embeddings()(hidden)
    softcap = _softcap(model)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    loss = model.loss_function(
        logits=logits, labels=labels, vocab_size=model.config.vocab_size, **given
    )
    return loss, logits


def _trained_copy(head: Any) -> Any:
    """The layer that runs where PEFT trains the whole head (``modules_to_save``); else the head.

    Or why there is no one such layer.
    """
    if is_bypassed(head):
        return "its head has hooks"
    if not is_instance(head, "peft.utils.other", "ModulesToSaveWrapper"):
        return head
    if head.disable_adapters or len(head.active_adapters) != 1:
        return "its head's trained copies are disabled, or several are active"
    layer = head.modules_to_save[head.active_adapters[0]]
    return "its head has hooks" if is_bypassed(layer) else layer


def _head(head: Any, x: Tensor) -> Head | str:
    """The head's parts, or why it must run by itself with x."""
    layer = _trained_copy(head)
    adapter = None
    if is_instance(layer, "peft.tuners.lora.layer", "LoraLayer"):
        adapters = lora.adapters_now(layer, x, (), {})
        if isinstance(adapters, str):
            return f"its head: {adapters}"
        if len(adapters) != 1 or adapters[0].lora_bias is not None:
            return "its head has several adapters, or a lora_bias"
        adapter, layer = adapters[0], layer.base_layer
        if is_bypassed(layer):
            return "its head's base layer has hooks"
    weight, bias = layer.weight, layer.bias
    reason = runs.not_for_ferrotune(x)
    if reason is not None:
        return reason
    if not is_plain(weight):
        return f"its head's weight is a {type(weight).__name__}"
    if weight.device != x.device:
        return f"its head is on {weight.device}, the hidden states on {x.device}"
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if not autocast and (weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)):
        return f"its head is {dtype_name(weight.dtype)}, the hidden states {dtype_name(x.dtype)}"
    return Head(weight, bias, adapter)
