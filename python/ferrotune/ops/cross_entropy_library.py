"""Linear cross-entropy as PyTorch's dispatcher knows it: schemas, fakes and autograd.

``torch.compile``, ``torch.export`` and ``torch.library.opcheck`` see these; eager code takes the
shorter way of ``cross_entropy``. A gradient that was not asked for is an empty tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .autograd import no_autocast
from .cross_entropy_chunks import run, steps
from .cross_entropy_types import Asked, Found, Gradients, Head, Settings
from .library import define, second_derivative

if TYPE_CHECKING:
    from torch import Tensor

_SCHEMAS = {
    "linear_cross_entropy": (
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? h, Tensor? lora_B, Tensor labels, "
        "int ignore_index, float label_smoothing, float softcap, str reduction, Tensor? divisor, "
        "bool[] asked) -> (Tensor loss, Tensor scale, Tensor grad_hidden, Tensor grad_weight, "
        "Tensor grad_bias, Tensor grad_h, Tensor grad_lora_B)"
    ),
    "scale_gradient": ("(Tensor gradient, Tensor scale, Tensor grad, ScalarType dtype) -> Tensor"),
}
_TENSORS = 5  # that may get gradients, in the order of `Asked`


def call(
    x: Tensor, head: Head, labels: Tensor, settings: Settings, divisor: Tensor | None
) -> Tensor:
    """The loss of x ``[m, d]`` by the operator."""
    graded = torch.is_grad_enabled()
    asked = [graded and one is not None and one.requires_grad for one in (x, *head)]
    return torch.ops.ferrotune.linear_cross_entropy(x, *head, labels, *settings, divisor, asked)[0]  # type: ignore[no-any-return]


def _unpack(arguments: Any) -> tuple[Tensor, Head, Tensor, Settings, Tensor | None, Asked]:
    x, head, labels = arguments[0], Head(*arguments[1:5]), arguments[5]
    return x, head, labels, Settings(*arguments[6:10]), arguments[10], Asked(*arguments[11])


def _flat(found: Found, x: Tensor) -> tuple[Tensor, ...]:
    return (
        found.loss,
        found.scale,
        *(x.new_empty(0) if gradient is None else gradient for gradient in found.gradients),
    )


def _kernel(*arguments: Any) -> tuple[Tensor, ...]:
    x, head, labels, settings, divisor, asked = _unpack(arguments)
    with no_autocast(x):
        found = run(x.contiguous(), head, labels.contiguous(), settings, divisor, asked)
    # An operator's results are memory of their own; on CUDA, the scale is part of a larger one.
    return _flat(found._replace(scale=found.scale.clone()), x)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, head, *_, asked = _unpack(arguments)
    wide = torch.promote_types(x.dtype, torch.float32)

    def like(wanted: bool, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return x.new_empty(tensor.shape, dtype=dtype) if wanted and tensor is not None else None

    h = head.h
    gradients = Gradients(
        like(asked.hidden, x, x.dtype),
        like(asked.weight, head.weight, wide),
        like(asked.bias, head.bias, wide),
        like(asked.h, h, x.dtype if h is None else h.dtype),
        like(asked.lora_B, head.lora_B, wide),
    )
    one = x.new_empty((), dtype=wide)
    return _flat(Found(one, torch.empty_like(one), gradients), x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, scale, *gradients = output
    ctx.mark_non_differentiable(scale, *gradients)
    ctx.asked, ctx.count = inputs[11], len(inputs)
    ctx.dtypes = [None if one is None else one.dtype for one in inputs[:_TENSORS]]
    ctx.save_for_backward(scale, *gradients)


def _grads(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    scale, *gradients = ctx.saved_tensors
    found = [
        torch.ops.ferrotune.scale_gradient(gradient, scale, grad, dtype) if wanted else None
        for wanted, gradient, dtype in zip(ctx.asked, gradients, ctx.dtypes, strict=True)
    ]
    return (*found, *[None] * (ctx.count - _TENSORS))


def _scale(gradient: Tensor, scale: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    found: Tensor = steps(gradient).scale_gradient(gradient, scale, grad, dtype)
    return found


def _scale_fake(gradient: Tensor, scale: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


define("linear_cross_entropy", _SCHEMAS["linear_cross_entropy"], _kernel, _fake)
define("scale_gradient", _SCHEMAS["scale_gradient"], _scale, _scale_fake)
torch.library.register_autograd("ferrotune::linear_cross_entropy", _grads, setup_context=_setup)
torch.library.register_autograd("ferrotune::scale_gradient", second_derivative)
