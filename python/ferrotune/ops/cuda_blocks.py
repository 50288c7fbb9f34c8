"""The kernels of ``blocks``, on PyTorch's memory and current stream; see there for the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .cuda import NAMES, address, prepared_stream

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, what was normalised (x, or its sum with the residual), and 1 / rms."""
    from .. import _native

    x = x.contiguous()
    index, stream = prepared_stream(x)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    out, inverse = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    total = x
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
    weight = weight.contiguous()
    _native.cuda_rms_norm(
        index,
        stream,
        _norm(x, rows, weight, eps, offset),
        x.data_ptr(),
        (address(residual), 0 if residual is None else total.data_ptr()),
        out.data_ptr(),
        inverse.data_ptr(),
    )
    return out, total, inverse


def _norm(
    x: Tensor, rows: int, weight: Tensor, eps: float, offset: float
) -> tuple[int, int, str, int, bool, float, float]:
    wide = weight.dtype != x.dtype
    return rows, x.shape[-1], NAMES[x.dtype], weight.data_ptr(), wide, offset, eps


def rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    eps: float,
    offset: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, with ``grad_sum`` added, and of the weight."""
    from .. import _native

    grad, weight = grad.contiguous(), weight.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    index, stream = prepared_stream(x)
    rows, columns = inverse.numel(), x.shape[-1]
    out = torch.empty_like(x)
    partial = grad_weight = None
    if need_weight and rows:
        count = _native.cuda_rms_norm_partial_rows(index, rows, columns, NAMES[x.dtype])
        if count is not None:
            partial = x.new_empty(count, columns, dtype=torch.float32)
            grad_weight = torch.empty_like(weight)
    _native.cuda_rms_norm_backward(
        index,
        stream,
        _norm(x, rows, weight, eps, offset),
        (x.data_ptr(), inverse.data_ptr()),
        (grad.data_ptr(), address(grad_sum)),
        out.data_ptr(),
        (address(partial), address(grad_weight)),
    )
    if need_weight and grad_weight is None:  # rows longer than a block keeps, or none
        scaled = x.reshape(rows, columns).float() * inverse[:, None]
        grad_weight = (grad.reshape(rows, columns).float() * scaled).sum(0).to(weight.dtype)
    return out, grad_weight


def glu(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """``activation(gate)·up``, contiguous."""
    from .. import _native

    gate, up, columns = _operands(gate, up)
    out = gate.new_empty(*gate.shape[:-1], columns)
    index, stream = prepared_stream(gate)
    given = _gated(gate, up, columns, activation)
    _native.cuda_glu(index, stream, given, out.data_ptr())
    return out


def glu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    *,
    in_place: bool = False,
    again: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of gate and up, in the form of those: one tensor if up is None; and with
    ``again`` the output once more.

    With ``in_place`` up's takes the memory of ``grad``, which must be free to write.
    """
    from .. import _native

    grad = grad.contiguous()
    gate, up, columns = _operands(gate, up)
    index, stream = prepared_stream(gate)
    out = torch.empty_like(grad) if again else None
    first: Tensor
    second: Tensor | None
    if up is None:
        first, second, stride = torch.empty_like(gate), None, 2 * columns
        other = first.data_ptr() + columns * first.element_size()
    else:
        first = torch.empty_like(grad)
        second = grad if in_place else torch.empty_like(grad)
        stride, other = columns, second.data_ptr()
    _native.cuda_glu_backward(
        index,
        stream,
        _gated(gate, up, columns, activation),
        grad.data_ptr(),
        address(out),
        (first.data_ptr(), other),
        stride,
    )
    return first, second, out


def _operands(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """Both with rows that lie equally far apart, and their width."""
    if up is None:
        return gate.contiguous(), None, gate.shape[-1] // 2
    if gate.stride() != up.stride() or not _even_rows(gate):
        gate, up = gate.contiguous(), up.contiguous()
    return gate, up, gate.shape[-1]


def _even_rows(x: Tensor) -> bool:
    """Whether the rows of x lie one distance apart, each in a piece."""
    if x.dim() < 2 or x.stride(-1) != 1:
        return x.is_contiguous()
    expected = x.stride(-2)
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected = stride * size if size != 1 else expected
    return True


def _gated(
    gate: Tensor, up: Tensor | None, columns: int, activation: str
) -> tuple[int, int, int, int, int, str, str]:
    width = gate.shape[-1]
    rows = gate.numel() // width if width else 0
    first = gate.data_ptr()
    if up is None:
        other, stride = first + columns * gate.element_size(), 2 * columns
    else:
        other, stride = up.data_ptr(), gate.stride(-2) if gate.dim() > 1 else width
    return first, other, rows, columns, stride, NAMES[gate.dtype], activation


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by their positions' angles, or back."""
    from .. import _native

    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    turned = [_heads(x) for x in (q, k)]
    batch, q_heads, length, size = q.shape
    index, stream = prepared_stream(q)
    strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    _native.cuda_rope(
        index,
        stream,
        turned[0][2],
        turned[1][2],
        (cos.data_ptr(), sin.data_ptr(), strides),
        (batch, length, q_heads, k.shape[1], size, cos.shape[-1]),
        NAMES[q.dtype],
        backward,
    )
    return turned[0][1], turned[1][1]


def _heads(
    x: Tensor,
) -> tuple[Tensor, Tensor, tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """x with rows in a piece, memory for the result, and both as the native call takes them."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty_like(x)
    if out.stride(-1) != 1:
        out = x.new_empty(x.shape)
    return x, out, (x.data_ptr(), out.data_ptr(), x.stride()[:3], out.stride()[:3])
