"""The operations on every device that PyTorch has: its products, and the Rust core on the CPU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from . import dropout
from .products import add_product, down, down_backward, product_dtype, term_dtype, up_backward
from .scratch import scratch
from .types import Grads, Need, Projection, Quant4bit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor


def laid_out(x: Tensor) -> Tensor:
    """``[m, columns]``, contiguous: as ``forward`` and ``backward`` take x and gradients."""
    return as_rows(x)


def as_rows(x: Tensor) -> Tensor:
    """``[m, k]``, contiguous: strides of expanded or transposed tensors end here."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def plan(x: Tensor, projections: Sequence[Projection]) -> None:
    """What can be worked out once for shapes and types: nothing here."""


def forward(
    x: Tensor, projections: Sequence[Projection], seed: Tensor | None, how: None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of x ``[m, k]``: ``ys`` ``[m, n]`` in its dtype; ``hs`` ``[m, r]``: scaling·dropout(x)·Aᵀ."""
    ys: list[Tensor] = []
    hs: list[Tensor | None] = []
    for projection in projections:
        y = base(x, projection)
        h = None
        if projection.lora_A is not None and projection.lora_B is not None:
            kind = term_dtype(x, projection.lora_A)
            h = down(x, projection, kind, seed)
            lora_bias = projection.lora_bias
            if lora_bias is not None:
                lora_bias = lora_bias.to(kind) * projection.scaling
            up = projection.lora_B.to(kind).t()
            y = add_product(y, h, up, product_dtype(x), lora_bias)
        assert y is not None
        ys.append(y.to(x.dtype))
        hs.append(h)
    return ys, hs


def gated(*_: Any) -> None:
    """No kernel does all of it at once."""


def ranks(
    x: Tensor, projections: Sequence[Projection], seed: Tensor | None, how: None = None
) -> list[Tensor | None]:
    """The ``hs`` of ``forward``, without the products of the weights."""
    return [
        None
        if one.lora_A is None or one.lora_B is None
        else down(x, one, term_dtype(x, one.lora_A), seed)
        for one in projections
    ]


def saved(
    x: Tensor, projections: Sequence[Projection]
) -> list[tuple[tuple[int, int], torch.dtype] | None]:
    """Shape and dtype of the ``hs`` of ``forward``, x being ``[m, k]``."""
    return [
        None
        if projection.lora_A is None
        else ((x.shape[0], projection.rank), term_dtype(x, projection.lora_A))
        for projection in projections
    ]


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    hs: Sequence[Tensor | None],
    projections: Sequence[Projection],
    seed: Tensor | None,
    need: Need,
    how: None = None,
) -> Grads:
    """Gradients of ``forward``'s inputs in their dtypes; ``grads`` ``[m, n]`` are contiguous."""
    dx: Tensor | None = None
    sums_in = product_dtype(x)
    nothing: list[Tensor | None] = [None] * len(projections)
    found = Grads(None, nothing[:], nothing[:], nothing[:], nothing[:])
    for i, (grad, h, projection) in enumerate(zip(grads, hs, projections, strict=True)):
        lora_A, lora_B = projection.lora_A, projection.lora_B
        if grad is None:
            continue
        if need.x:
            weight = dense(projection, x.dtype)
            if weight is not None:
                dx = add_product(dx, grad.to(sums_in), weight.to(sums_in), sums_in)
            del weight
        bias_grads(found, grad, projection, need, i)
        if lora_A is None or lora_B is None or h is None:
            continue
        kind = h.dtype
        asked_g = need.lora_A[i] or need.x
        grad_B, g = up_backward(grad, h, projection, kind, need.lora_B[i], asked_g)
        if grad_B is not None:
            found.lora_B[i] = grad_B.to(lora_B.dtype)
        if g is None:
            continue
        if need.lora_A[i]:
            found.lora_A[i] = down_backward(g, x, projection, kind, seed).to(lora_A.dtype)
        if need.x:
            wide_A = lora_A.to(kind)
            if projection.dropout_p:
                term = dropout.apply(g @ wide_A, projection.dropout_p, seed, projection.stream)
                dx = (term if dx is None else dx + term).to(sums_in)
            else:
                dx = add_product(dx, g, wide_A, sums_in)
    if need.x and dx is None:
        dx = torch.zeros_like(x)
    return found._replace(x=None if dx is None else dx.to(x.dtype))


def dense(projection: Projection, dtype: torch.dtype) -> Tensor | None:
    """W ``[n, k]`` in ``dtype``; a 4-bit one is rounded to the type it was quantised from first."""
    quant = projection.quant
    if quant is None:
        return projection.weight
    if quant.packed.device.type != "cpu":
        from .backend import choose

        return choose(quant.packed).dequantize_4bit(quant, quant.dtype).to(dtype)
    return _dequantize_into(scratch("weight", quant.shape, quant.dtype), quant).to(dtype)


def base(x: Tensor, projection: Projection) -> Tensor | None:
    """``x·Wᵀ + bias``, in `product_dtype`; without W the bias alone, None without either."""
    kind = product_dtype(x)
    weight, bias = dense(projection, x.dtype), projection.bias
    bias = None if bias is None else bias.to(kind)
    if weight is None:
        return None if bias is None else bias.repeat(x.shape[0], 1)
    return torch.nn.functional.linear(x.to(kind), weight.to(kind), bias)


def bias_grads(found: Grads, grad: Tensor, projection: Projection, need: Need, i: int) -> None:
    """Fills in the gradients of projection i's biases."""
    if need.bias[i] and projection.bias is not None:
        found.bias[i] = _columns(grad).to(projection.bias.dtype)
    lora_bias = projection.lora_bias
    if need.lora_bias[i] and lora_bias is not None and projection.lora_A is not None:
        found.lora_bias[i] = (_columns(grad) * projection.scaling).to(lora_bias.dtype)


def _columns(grad: Tensor) -> Tensor:
    """Sums over the tokens, in at least f32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(0, dtype=wide)


def quantize_4bit(values: Tensor, blocksize: int, quant_type: str, double_quant: bool) -> Quant4bit:
    """bitsandbytes' codes and absmax of its CPU code."""
    from .. import _native, threads

    threads.share_with_torch()
    source = values.detach().cpu().contiguous()
    fields = _native.quantize_4bit(
        _flat(source),
        list(source.shape),
        str(source.dtype).removeprefix("torch."),
        quant_type,
        blocksize,
        double_quant,
    )
    nested = fields["nested_absmax"] is not None

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(fields[name]).to(values.device)

    offset = (
        torch.tensor(fields["nested_offset"], dtype=torch.float32, device=values.device)
        if nested
        else None
    )
    return Quant4bit(
        packed=tensor("packed").unsqueeze(1),
        absmax=tensor("absmax"),
        nested_absmax=tensor("nested_absmax") if nested else None,
        nested_code=tensor("nested_quant_map") if nested else None,
        nested_offset=offset,
        quant_type=quant_type,
        blocksize=blocksize,
        nested_blocksize=fields["nested_blocksize"] or 0,
        shape=tuple(values.shape),
        dtype=values.dtype,
    )


def _flat(source: Tensor) -> Any:
    flat = source.reshape(-1)
    return (flat if flat.dtype == torch.float32 else flat.view(torch.uint16)).numpy()


def dequantize_4bit(quant: Quant4bit, dtype: torch.dtype) -> Tensor:
    """W in ``dtype``: f32 products rounded once."""
    if quant.packed.device.type != "cpu":
        return _dequantize_by_torch(quant, dtype)
    return _dequantize_into(torch.empty(quant.shape, dtype=dtype, device="cpu"), quant)


def _dequantize_into(out: Tensor, quant: Quant4bit) -> Tensor:
    from .. import _native, threads

    threads.share_with_torch()
    absmax, nested, code, offset = quant.absmax, quant.nested_absmax, quant.nested_code, 0.0
    if quant.nested_offset is not None:
        offset = quant.nested_offset.item()
    _native.dequantize_4bit_at(
        quant.packed.data_ptr(),
        quant.packed.numel() * quant.packed.element_size(),
        absmax.data_ptr(),
        absmax.numel(),
        0 if nested is None else nested.data_ptr(),
        0 if nested is None else nested.numel(),
        0 if code is None else code.data_ptr(),
        offset,
        quant.quant_type,
        quant.blocksize,
        quant.nested_blocksize,
        out.data_ptr(),
        out.numel(),
        str(out.dtype).removeprefix("torch."),
    )
    return out


def _dequantize_by_torch(quant: Quant4bit, dtype: torch.dtype) -> Tensor:
    elements = math.prod(quant.shape)
    packed = quant.packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:elements]
    absmax = quant.absmax
    if quant.nested_absmax is not None:
        assert quant.nested_code is not None
        assert quant.nested_offset is not None
        outer = quant.nested_absmax.repeat_interleave(quant.nested_blocksize)[: absmax.numel()]
        absmax = quant.nested_code[absmax.long()] * outer + quant.nested_offset.float()
    scale = absmax.repeat_interleave(quant.blocksize)[:elements]
    book = _codebook(quant.quant_type).to(packed.device)
    return (book[codes.long()] * scale).to(dtype).reshape(quant.shape)


def _codebook(quant_type: str) -> Tensor:
    """The 16 values, read off a block that holds every code once."""
    from .. import _native

    codes = torch.tensor([(2 * i << 4) | (2 * i + 1) for i in range(8)], dtype=torch.uint8)
    out = torch.empty(16, dtype=torch.float32)
    one = torch.ones(1, dtype=torch.float32)
    _native.dequantize_4bit_at(
        codes.data_ptr(), 8, one.data_ptr(), 1, 0, 0, 0, 0.0, quant_type, 32, 0,
        out.data_ptr(), 16, "float32",
    )  # fmt: skip
    return out
