"""What stands between a transformer's linear layers: norms, gated activations, rotary positions.

On CUDA each is one kernel in each direction, computed in f32 and rounded once; elsewhere, for other
dtypes and under ``torch.compile`` (which fuses them itself) plain PyTorch of the same formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from . import cuda_blocks
from .cuda import NAMES, usable

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Any:
    """``(weight + offset)·x / √(mean(x²) + eps)`` over the last dimension (Zhang, Sennrich, 2019).

    Args:
        x: ``[..., k]``, of any float dtype.
        weight: ``[k]``, of x's dtype or float32; gets a gradient if it requires one.
        offset: 1 for Gemma's norms, whose weights are kept less one.
        residual: of x's shape and dtype, added to x first.

    Returns:
        ``[..., k]`` in x's dtype; with ``residual`` a pair: that, and ``x + residual``.

    Raises ``ValueError`` or ``TypeError`` naming the argument that does not fit.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be of a float dtype, not {x.dtype}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {list(weight.shape)}, but x has {x.shape[-1]} columns")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {list(residual.shape)}, but x {x.dtype} {list(x.shape)}"
        )
    if fused(x) and weight.dtype in (x.dtype, torch.float32) and weight.device == x.device:
        found = _RmsNorm.apply(x, weight, residual, eps, offset, False)
        return found if residual is not None else found[0]
    total = x if residual is None else x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out = (wide * (weight.to(wide.dtype) + offset)).to(x.dtype)
    return out if residual is None else (out, total)


def rms_norm_and_x(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` on CUDA and x itself, whose gradient is added to the norm's in its kernel."""
    return _RmsNorm.apply(x, weight, None, eps, offset, True)  # type: ignore[no-any-return]


def glu(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """``activation(gate)·up`` (Shazeer, 2020): SwiGLU with "silu", GeGLU with the others.

    Args:
        gate: ``[..., n]``, of any float dtype; without ``up`` ``[..., 2n]``, gate and up in a row.
        up: as ``gate``.
        activation: "silu", "gelu_tanh" (GELU by tanh) or "gelu".

    Raises ``ValueError`` for another activation, or shapes that differ.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate and up need an even width together, not {gate.shape[-1]}")
    elif up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            f"gate is {gate.dtype} {list(gate.shape)}, up {up.dtype} {list(up.shape)}: "
            "they must be alike"
        )
    if fused(gate):
        return _Glu.apply(gate, up, activation)  # type: ignore[no-any-return]
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return activated(gate, activation) * up


def activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if "tanh" in activation else "none")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings (Su et al., 2021): elements i and i + rotary/2 of a head turned.

    Args:
        q: ``[batch, heads, length, head size]``, of any strides, as k.
        cos: ``[batch or 1, length, rotary]`` of q's dtype, as sin; rotary is even and at most the
            head size. The other elements of a head stay as they are.

    Returns:
        q and k turned, ``q·cos + rotate_half(q)·sin``, laid out as they are.

    Raises ``ValueError`` if shapes do not fit.
    """
    _check_rope(q, k, cos, sin)
    same = q.dtype == k.dtype == cos.dtype == sin.dtype
    if fused(q) and same and q.device == k.device == cos.device == sin.device:
        return _Rope.apply(q, k, cos, sin)  # type: ignore[no-any-return]
    rotary = cos.shape[-1]
    return _turned(q, cos, sin, rotary), _turned(k, cos, sin, rotary)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    turned, rest = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must have 4 dimensions, not {q.dim()} and {k.dim()}")
    batch, _, length, size = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, length, size):
        raise ValueError(f"q is {list(q.shape)} and k {list(k.shape)}: only heads may differ")
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[1] != length:
        raise ValueError(
            f"cos is {list(cos.shape)} and sin {list(sin.shape)}, but both must be "
            f"[{batch} or 1, {length}, rotary]"
        )
    if cos.shape[0] not in (1, batch) or cos.shape[2] % 2 or cos.shape[2] > size:
        raise ValueError(
            f"cos is {list(cos.shape)}, but must be [{batch} or 1, {length}, rotary] with an even "
            f"rotary of at most {size}"
        )


def fused(x: Tensor) -> bool:
    """Whether a kernel takes tensors like x."""
    if not x.is_cuda or x.dtype not in NAMES or torch.compiler.is_compiling():
        return False
    return usable(x.device.index)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        eps: float,
        offset: float,
        and_x: bool,
    ) -> tuple[Tensor, ...]:
        out, total, inverse = cuda_blocks.rms_norm(x, weight, residual, eps, offset)
        ctx.save_for_backward(total, weight, inverse)
        ctx.numbers = (eps, offset)
        ctx.set_materialize_grads(False)
        if and_x:
            return out, x
        return (out,) if residual is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Any, ...]:
        total, weight, inverse = ctx.saved_tensors
        need_x, need_weight, need_residual, *_ = ctx.needs_input_grad
        eps, offset = ctx.numbers
        if grad is None:
            dx, dw = grad_sum, None
        else:
            dx, dw = cuda_blocks.rms_norm_backward(
                grad, grad_sum, total, weight, inverse, eps, offset, need_weight
            )
        return dx if need_x else None, dw, dx if need_residual else None, None, None, None


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return cuda_blocks.glu(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        return (*cuda_blocks.glu_backward(grad, gate, up, ctx.activation)[:2], None)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shapes = (q.shape, k.shape)
        ctx.set_materialize_grads(False)
        return cuda_blocks.rope(q, k, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor | None, k: Tensor | None) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        if q is None and k is None:
            return None, None, None, None
        # A kernel for both: heads that nobody asks for are none.
        wanted = (q is not None, k is not None)
        q = cos.new_empty(_headless(ctx.shapes[0])) if q is None else q
        k = cos.new_empty(_headless(ctx.shapes[1])) if k is None else k
        found = cuda_blocks.rope(q, k, cos, sin, backward=True)
        return found[0] if wanted[0] else None, found[1] if wanted[1] else None, None, None


def _headless(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0], 0, *shape[2:])
