"""Linear cross-entropy chunk by chunk: logits live in one workspace, never all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import cross_entropy_reference as reference
from . import cuda
from .cross_entropy_types import Asked, Found, Gradients, Head, Settings

if TYPE_CHECKING:
    from torch import Tensor


def steps(x: Tensor) -> Any:
    """Who does what is no product: the module `cross_entropy_reference`, or one with its names."""
    if x.is_cuda and x.dtype in cuda.NAMES and cuda.usable(x.device.index):
        from . import cuda_cross_entropy

        return cuda_cross_entropy
    return reference


def run(
    x: Tensor, head: Head, labels: Tensor, settings: Settings, divisor: Tensor | None, asked: Asked
) -> Found:
    """The loss of x ``[m, d]`` and labels ``[m]``, and gradients that lack its ``scale``.

    ``divisor`` is of one element: what the summed losses are divided by; None: the reduction's.
    """
    step = steps(x)
    kind, m, classes = step.kind(x), x.shape[0], head.weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    facts = step.prepare(labels, classes, settings, x, divisor)
    losses = x.new_empty(m, dtype=wide)
    products = _Products(x, head, kind, asked)
    chunk = min(m, step.chunk_rows(x, classes, settings.softcap != 0))
    workspace = x.new_empty(chunk, step.stride(x, classes), dtype=kind)[:, :classes]
    multiplier = facts.multiplier if any(asked) else None
    for start in range(0, m, max(1, chunk)):
        rows = slice(start, min(start + chunk, m))
        logits = workspace[: rows.stop - start]
        products.logits(rows, logits)
        step.rows(logits, labels[rows], losses[rows], multiplier, settings)
        products.gradients(rows, logits)
    return Found(losses.sum() / facts.divisor, facts.scale, products.found())


class _Products:
    """The matrix products of every chunk, in ``kind``, and the sums of those over all chunks."""

    def __init__(self, x: Tensor, head: Head, kind: torch.dtype, asked: Asked):
        self.x, self.kind, self.asked = x, kind, asked
        self.weight = head.weight.to(kind)
        self.bias = None if head.bias is None else head.bias.to(kind)
        wide = torch.promote_types(x.dtype, torch.float32)
        classes, d = head.weight.shape
        self.dx = torch.empty_like(x) if asked.hidden else None
        self.dweight = x.new_zeros(classes, d, dtype=wide) if asked.weight else None
        self.dbias = x.new_zeros(classes, dtype=wide) if asked.bias else None
        self.h: list[Tensor] = []
        self.dh = self.dB = None
        if head.h is not None and head.lora_B is not None:
            self.h, self.lora_B = _parts(head.h, kind), _parts(head.lora_B, kind)
            self.dh = torch.empty_like(head.h) if asked.h else None
            self.dB = x.new_zeros(head.lora_B.shape, dtype=wide) if asked.lora_B else None

    def logits(self, rows: slice, out: Tensor) -> None:
        x, weight = self.x[rows].to(self.kind), self.weight.t()
        if self.bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(self.bias, x, weight, out=out)
        if self.h:
            # The product of values in two parts, less that of the small ones, in one sum.
            pairs = [(0, 0), (0, 1), (1, 0)] if len(self.h) > 1 else [(0, 0)]
            h = torch.cat([self.h[i][rows] for i, _ in pairs], 1)
            out.addmm_(h, torch.cat([self.lora_B[j] for _, j in pairs], 1).t())

    def gradients(self, rows: slice, dlogits: Tensor) -> None:
        if self.dx is not None:
            self._put(self.dx[rows], dlogits, [self.weight])
        if self.dweight is not None:
            _accumulate(self.dweight, dlogits.t(), self.x[rows].to(self.kind))
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        if self.dh is not None:
            self._put(self.dh[rows], dlogits, self.lora_B)
        if self.dB is not None:
            for part in self.h:
                _accumulate(self.dB, dlogits.t(), part[rows])

    def _put(self, out: Tensor, dlogits: Tensor, parts: list[Tensor]) -> None:
        """``dlogits·(sum of the parts)``, rounded once to the type of ``out``."""
        if out.dtype == self.kind and len(parts) == 1:
            torch.mm(dlogits, parts[0], out=out)
            return
        total = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
        for part in parts:
            _accumulate(total, dlogits, part)
        out.copy_(total)

    def found(self) -> Gradients:
        return Gradients(self.dx, self.dweight, self.dbias, self.dh, self.dB)


def _parts(tensor: Tensor, kind: torch.dtype) -> list[Tensor]:
    """Tensors in ``kind`` whose sum this is, to the square of that type's precision."""
    high = tensor.to(kind)
    if torch.promote_types(kind, tensor.dtype) == kind:
        return [high]
    return [high, (tensor - high.to(tensor.dtype)).to(kind)]


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a·b`` with the products' sums in the type of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
