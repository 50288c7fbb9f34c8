"""patch and unpatch: the classes of layers are swapped, nothing else of a model is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from ..planning.policy import size_of
from . import runs
from .base import is_instance
from .blocks import COMPILED_SWITCH, DecoderForward
from .classes import Replaced, subclass, without
from .errors import PatchError
from .memory import MemoryPolicy, policy_of, stack_of
from .report import LORA, LayerReport, PatchReport
from .rule import Rule
from .rules import RULES, rule_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def patch(
    model: nn.Module,
    *,
    strict: bool = False,
    blocks: bool = True,
    fused_loss: bool = False,
    memory: str | float | None = None,
) -> PatchReport:
    """Makes the LoRA layers of PEFT and the 4-bit layers of bitsandbytes in ``model`` run through
    ferrotune, in place, with the same results to rounding.

    Each such layer gets a subclass of its own class that differs in its forward alone: parameters,
    names, hooks, state dicts, ``save_pretrained``, ``merge_and_unload``, ``set_adapter``,
    ``disable_adapter`` and all else stay PEFT's, and ``unpatch`` gives the classes back. Layers
    that ferrotune does not cover keep their own forward, and so does a replaced layer while a
    DoRA adapter or the like is active in it, or in a mixed batch (``adapter_names``).

    A second call takes up layers that came since (``add_adapter``), and reports on all.

    Args:
        model: any module: a ``PeftModel``, a transformers model with ``add_adapter``, one with
            ``inject_adapter_in_model``, or one with bitsandbytes' ``Linear4bit`` alone.
        strict: raises if a LoRA layer would be left behind.
        blocks: also what stands around the layers in transformers' models of Llama, Mistral,
            Qwen2 and 3, Gemma 1 to 3, Phi-3, GPT-2, BERT and RoBERTa: gated MLPs as one node of
            autograd and, without dropout, projections of one input as one operation; RMSNorm,
            rotary positions and GELU as one kernel. They run on CUDA; on other devices, and under
            ``torch.compile``, blocks keep their own forward.
        fused_loss: transformers' causal language models compute their loss by
            ``ops.linear_cross_entropy`` in training, where labels are given. It saves the memory
            of the logits, and the output's ``logits`` are then None: so it is to be asked for.
            Nor are keys and values cached unless ``use_cache`` is given. The Trainer reads the
            loss alone.
        memory: what each layer keeps for backward and what it recomputes, so that a step fits into
            a size (``"24 GiB"``, ``20e9``; of all tensors of the model and the step) or, "auto",
            into what the device has free, and recomputes as little as possible: first what norms
            and activations give, then MLPs; then what else they keep waits in pinned memory of the
            host, in as many layers as its copies do not hold up; then whole layers, and then their
            inputs wait there. It is worked out from the input's shape at the first forward of a
            training step, and again when a larger one comes; ``report.memory`` then says what.
            Where transformers' gradient checkpointing is on, every layer recomputes, and its input
            may wait on the host. None changes nothing.

    Returns:
        A report of every LoRA and 4-bit layer, every block and the loss: what replaced it, or why
        nothing did.

    Raises:
        PatchError: (a ``ValueError``) without any LoRA or 4-bit layer; for a layer that is merged,
            or whose shapes or quant state do not fit, naming it; with ``strict``, naming what was
            left behind. ``UnsupportedLayerError`` (also a ``NotImplementedError``) for a dtype or
            device that ferrotune does not compute on. The model is then as it was. With ``memory``
        also for a model whose memory is not known; and, in a forward, if a step does not fit the
        size that was given (with "auto" that is a warning in the log).
        ValueError: ``memory`` is no size.
    """
    return apply(model, strict=strict, blocks=blocks, fused_loss=fused_loss, memory=memory)[0]


def unpatch(model: nn.Module) -> int:
    """Gives every layer and block of ``model`` that `patch` replaced its own class back.

    Returns how many layers there were. Raises ``PatchError`` if another library changed such a
    module's class after `patch`; the model is then as it was.
    """
    _check_module(model)
    modules = list(model.modules())
    found = restore(modules)
    for policy in policy_of(modules):
        policy.remove()
    return found


def apply(
    model: nn.Module,
    *,
    strict: bool,
    blocks: bool = True,
    fused_loss: bool = False,
    memory: str | float | None = None,
) -> tuple[PatchReport, list[nn.Module]]:
    """`patch`, and the modules that it replaced."""
    _check_module(model)
    size = None if memory is None or memory == "auto" else size_of(memory)
    found = list(_look(model, blocks, fused_loss))
    if not any(rule in RULES for _, _, rule, _ in found):
        raise PatchError(_nothing(model))
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    layers: list[LayerReport] = []
    told: set[int] = set()  # bases of LoRA layers: one row tells of both
    for name, module, rule, place in found:
        reason = place or rule.why_not(module)
        if reason is None and not isinstance(module, Replaced):
            rule.check(name, module)
            swaps.append((module, subclass(type(module), rule.replacement)))
        if reason is None:
            told.add(id(getattr(module, "base_layer", None)))
        if id(module) not in told:
            layers.append(_report(name, module, rule, reason))
    kinds = {rule.kind for rule in RULES}
    policies = policy_of(list(model.modules()))
    report = PatchReport(
        tuple(one for one in layers if one.kind in kinds),
        tuple(one for one in layers if one.kind not in kinds),
        policies[0].report if policies and memory is None else None,
    )
    if strict:
        _refuse_left(report)
    if memory is not None:
        stack = stack_of(model)
        for policy in policies:
            policy.remove()
        report = replace(report, memory=MemoryPolicy(model, stack, size).report)
    for module, made in swaps:
        module.__class__ = made
        if isinstance(module, DecoderForward):
            module.take_switch()
    return report, [module for module, _ in swaps]


def restore(modules: list[nn.Module]) -> int:
    """Gives those of ``modules`` that are replaced their own classes back; returns how many of
    them were layers."""
    replaced: list[tuple[nn.Module, type[nn.Module]]] = [
        (module, module.ferrotune_stock) for module in modules if isinstance(module, Replaced)
    ]
    for module, _ in replaced:
        if "ferrotune_stock" not in type(module).__dict__ and not module.ferrotune_block:
            raise PatchError(
                f"a {type(module).__name__} layer got another class after patch (FSDP2's "
                "fully_shard does that): unpatch before, or keep it"
            )
    layers = sum(not module.ferrotune_block for module, _ in replaced)
    for module, stock in replaced:
        module.__class__ = without(type(module), stock)
        module.__dict__.pop(COMPILED_SWITCH, None)
    return layers


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def _look(
    model: nn.Module, blocks: bool, fused_loss: bool
) -> Iterator[tuple[str, nn.Module, Rule, str | None]]:
    """Every module that a rule is for, outer before inner, and why its place keeps it as it is."""
    inside: list[str] = []
    for name, module in model.named_modules():
        rule = rule_of(module, blocks, fused_loss)
        if rule is None:
            continue
        place = any(name.startswith(prefix) for prefix in inside)
        reason = "lora.MultiheadAttention merges it for each call, and never calls it"
        if is_instance(module, "peft.tuners.lora.layer", "MultiheadAttention"):
            inside.append(f"{name}." if name else "")
        yield name or "(the model itself)", module, rule, reason if place else None


def _report(name: str, module: nn.Module, rule: Rule, reason: str | None) -> LayerReport:
    latest = runs.last_reason(module)
    notes = (
        [] if reason else [rule.notes(module), latest and f"its latest forward was not: {latest}"]
    )
    return LayerReport(
        name=name,
        kind=rule.kind,
        layer=rule.describe(module),
        details=rule.details(module),
        replaced_by=None if reason else rule.product,
        reason=reason,
        note="; ".join(note for note in notes if note) or None,
    )


def _refuse_left(report: PatchReport) -> None:
    left = [layer for layer in report.left if layer.kind == LORA]
    if left:
        listed = "\n".join(f"  {layer.name}: {layer.reason}" for layer in left)
        raise PatchError(
            f"{len(left)} LoRA layers would keep PEFT's forward (strict=True):\n{listed}",
            *(layer.name for layer in left),
        )


def _nothing(model: nn.Module) -> str:
    text = f"{type(model).__name__} has no LoRA layers and no 4-bit layers: nothing to patch"
    if any(
        is_instance(module, "peft.tuners.tuners_utils", "BaseTunerLayer")
        for module in model.modules()
    ):
        return f"{text} (its PEFT layers are of another method than LoRA)"
    return f"{text}; call peft.get_peft_model first"
