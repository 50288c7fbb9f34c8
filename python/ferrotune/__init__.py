"""LoRA and QLoRA fine-tuning at the speed of the frozen model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from ._native import CudaError, FormatError
    from .auditing import AuditResult
    from .commands.audit import audit
    from .commands.compare import compare
    from .commands.demo import demo
    from .commands.doctor import DoctorResult, doctor
    from .commands.evaluate import eval as eval  # a star import would hide the builtin
    from .commands.evaluate import evaluate
    from .commands.generate import generate
    from .commands.merge import merge
    from .commands.plan import PlanResult, plan
    from .commands.split import split
    from .commands.train import train
    from .comparing.result import CompareResult
    from .dataset import DataCollator as DataCollator
    from .dataset import PackedDataset as PackedDataset
    from .dataset import load_data as load_data
    from .options import SettingError

    # Below what needs PyTorch: no part of a star import, which works without.
    from .patching import Certificate as Certificate
    from .patching import PatchError as PatchError
    from .patching import PatchReport as PatchReport
    from .patching import patch as patch
    from .patching import unpatch as unpatch
    from .patching import verify as verify
    from .patching.callback import TrainerCallback as TrainerCallback
    from .quant import Quantized4bit, dequantize_4bit, quantize_4bit
    from .results import (
        DemoResult,
        EvaluateResult,
        GenerateResult,
        MergeResult,
        SplitResult,
        TrainInterrupted,
        TrainResult,
    )

    __version__: str

__all__ = [
    "AuditResult",
    "CompareResult",
    "CudaError",
    "DemoResult",
    "DoctorResult",
    "EvaluateResult",
    "FormatError",
    "GenerateResult",
    "MergeResult",
    "PlanResult",
    "Quantized4bit",
    "SettingError",
    "SplitResult",
    "TrainInterrupted",
    "TrainResult",
    "audit",
    "compare",
    "demo",
    "dequantize_4bit",
    "doctor",
    "evaluate",
    "generate",
    "merge",
    "plan",
    "quantize_4bit",
    "split",
    "train",
]

# Public name -> (module, name there). Nothing is imported before its first use, so that
# `import ferrotune` stays a matter of milliseconds.
_EXPORTS = {
    "AuditResult": ("auditing", "AuditResult"),
    "Certificate": ("patching", "Certificate"),
    "CompareResult": ("comparing.result", "CompareResult"),
    "CudaError": ("_native", "CudaError"),
    "DataCollator": ("dataset", "DataCollator"),
    "DemoResult": ("results", "DemoResult"),
    "DoctorResult": ("commands.doctor", "DoctorResult"),
    "EvaluateResult": ("results", "EvaluateResult"),
    "FormatError": ("_native", "FormatError"),
    "GenerateResult": ("results", "GenerateResult"),
    "MergeResult": ("results", "MergeResult"),
    "PackedDataset": ("dataset", "PackedDataset"),
    "PatchError": ("patching", "PatchError"),
    "PatchReport": ("patching", "PatchReport"),
    "PlanResult": ("commands.plan", "PlanResult"),
    "Quantized4bit": ("quant", "Quantized4bit"),
    "SettingError": ("options", "SettingError"),
    "SplitResult": ("results", "SplitResult"),
    "TrainInterrupted": ("results", "TrainInterrupted"),
    "TrainResult": ("results", "TrainResult"),
    "TrainerCallback": ("patching.callback", "TrainerCallback"),
    "__version__": ("version", "version"),
    "audit": ("commands.audit", "audit"),
    "compare": ("commands.compare", "compare"),
    "demo": ("commands.demo", "demo"),
    "dequantize_4bit": ("quant", "dequantize_4bit"),
    "doctor": ("commands.doctor", "doctor"),
    "eval": ("commands.evaluate", "eval"),
    "evaluate": ("commands.evaluate", "evaluate"),
    "generate": ("commands.generate", "generate"),
    "load_data": ("dataset", "load_data"),
    "merge": ("commands.merge", "merge"),
    "patch": ("patching", "patch"),
    "plan": ("commands.plan", "plan"),
    "quantize_4bit": ("quant", "quantize_4bit"),
    "split": ("commands.split", "split"),
    "train": ("commands.train", "train"),
    "unpatch": ("patching", "unpatch"),
    "verify": ("patching", "verify"),
}

# Packages that need PyTorch.
_PACKAGES = ("nn", "ops")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _PACKAGES:
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                f"ferrotune.{name} needs PyTorch: pip install 'ferrotune[torch]'"
            ) from None
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value() if name == "__version__" else value
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_PACKAGES})
