"""verify: the stock model against the patched one, on the user's own batch."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import float64 as wide
from . import runs
from .base import dtype_name
from .certificate import Certificate, Difference
from .loss import CausalLMForward
from .masks import index_dropout
from .patcher import apply, restore
from .probe import Generators, Outcome, preserved, run

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

_PACKAGES = ("ferrotune", "torch", "peft", "transformers", "bitsandbytes")
# Relative differences that rounding explains, where no float64 tells whose they are.
_TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}
_TIMES, _EPSILONS = 3, 4
_FILL = 0.02


def verify(
    model: nn.Module,
    batch: Any,
    *,
    path: str | os.PathLike[str] | None = None,
    float64: bool = True,
    fused_loss: bool = False,
) -> Certificate:
    """Runs the stock model and the patched one on ``batch`` and compares outputs and gradients.

    The first thing to run on a new model. Both run in training mode, from the same random state;
    every ``nn.Dropout`` applies ferrotune's masks meanwhile, so that both drop the same elements.
    A copy in float64 says how far each is from the truth, if memory allows. A lora_B that is all
    zero, as PEFT initialises it, holds small random values meanwhile: else the LoRA term and the
    gradients of lora_A would be zero. To verify under autocast, call it inside ``torch.autocast``.

    Args:
        model: as for `patch`, patched or not; its parameters, gradients, buffers, training mode,
            classes and the random number generators are afterwards as they were.
        batch: keyword arguments (a mapping), positional ones (a tuple or list) or the one
            argument of ``model``. With labels the model's own loss is taken.
        path: where to save the certificate as JSON.
        float64: whether to run the float64 copy.
        fused_loss: as for `patch`. The patched model then has no logits: the loss and the gradients
            are compared.

    Returns:
        A certificate; it is true if the models agree.

    Raises ``PatchError`` as `patch` does, ``TypeError`` if the model returns no float tensor, and
    ``OSError`` if ``path`` cannot be written.
    """
    target = None if path is None else Path(path)
    own: Counter[str] = Counter()
    with preserved(model), index_dropout(model):
        model.train()
        report, _ = apply(model, strict=False, fused_loss=fused_loss)
        with _filled_lora_b(model) as filled:
            start = Generators(model)
            replaced = [(module, type(module)) for module in model.modules()]
            restore([module for module, _ in replaced])
            stock = run(model, batch, start)
            truth, missing = (
                _truth(model, batch, start, stock) if float64 else (None, "not asked for")
            )
            for module, cls in replaced:
                module.__class__ = cls
            with runs.listening(lambda _, reason: own.update([reason] if reason else [])):
                patched = run(model, batch, start)
        if any(isinstance(module, CausalLMForward) for module in model.modules()):
            for name in {"logits"} - patched.outputs.keys():
                stock.outputs.pop(name, None)
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        lowest = _lowest(model)
        differences, failures = _compare(stock, patched, truth, lowest)
    kind = next((p.device.type for p in model.parameters()), "cpu")
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    certificate = Certificate(
        passed=not failures,
        failures=tuple(failures),
        rule=_rule(truth is not None, lowest),
        differences=tuple(differences),
        loss_stock=stock.loss,
        loss_patched=patched.loss,
        loss_float64=None if truth is None else truth.loss,
        float64=missing or "run",
        layers={k: report.counts(k) for k in dict.fromkeys(one.kind for one in report.layers)},
        own_forward=dict(own),
        filled=filled,
        device=kind,
        autocast=None if cast is None else dtype_name(cast),
        dropout=dropout,
        versions=_versions(),
    )
    if target is not None:
        certificate.save(target)
    return certificate


@contextmanager
def _filled_lora_b(model: nn.Module) -> Iterator[int]:
    """Small random values in every lora_B that is all zero; yields how many there were."""
    generator = torch.Generator().manual_seed(0)
    zero = [
        parameter
        for name, parameter in model.named_parameters()
        if ".lora_B." in f".{name}" and name.endswith(".weight") and not parameter.any()
    ]
    saved = [parameter.detach().clone() for parameter in zero]
    with torch.no_grad():
        for parameter in zero:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _FILL)
    try:
        yield len(zero)
    finally:
        with torch.no_grad():
            for parameter, value in zip(zero, saved, strict=True):
                parameter.copy_(value)


def _truth(
    model: nn.Module, batch: Any, start: Generators, stock: Outcome
) -> tuple[Outcome | None, str | None]:
    """The float64 run of the stock model, or why there is none."""
    reason = wide.why_not(model)
    if reason is not None:
        return None, reason
    kind = next((p.device.type for p in model.parameters()), "cpu")
    try:
        made, inputs = wide.float64_copy(model), wide.float64_batch(batch)
        with wide.in_float64(kind):
            found = run(made, inputs, start)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    if not found.generators.same_torch(stock.generators):
        return None, "the model draws other random numbers in float64"
    return found, None


def _lowest(model: nn.Module) -> torch.dtype:
    """The least precise float type that the model computes in."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for module in model.modules():
        dtype = getattr(module, "compute_dtype", None)
        if isinstance(dtype, torch.dtype):
            dtypes.add(dtype)
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    known = [dtype for dtype in dtypes if dtype in _TOLERANCES]
    return max(known, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _rule(with_truth: bool, lowest: torch.dtype) -> str:
    if with_truth:
        return (
            f"relative error against float64 <= {_TIMES} x the stock model's + {_EPSILONS} "
            f"machine epsilons of {dtype_name(lowest)}"
        )
    return f"relative difference from the stock model <= {_TOLERANCES[lowest]:g}"


def _compare(
    stock: Outcome, patched: Outcome, truth: Outcome | None, lowest: torch.dtype
) -> tuple[list[Difference], list[str]]:
    found: dict[tuple[str, str], list[_Pair]] = {}
    failures = []
    for kind in ("output", "gradient"):
        for name, a, b, exact in _triples(kind, stock, patched, truth):
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                if _is_something(a) or _is_something(b):
                    failures.append(f"{kind} {name}: stock {_text(a)}, patched {_text(b)}")
                continue
            pair = _Pair(name, a, b, exact)
            found.setdefault((kind, dtype_name(a.dtype)), []).append(pair)
            complaint = pair.complaint(lowest)
            if complaint is not None:
                failures.append(f"{kind} {name}: {complaint}")
    return [_summarise(*key, pairs) for key, pairs in found.items()], failures


def _triples(
    kind: str, stock: Outcome, patched: Outcome, truth: Outcome | None
) -> Iterator[tuple[str, Tensor | None, Tensor | None, Tensor | None]]:
    def of(outcome: Outcome | None) -> dict[str, Any]:
        if outcome is None:
            return {}
        return dict(outcome.outputs if kind == "output" else outcome.gradients)

    a, b, exact = of(stock), of(patched), of(truth)
    for name in dict.fromkeys((*a, *b)):
        yield name, a.get(name), b.get(name), exact.get(name)


class _Pair:
    """One tensor of both models."""

    def __init__(self, name: str, stock: Tensor, patched: Tensor, exact: Tensor | None):
        a, b = stock.double(), patched.double()
        self.name = name
        self.absolute = float((b - a).abs().max()) if a.numel() else 0.0
        self.relative = _relative(b, a)
        self.stock_error = None if exact is None else _relative(a, exact.to(a.device))
        self.patched_error = None if exact is None else _relative(b, exact.to(a.device))

    def complaint(self, lowest: torch.dtype) -> str | None:
        if self.stock_error is None or self.patched_error is None:
            if self.relative <= _TOLERANCES[lowest]:
                return None
            return f"relative difference {self.relative:.2e}"
        if self.patched_error <= _TIMES * self.stock_error + _EPSILONS * torch.finfo(lowest).eps:
            return None
        return f"error {self.patched_error:.2e}, stock {self.stock_error:.2e}"


def _relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖; 0 for two zeros, NaN where either has one."""
    difference, size = float((a - b).norm()), float(b.norm())
    return difference if size == 0 else difference / size


def _summarise(kind: str, dtype: str, pairs: list[_Pair]) -> Difference:
    worst = max(pairs, key=lambda pair: pair.relative)
    stock = [pair.stock_error for pair in pairs if pair.stock_error is not None]
    patched = [pair.patched_error for pair in pairs if pair.patched_error is not None]
    return Difference(
        kind=kind,
        dtype=dtype,
        tensors=len(pairs),
        max_absolute=max(pair.absolute for pair in pairs),
        max_relative=worst.relative,
        worst=worst.name,
        stock_error=max(stock) if stock else None,
        patched_error=max(patched) if patched else None,
    )


def _is_something(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.any())


def _text(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{list(tensor.shape)} {dtype_name(tensor.dtype)}"


def _versions() -> dict[str, str]:
    from importlib import metadata

    from ..version import version

    found = {"ferrotune": version()}
    for name in _PACKAGES[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
