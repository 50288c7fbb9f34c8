"""Projections as the flat arguments of an operator, and back.

A dispatcher's schema holds tensors, numbers and lists of them: every field of the projections of a
group is one list, by projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .types import Projection, Quant4bit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

TENSORS = (
    "weight", "packed", "absmax", "nested_absmax", "nested_code", "nested_offset",
    "bias", "lora_A", "lora_B", "lora_bias",
)  # fmt: skip
_DTYPES = {"": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Numbers(NamedTuple):
    """What is not a tensor, by projection."""

    scaling: list[float]
    dropout_p: list[float]
    streams: list[int]
    quant_types: list[str]  # "" for a dense weight
    quant_dtypes: list[str]  # "" for a dense weight
    blocksizes: list[int]
    nested_blocksizes: list[int]
    rows: list[int]  # n
    columns: list[int]  # k


def numbers(projections: Sequence[Projection]) -> Numbers:
    """The numbers of a group."""
    quants = [projection.quant for projection in projections]
    shapes = [projection.shape for projection in projections]
    return Numbers(
        [float(projection.scaling) for projection in projections],
        [float(projection.dropout_p) for projection in projections],
        [projection.stream for projection in projections],
        ["" if quant is None else quant.quant_type for quant in quants],
        ["" if quant is None else str(quant.dtype).removeprefix("torch.") for quant in quants],
        [0 if quant is None else quant.blocksize for quant in quants],
        [0 if quant is None else quant.nested_blocksize for quant in quants],
        [shape[0] for shape in shapes],
        [shape[1] for shape in shapes],
    )


def tensors(projection: Projection) -> tuple[Tensor | None, ...]:
    """The tensors of a projection, in the order of ``TENSORS``."""
    quant = projection.quant
    return (
        projection.weight,
        *((None,) * 5 if quant is None else quant.tensors),
        projection.bias,
        projection.lora_A,
        projection.lora_B,
        projection.lora_bias,
    )


def restore(columns: Sequence[Sequence[Tensor | None]], values: Numbers) -> list[Projection]:
    """The projections again; ``columns`` is one list a name of ``TENSORS``."""
    found = []
    for i, parts in enumerate(zip(*columns, strict=True)):
        weight, packed, absmax, nested_absmax, nested_code, nested_offset, bias, a, b, c = parts
        quant = None
        if packed is not None and absmax is not None:
            dtype = _DTYPES[values.quant_dtypes[i]]
            assert dtype is not None
            quant = Quant4bit(
                packed, absmax, nested_absmax, nested_code, nested_offset,
                values.quant_types[i], values.blocksizes[i], values.nested_blocksizes[i],
                (values.rows[i], values.columns[i]), dtype,
            )  # fmt: skip
        numbers_of = (values.scaling[i], values.dropout_p[i], values.streams[i])
        found.append(Projection(weight, quant, bias, a, b, c, *numbers_of))
    return found


def by_name(x: Tensor, projections: Sequence[Projection]) -> list[list[Tensor]]:
    """One list a name of ``TENSORS``, by projection; empty tensors for those that are not there."""
    empty = x.new_empty(0)
    columns = zip(*map(tensors, projections), strict=True)
    return [[empty if tensor is None else tensor for tensor in column] for column in columns]


def present(tensor: Tensor | None) -> Tensor | None:
    """None for the empty tensor of ``by_name``; a matrix without elements is itself."""
    return None if tensor is None or tensor.shape == (0,) else tensor
