"""The activation policy of a patched model: what each of its layers keeps, settled as it trains.

At the first forward of a training step, and when a larger one comes, the planner's memory model
gives the bytes of each level from the input's shape, and so the levels (`planning.policy`). They
are set as transformers' own switch sets checkpointing, by two attributes of each layer, and are
settled anew when somebody used that switch meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..planning import advice
from ..planning.memory import CHECKPOINTS, DTYPES, LEVELS, Setup
from ..planning.policy import MARGIN, choose, size_text
from ..planning.shapes import Linear, Shape, shape_of
from . import recompute
from .base import dtype_name, is_4bit, is_instance, quant_of
from .blocks import MlpForward, NormForward
from .errors import PatchError
from .loss import CausalLMForward, is_causal_lm
from .memory_report import MemoryReport

if TYPE_CHECKING:
    from ..planning.memory import Level
    from ..planning.policy import Policy

_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
_HELD = "_ferrotune_memory"
_INPUTS = ("input_ids", "inputs_embeds", "hidden_states")
_UNGATED = ("gpt2", "bert", "roberta")
_LEFT = 1 << 29  # bytes that "auto" leaves free
_log = logging.getLogger("ferrotune")


class Stack(NamedTuple):
    """The layers of a model, by name, and its sizes."""

    shape: Shape
    layers: dict[str, nn.Module]


class MemoryPolicy:
    """The policy of one stack of layers; ``size`` is in bytes, None for what is free."""

    def __init__(self, model: nn.Module, stack: Stack, size: int | None) -> None:
        self.model, self.size = model, size
        self.shape, self.named = stack
        self.layers = list(self.named.values())
        self.tokens = 0
        self.report = MemoryReport("auto" if size is None else size_text(size))
        # What the switch was before, and what this policy made of it.
        self.own: list[tuple[Any, Any]] = [_switched(layer) for layer in self.layers]
        self.set: list[tuple[Any, Any]] = list(self.own)
        self.layers[0].__dict__[_HELD] = self
        # What calls the layers one after the other: older versions of transformers look at the
        # switch before a layer's own hooks run.
        *above, _, _ = next(iter(self.named)).split(".")
        self.owner = model.get_submodule(".".join(above))
        self.hook = self.owner.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Leaves every layer as it was found, or as it was switched since."""
        self.hook.remove()
        self.layers[0].__dict__.pop(_HELD, None)
        self._look()
        for layer, own in zip(self.layers, self.own, strict=True):
            _set(layer, own)
            for module in layer.modules():
                module.__dict__.pop(recompute.MLP_AGAIN, None)

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not owner.training or not torch.is_grad_enabled():
            return
        given = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
        x = next((one for one in given if isinstance(one, torch.Tensor) and one.dim() > 1), None)
        if x is None:
            return
        changed = self._look()
        batch, length = x.shape[:2]
        if (batch * length <= self.tokens and not changed) or batch * length == 0:
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if changed and self.tokens >= batch * length:
            batch, length = self.report.batch_size, self.report.sequence_length
        if not x.is_floating_point():
            x = owner.get_input_embeddings().weight  # type: ignore[operator]
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._settle(x.dtype, batch, length, mask)

    def _look(self) -> bool:
        """Whether the switch was used since it was set here; takes down how."""
        changed = False
        for i, layer in enumerate(self.layers):
            now = _switched(layer)
            if now[0] is not self.set[i][0] or now[1] is not self.set[i][1]:
                self.own[i] = self.set[i] = now
                changed = True
        return changed

    def _settle(self, kind: torch.dtype, batch: int, length: int, mask: Any) -> None:
        self.tokens = max(self.tokens, batch * length)
        report = self.report
        report.batch_size, report.sequence_length = batch, length
        devices = {p.device for layer in self.layers for p in layer.parameters()}
        dtype = dtype_name(kind)
        if len(devices) != 1 or dtype not in DTYPES:
            where = "on several devices" if len(devices) != 1 else f"in {dtype}"
            report.note = f"left as they were: the model computes {where}"
            return
        setup, device = _setup(self.model, batch, length, dtype), devices.pop()
        lasting = _lasting(self.model, device)
        available = self._available(device)
        if available is None:
            report.note = "all is kept: 'auto' is what a CUDA device has free; give a size here"
            return
        asked = all(own[0] for own in self.own)  # for checkpointing
        shape = self.shape
        window = getattr(self._config(), "sliding_window", None) or length
        if length > window or (isinstance(mask, torch.Tensor) and not bool(mask.all())):
            # With a mask transformers gives every head of queries a copy of its keys and values.
            shape = dataclasses.replace(shape, key_value_heads=shape.heads)
        if getattr(self._config(), "_attn_implementation", "") == "eager":
            report.left_out = "without the matrices that eager attention keeps"
        policy = choose(shape, setup, available / (1 + MARGIN), self._ladder(asked), lasting)
        self._apply(policy.levels, asked)
        report.settled(policy, [*self.named], available)
        if not policy.fits:
            self._refuse(setup, policy, available)

    def _config(self) -> Any:
        return getattr(self.owner, "config", None)

    def _ladder(self, asked: bool) -> list[Level]:
        if asked:
            return [*CHECKPOINTS]
        missing: set[Level] = set()
        for layer in self.layers:
            inside = list(layer.modules())
            if not any(isinstance(module, MlpForward) for module in inside):
                missing |= {"mlp", "spill"}
            if not any(isinstance(module, NormForward) for module in inside):
                missing |= {"elementwise", "mlp", "spill"}
        return [level for level in LEVELS if level not in missing]

    def _available(self, device: torch.device) -> float | None:
        """Bytes that the model and its step may take."""
        if device.type != "cuda":
            return None if self.size is None else self.size
        total = torch.cuda.get_device_properties(device).total_memory
        held, free = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
        part = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
        most = min(held + free, total * part)
        return most - _LEFT if self.size is None else min(self.size, most)

    def _apply(self, levels: tuple[Level, ...], asked: bool) -> None:
        for i, (layer, level) in enumerate(zip(self.layers, levels, strict=True)):
            own = self.own[i]
            function: Any = None
            if level in ("elementwise", "mlp", "spill"):
                function = recompute.Elementwise(spilled=level == "spill")
            elif level in ("layer", "offload"):
                run = recompute.faster(own[1]) if asked else recompute.checkpointed
                function = recompute.Whole(run, offloaded=level == "offload")
            _set(layer, own if function is None else (True, function))
            self.set[i] = _switched(layer)
            for module in layer.modules():
                if isinstance(module, MlpForward) and level in ("mlp", "spill"):
                    module.__dict__[recompute.MLP_AGAIN] = True
                else:
                    module.__dict__.pop(recompute.MLP_AGAIN, None)

    def _refuse(self, setup: Setup, policy: Policy, available: float) -> None:
        text = (
            f"a step of {setup.batch_size} x {setup.sequence_length} tokens takes "
            f"{size_text(policy.peak)} at the least, of {size_text(available)}"
        )
        more = policy.peak - policy.memory.peak
        left = available / (1 + MARGIN) - more
        found = advice.changes(self.shape, setup, left, policy.levels)
        if found:
            text += "; try " + ", then ".join(one.change for one in found)
        if self.size is not None:
            self.tokens = 0
            raise PatchError(f"memory={self.report.asked}: {text}")
        _log.warning("memory='auto': %s", text)


