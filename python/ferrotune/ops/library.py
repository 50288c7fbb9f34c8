"""The operations as PyTorch's dispatcher knows them: schemas, fakes and autograd.

``torch.compile``, ``torch.export`` and ``torch.library.opcheck`` see these; eager code takes the
shorter way of ``autograd``. Lists are by projection (see ``flat``); ``h`` is what backward needs,
``scaling · dropout(x) · Aᵀ`` in the backend's own form (its ``saved``), and has no gradient. A
tensor that is not there is an empty one in a list: autograd here knows no lists with holes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import flat
from .autograd import as_rows, no_autocast
from .backend import choose
from .types import Need, Quant4bit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_GROUP = (
    "Tensor[] weight, Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax, "
    "Tensor[] nested_code, Tensor[] nested_offset, Tensor[] bias, Tensor[] lora_A, "
    "Tensor[] lora_B, Tensor[] lora_bias, float[] scaling, float[] dropout_p, int[] streams, "
    "str[] quant_types, str[] quant_dtypes, int[] blocksizes, int[] nested_blocksizes, "
    "int[] rows, int[] columns"
)
_ONE = (
    "Tensor? weight, Tensor? packed, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, Tensor? bias, Tensor? lora_A, Tensor? lora_B, Tensor? lora_bias, "
    "float scaling, float dropout_p, int stream, str quant_type, str quant_dtype, int blocksize, "
    "int nested_blocksize, int rows, int columns"
)
_SCHEMAS = {
    "lora_linear_group": f"(Tensor x, Tensor? seed, {_GROUP}) -> (Tensor[] y, Tensor[] h)",
    "lora_linear_group_backward": (
        f"(Tensor[] grad, Tensor[] h, bool[] need, Tensor x, Tensor? seed, {_GROUP}) -> "
        "(Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor[] bias, Tensor[] lora_bias)"
    ),
    "lora_linear": f"(Tensor x, Tensor? seed, {_ONE}) -> (Tensor y, Tensor h)",
    "quantize_4bit": (
        "(Tensor values, int blocksize, str quant_type, bool double_quant) -> (Tensor packed, "
        "Tensor absmax, Tensor nested_absmax, Tensor nested_code, Tensor nested_offset)"
    ),
    "dequantize_4bit": (
        "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
        "Tensor? nested_offset, str quant_type, int blocksize, int nested_blocksize, "
        "int[] shape, ScalarType quant_dtype, ScalarType dtype) -> Tensor"
    ),
}
_TENSORS = len(flat.TENSORS)


def define(name: str, schema: str, kernel: Any, fake: Any) -> None:
    """Registers an operator of the namespace ``ferrotune``."""
    torch.library.define(f"ferrotune::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"ferrotune::{name}", "default", kernel)
    torch.library.register_fake(f"ferrotune::{name}", fake)


def _projections(arguments: Sequence[Any]) -> list[Any]:
    columns = [[flat.present(tensor) for tensor in column] for column in arguments[:_TENSORS]]
    return flat.restore(columns, flat.Numbers(*arguments[_TENSORS:]))


def _group(x: Tensor, seed: Tensor | None, *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    with no_autocast(x):
        ys, hs = choose(x).forward(as_rows(x), _projections(arguments), seed)
    return (
        [y.view(*x.shape[:-1], y.shape[1]) for y in ys],
        [x.new_empty(0) if h is None else h for h in hs],
    )


def _group_fake(
    x: Tensor, seed: Tensor | None, *arguments: Any
) -> tuple[list[Tensor], list[Tensor]]:
    projections = _projections(arguments)
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    rows = x.new_empty(m, x.shape[-1])
    return (
        [x.new_empty(*x.shape[:-1], projection.shape[0]) for projection in projections],
        [
            x.new_empty(0) if form is None else x.new_empty(form[0], dtype=form[1])
            for form in choose(x).saved(rows, projections)
        ],
    )


def _group_backward(
    grads: list[Tensor],
    hs: list[Tensor],
    need: list[bool],
    x: Tensor,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    projections = _projections(arguments)
    asked = _need(need, len(projections))
    rows, flat_hs = as_rows(x), [flat.present(h) for h in hs]
    flat_grads = [as_rows(grad) for grad in grads]
    with no_autocast(x):
        found = choose(x).backward(flat_grads, rows, flat_hs, projections, seed, asked)

    def filled(column: list[Tensor | None]) -> list[Tensor]:
        return [x.new_empty(0) if grad is None else grad for grad in column]

    dx = x.new_empty(0) if found.x is None else found.x.view(x.shape)
    return dx, *(
        filled(column) for column in (found.lora_A, found.lora_B, found.bias, found.lora_bias)
    )  # type: ignore[return-value]


def _group_backward_fake(
    grads: list[Tensor],
    hs: list[Tensor],
    need: list[bool],
    x: Tensor,
    seed: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    projections = _projections(arguments)
    asked = _need(need, len(projections))

    def like(column: tuple[bool, ...], name: str) -> list[Tensor]:
        return [
            torch.empty_like(getattr(projection, name), memory_format=torch.contiguous_format)
            if wanted and getattr(projection, name) is not None
            else x.new_empty(0)
            for wanted, projection in zip(column, projections, strict=True)
        ]

    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if asked.x else x.new_empty(0)
    return (
        dx,
        like(asked.lora_A, "lora_A"),
        like(asked.lora_B, "lora_B"),
        like(asked.bias, "bias"),
        like(asked.lora_bias, "lora_bias"),
    )


def _need(flags: Sequence[bool], count: int) -> Need:
    """x, then by projection lora_A, lora_B, bias and lora_bias."""
    lora_A, lora_B, bias, lora_bias = (
        tuple(flags[1 + i * count : 1 + (i + 1) * count]) for i in range(4)
    )
    return Need(flags[0], lora_A, lora_B, bias, lora_bias)


def _group_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]
) -> None:
    x, seed, arguments = inputs[0], inputs[1], inputs[2:]
    hs = output[1]
    ctx.mark_non_differentiable(*hs)
    ctx.count = len(hs)
    ctx.numbers = arguments[_TENSORS:]
    columns = arguments[:_TENSORS]
    # By name, then by projection; what asks for a gradient is known from the tensors themselves.
    ctx.save_for_backward(x, seed, *hs, *(tensor for column in columns for tensor in column))
    places = [flat.TENSORS.index(name) for name in ("lora_A", "lora_B", "bias", "lora_bias")]
    ctx.need = [x.requires_grad] + [
        flat.present(tensor) is not None and tensor.requires_grad
        for place in places
        for tensor in columns[place]
    ]


def _group_grads(ctx: Any, grads: list[Tensor | None], _: Any) -> tuple[Any, ...]:
    count = ctx.count
    x, seed, *rest = ctx.saved_tensors
    hs, tensors = rest[:count], rest[count:]
    columns = [list(tensors[i * count : (i + 1) * count]) for i in range(_TENSORS)]
    numbers = flat.Numbers(*ctx.numbers)
    filled = [
        x.new_zeros(*x.shape[:-1], n) if grad is None else grad
        for grad, n in zip(grads, numbers.rows, strict=True)
    ]
    found = torch.ops.ferrotune.lora_linear_group_backward(
        filled, hs, ctx.need, x, seed, *_filled(x, columns), *numbers
    )
    need = _need(ctx.need, count)

    def given(column: list[Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
        return [grad if want else None for grad, want in zip(column, wanted, strict=True)]

    nothing = [None] * count
    result: list[Any] = [list(nothing) for _ in flat.TENSORS]
    for name, column in zip(("lora_A", "lora_B", "bias", "lora_bias"), found[1:], strict=True):
        result[flat.TENSORS.index(name)] = given(column, getattr(need, name))
    return (found[0] if need.x else None, None, *result, *(None for _ in numbers))


def _filled(x: Tensor, columns: list[list[Tensor | None]]) -> list[list[Tensor]]:
    return [
        [x.new_empty(0) if tensor is None else tensor for tensor in column] for column in columns
    ]


def _one(x: Tensor, seed: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    ys, hs = _group(x, seed, *([argument] for argument in arguments))
    return ys[0], hs[0]


def _one_fake(x: Tensor, seed: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    ys, hs = _group_fake(x, seed, *([argument] for argument in arguments))
    return ys[0], hs[0]


def _one_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    lists = tuple([argument] for argument in inputs[2:])
    _group_setup(ctx, (*inputs[:2], *lists), ([output[0]], [output[1]]))


def _one_grads(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    found = _group_grads(ctx, [grad], None)
    return (*found[:2], *(None if column is None else column[0] for column in found[2:]))


def _quantize(
    values: Tensor, blocksize: int, quant_type: str, double_quant: bool
) -> tuple[Tensor, ...]:
    quant = choose(values).quantize_4bit(values, blocksize, quant_type, double_quant)
    return tuple(
        values.new_empty(0, dtype=torch.float32) if part is None else part for part in quant.tensors
    )


def _quantize_fake(
    values: Tensor, blocksize: int, quant_type: str, double_quant: bool
) -> tuple[Tensor, ...]:
    elements = values.numel()
    blocks = (elements + blocksize - 1) // blocksize

    def f32(*shape: int) -> Tensor:
        return values.new_empty(shape, dtype=torch.float32)

    packed = values.new_empty((elements + 1) // 2, 1, dtype=torch.uint8)
    if not double_quant:
        return packed, f32(blocks), f32(0), f32(0), f32(0)
    return (
        packed,
        values.new_empty(blocks, dtype=torch.uint8),
        f32((blocks + 255) // 256),
        f32(256),
        f32(),
    )


def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    nested_blocksize: int,
    shape: list[int],
    quant_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    quant = Quant4bit(
        packed, absmax, nested_absmax, nested_code, nested_offset,
        quant_type, blocksize, nested_blocksize, tuple(shape), quant_dtype,
    )  # fmt: skip
    return choose(packed).dequantize_4bit(quant, dtype)


def _dequantize_fake(packed: Tensor, *arguments: Any) -> Tensor:
    shape, dtype = arguments[7], arguments[9]
    return packed.new_empty(shape, dtype=dtype)


def _codes_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    """Codes are no differentiable function of values, nor values of codes."""
    ctx.mark_non_differentiable(*([output] if isinstance(output, torch.Tensor) else output))


def _codes_grads(ctx: Any, *grads: Tensor | None) -> None:
    return None


def second_derivative(ctx: Any, *grads: Any) -> None:
    """The derivative of what computes gradients: refused."""
    raise RuntimeError("ferrotune.ops has first derivatives only: this asks for a second one")


define("lora_linear_group", _SCHEMAS["lora_linear_group"], _group, _group_fake)
define(
    "lora_linear_group_backward",
    _SCHEMAS["lora_linear_group_backward"],
    _group_backward,
    _group_backward_fake,
)
define("lora_linear", _SCHEMAS["lora_linear"], _one, _one_fake)
define("quantize_4bit", _SCHEMAS["quantize_4bit"], _quantize, _quantize_fake)
define("dequantize_4bit", _SCHEMAS["dequantize_4bit"], _dequantize, _dequantize_fake)
torch.library.register_autograd(
    "ferrotune::lora_linear_group", _group_grads, setup_context=_group_setup
)
torch.library.register_autograd("ferrotune::lora_linear", _one_grads, setup_context=_one_setup)
torch.library.register_autograd("ferrotune::lora_linear_group_backward", second_derivative)
for _name in ("quantize_4bit", "dequantize_4bit"):
    torch.library.register_autograd(f"ferrotune::{_name}", _codes_grads, setup_context=_codes_setup)
