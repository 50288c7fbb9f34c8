"""Cross-entropy of a linear head, without ever holding its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from . import cross_entropy_library as library
from .autograd import no_autocast
from .cross_entropy_chunks import run, steps
from .cross_entropy_types import Asked, Head, Settings

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """``F.cross_entropy(hidden·weightᵀ + bias, labels)`` with a chunk of the logits at a time.

    The logits of a chunk of tokens are computed, and their gradients in their place; from those,
    at once, the gradients of ``hidden`` and of what else is trained. Backward only scales them. So
    a training step needs the workspace of a chunk, under 512 MiB on CUDA, beside the gradients.

    Args:
        hidden: ``[..., d]``, float32, float16 or bfloat16 (float64 too, in plain PyTorch).
        weight: of the head, ``[V, d]`` in hidden's dtype, frozen or trained.
        labels: ``[...]``, integers: a class, or ``ignore_index``. Those of a causal model are to be
            shifted by the caller.
        bias: ``[V]``, of hidden's dtype.
        lora_A: ``[r, d]``, with ``lora_B`` ``[V, r]``: an adapter of the head, as in
            ``lora_linear``, which ``scaling``, ``dropout_p`` and ``seed`` are of, too.
        label_smoothing: the part of a label that is spread over all classes, from 0 to 1, as in
            ``F.cross_entropy`` (Szegedy et al., 2016).
        softcap: logits are ``softcap · tanh(logits / softcap)`` (Gemma 2's final one).
        reduction: "mean" over the tokens that are not ignored (NaN without any, as in PyTorch), or
            "sum".
        num_items: what the sum is divided by in place of their number: the tokens of a whole batch
            whose parts are accumulated (``num_items_in_batch`` of transformers). A tensor of one
            element on hidden's device, or a number.

    Returns:
        The loss, float32 (float64 of float64) without dimensions. Under autocast, hidden and the
        head are cast to its dtype first.

    A label that is out of range raises ``IndexError`` on the CPU; on CUDA, where nothing waits for
    the device, it stops the device with an assertion, as PyTorch's own cross-entropy does. The
    same input gives the same bits. A second derivative raises ``RuntimeError``. Raises
    ``ValueError`` or ``TypeError`` naming the argument that does not fit.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias, lora_A, lora_B = (
            None if one is None else one.to(dtype) for one in (bias, lora_A, lora_B)
        )
    settings = Settings(ignore_index, label_smoothing, softcap or 0.0, reduction)
    _check(hidden, weight, labels, bias, settings, num_items)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None, not {softcap}")
    h = _adapter(hidden, weight, lora_A, lora_B, scaling, dropout_p, seed)
    head = Head(weight, bias, h, lora_B if h is not None else None)
    x = hidden.reshape(-1, hidden.shape[-1])
    flat = labels.reshape(-1).to(torch.int64)
    divisor = _divisor(num_items, x)
    if torch.compiler.is_compiling():
        return library.call(x, head, flat, settings, divisor)
    call = (flat.contiguous(), settings, divisor, torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(call, x, *head)  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the labels and settings, and by itself every tensor that may get a gradient."""

    @staticmethod
    def forward(ctx: Any, call: Any, x: Tensor, *parts: Tensor | None) -> Tensor:
        labels, settings, divisor, graded = call
        asked = Asked(*(graded and needed for needed in ctx.needs_input_grad[1:]))
        head = Head(*parts)  # type: ignore[arg-type]
        with no_autocast(x):
            found = run(x.contiguous(), head, labels, settings, divisor, asked)
        ctx.steps = steps(x)
        ctx.dtypes = [None if one is None else one.dtype for one in (x, *parts)]
        ctx.save_for_backward(found.scale, *found.gradients)
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _once(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    scale, *gradients = ctx.saved_tensors
    return None, *(
        None if gradient is None else ctx.steps.scale_gradient(gradient, scale, grad, dtype)
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
    )


_once = once_differentiable(_backward)  # where a second derivative is prepared, to refuse it


def _adapter(
    hidden: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor | None:
    """``scaling · dropout(hidden) · lora_Aᵀ`` ``[m, r]``, in the wider of their dtypes."""
    if lora_A is None or lora_B is None:
        if lora_A is not lora_B:
            raise ValueError("lora_A and lora_B go together")
        return None
    from . import lora_linear

    r, d = lora_A.shape[0], hidden.shape[-1]
    if lora_A.shape != (r, d) or lora_B.shape != (weight.shape[0], r):
        raise ValueError(
            f"lora_A must be [r, {d}] and lora_B [{weight.shape[0]}, r], not "
            f"{list(lora_A.shape)} and {list(lora_B.shape)}"
        )
    wide = hidden.to(torch.promote_types(hidden.dtype, lora_A.dtype))
    one = torch.eye(r, dtype=lora_A.dtype, device=lora_A.device)  # in place of lora_B
    h = lora_linear(wide, None, lora_A, one, scaling, dropout_p=dropout_p, seed=seed)
    return h.reshape(-1, r)


def _divisor(num_items: Tensor | float | None, x: Tensor) -> Tensor | None:
    wide = torch.promote_types(x.dtype, torch.float32)
    if num_items is None:
        return None
    if isinstance(num_items, torch.Tensor):
        return num_items.detach().reshape(()).to(wide)
    return torch.full((), float(num_items), dtype=wide, device=x.device)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    settings: Settings,
    num_items: Tensor | float | None,
) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(
            f"weight must be a dense tensor [V, d], not a {type(weight).__name__}: dequantise it"
        )
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden must be float32, float16 or bfloat16, not {hidden.dtype}")
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden must be [..., d] and weight [V, d], not {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight is {weight.dtype}, but hidden is {hidden.dtype}: cast one of them")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels must be integers, not {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be {list(hidden.shape[:-1])}, one for each of hidden's "
            f"{list(hidden.shape)}, not {list(labels.shape)}"
        )
    shape = weight.shape[:1]
    if bias is not None and (bias.shape != shape or bias.dtype != hidden.dtype):
        raise ValueError(
            f"bias must be {list(shape)} in {hidden.dtype}, not {list(bias.shape)} {bias.dtype}"
        )
    if not 0 <= settings.label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {settings.label_smoothing}")
    if settings.reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {settings.reduction!r}")
    if num_items is not None and settings.reduction == "sum":
        raise ValueError("num_items divides a mean: leave it out with reduction='sum'")
    if isinstance(num_items, torch.Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items must be one number, not {list(num_items.shape)}")
    given = {"weight": weight, "labels": labels, "bias": bias, "num_items": num_items}
    for name, tensor in given.items():
        if isinstance(tensor, torch.Tensor) and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
