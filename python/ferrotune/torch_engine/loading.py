"""The model of a run: transformers' own, with 4-bit layers, PEFT's adapters, our forward."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..nn.checkpoint import to_tensors
from . import bottleneck

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WHOLE = ("full", "freeze")


class Loaded(NamedTuple):
    """`model` is PEFT's where its format has the method; `base` is transformers' inside of it."""

    model: nn.Module
    base: Any
    autocast: torch.dtype | None
    facts: dict[str, Any]


def load(settings: Mapping[str, Any], outline: Mapping[str, Any], device: torch.device) -> Loaded:
    """The model on its device, in evaluation mode, nothing of it trained but PEFT's own.

    On GPUs it computes in bfloat16. There frozen weights are held in it; where weights of the model
    are trained, all are held in float32, and autocast computes. On the CPU all is float32.
    """
    method = settings["method"]
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = method in WHOLE
    held = torch.float32 if whole else low
    with _quiet():
        base = _pretrained(settings["model"], outline, held)
        model = _adapted(base, settings, outline, device, held)
    facts: dict[str, Any] = {"device": _device_name(device), "dtype": str(low)[6:]}
    facts["quantized_bytes"] = _quantized_bytes(base)
    if method in ("lora", "qlora"):
        from .. import patching

        report = patching.patch(model)
        done, all_ = report.counts("LoRA")
        facts["layers"] = f"{done} of {all_} LoRA layers run through ferrotune"
    return Loaded(model, base, low if whole and low != held else None, facts)


def _adapted(
    base: Any,
    settings: Mapping[str, Any],
    outline: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """The model with the method's layers, on its device."""
    base.eval().requires_grad_(False)
    names = [part["name"] for one in outline["parameters"] for part in one["segments"]]
    method, adapter = settings["method"], outline["adapter"]
    if method == "qlora":
        for name in outline["linear_modules"]:
            if f"{name}.weight" not in names:
                _quantize(base, name, settings, device, dtype)
        base.is_loaded_in_4bit = True  # PEFT looks for this
    model: Any = base
    if adapter is not None and "adapter_type" in adapter:
        bottleneck.attach(base, adapter, names)
    elif adapter is not None:
        import peft

        # The trainer's values come later, wherever PEFT would begin.
        given = {**adapter, "inference_mode": False}
        if given["peft_type"] == "PROMPT_TUNING":
            given["prompt_tuning_init"] = "RANDOM"
        make: Any = peft.PeftConfig
        model = peft.get_peft_model(base, make.from_peft_type(**given))
    return model.to(device).eval()


def _pretrained(folder: str, outline: Mapping[str, Any], dtype: torch.dtype) -> Any:
    import transformers

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    auto: Any = transformers.AutoModelForCausalLM
    if outline["task"] == "classification":
        auto = transformers.AutoModelForSequenceClassification
        # A head for other labels is made anew; the trainer gives it its values.
        options |= {"num_labels": len(outline["labels"]), "ignore_mismatched_sizes": True}
    model = auto.from_pretrained(folder, local_files_only=True, **options)
    # The trainer says what is padding: no token is so by its number.
    model.config.pad_token_id = None
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model


def _quantize(
    base: nn.Module,
    name: str,
    settings: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Puts bitsandbytes' layer in the place of a dense one, with the settings' 4-bit weight."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    parent, _, last = name.rpartition(".")
    holder = base.get_submodule(parent)
    dense: Any = getattr(holder, last)
    if isinstance(dense, Linear4bit):  # stored in 4 bits
        return
    weight = dense.weight.detach()
    if type(dense).__name__ == "Conv1D":
        weight = weight.T
    quant = ops.quantize_4bit(
        weight.to(device).contiguous(),
        quant_type=settings["quant_type"],
        blocksize=settings["blocksize"],
        double_quant=settings["double_quant"],
    )
    n, k = quant.shape
    make: Any = Linear4bit
    layer = make(k, n, bias=False, compute_dtype=dtype, device="meta")
    layer.weight = Params4bit.from_prequantized(
        quant.packed, to_tensors(quant), device=device, module=layer
    )
    if dense.bias is not None:
        layer.bias = nn.Parameter(dense.bias.detach(), requires_grad=False)
    setattr(holder, last, layer.eval())


def _quantized_bytes(base: nn.Module) -> int:
    """Bytes of the 4-bit weights and their absmax."""
    total = 0
    for module in base.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and not hasattr(module, "base_layer"):
            parts = [module.weight, state.absmax]
            if state.nested:
                parts.append(state.state2.absmax)
            total += sum(part.nbytes for part in parts)
    return total


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without bars, remarks on new heads (which the trainer makes) and on future versions."""
    import transformers.utils.logging as module

    remarks: Any = module
    level, bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity(logging.ERROR)
    remarks.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        remarks.set_verbosity(level)
        if bars:
            remarks.enable_progress_bar()