def policy_of(modules: list[nn.Module]) -> list[MemoryPolicy]:
    """The policies that any of the modules holds."""
    return [one.__dict__[_HELD] for one in modules if _HELD in one.__dict__]


def stack_of(model: nn.Module) -> Stack:
    """The shape of a model and its layers by name.

    Raises ``PatchError`` if it is of a kind whose memory is not known.
    """
    where = "transformers.modeling_layers", "GradientCheckpointingLayer"
    layers = {name: one for name, one in model.named_modules() if is_instance(one, *where)}
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [one.get_text_config() for one in found if hasattr(one, "get_text_config")]
    if not configs:
        raise PatchError(f"memory: {type(model).__name__} is no model of transformers")
    try:
        ungated = configs[0].model_type in _UNGATED
        shape = _ungated(configs[0]) if ungated else shape_of(configs[0].to_dict(), "memory")
    except ValueError as error:
        raise PatchError(str(error)) from error
    if not any(is_causal_lm(module) for module in model.modules()):
        shape = dataclasses.replace(shape, vocabulary=1)
    if shape.layers != len(layers):
        raise PatchError(
            f"memory: the model has {len(layers)} layers that can be checkpointed, but its config "
            f"has {shape.layers}"
        )
    return Stack(shape, layers)


def _ungated(config: Any) -> Shape:
    """Of the older models, whose MLP is up, activation, down: what activations depend on."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    inner = inner or 4 * hidden
    return Shape(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        key_value_heads=heads,
        head_dim=hidden // heads,
        vocabulary=config.vocab_size,
        tied=True,
        linears=(Linear("up", inner, hidden), Linear("down", hidden, inner)),
        norms=2,
        head_norms=False,
        fused=False,
        gated=False,
    )


def _setup(model: nn.Module, batch: int, length: int, dtype: Any) -> Setup:
    lora: list[Any] = []
    quantised = fused = False
    for module in model.modules():
        if is_instance(module, "peft.tuners.lora.layer", "LoraLayer"):
            lora.append(module)
        quantised = quantised or is_4bit(module)
        fused = fused or isinstance(module, CausalLMForward)
    ranks = [layer.r[name] for layer in lora for name in layer.active_adapters if name in layer.r]
    dropout = [
        getattr(module, "p", 0.0)
        for layer in lora
        for module in getattr(layer, "lora_dropout", {}).values()
    ]
    return Setup(
        method="qlora" if quantised else "lora",
        r=max(ranks, default=1),
        lora_dropout=max(dropout, default=0.0),
        batch_size=batch,
        sequence_length=length,
        fused_loss=fused,
        dtype=dtype,
    )


def _lasting(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """Bytes of the model on its device with AdamW's states, or of all that is there if more is;
    and of what is trained."""
    found: dict[int, int] = {}
    trained = 0
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        quant = quant_of(module, check=False) if is_4bit(module) else None
        tensors += [] if quant is None else quant.tensors
        for tensor in tensors:
            if tensor is not None and tensor.device == device:
                found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel() * parameter.element_size()
    weights = sum(found.values())
    now = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return max(now, weights + 2 * trained), trained


def _switched(layer: nn.Module) -> tuple[Any, Any]:
    """transformers' switch as it is set on a layer itself; None for what is not."""
    return layer.__dict__.get(_SWITCH), layer.__dict__.get(_FUNCTION)


def _set(layer: nn.Module, switched: tuple[Any, Any]) -> None:
    for name, value in zip((_SWITCH, _FUNCTION), switched, strict=True):
        if value is not None:
            setattr(layer, name, value)
        elif name in layer.__dict__:
            delattr(layer, name)
