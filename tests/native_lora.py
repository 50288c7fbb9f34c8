"""The native calls of ops.cuda_lora on CPU tensors: what they promise, in float64 by address.

`install` makes the CUDA backend the one of CPU tensors, so that all that Python decides for it, its
addresses, sizes and types among that, is tested without a device.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ferrotune import _native, ops

F64 = torch.float64
WORKSPACE = 64  # bytes
ALIGNMENT = 16  # bytes, of what the product of the frozen weight reads
KEPT = 3.0  # what H is full of between forward and backward


def at(address: int, dtype: str, *shape: int) -> Tensor:
    """The tensor of this shape that lies there."""
    kind = getattr(torch, dtype)
    size = math.prod(shape) * kind.itemsize
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=kind).view(shape)


class Native:
    """``calls``: each with what is asked of it. `cuda_lora_carries` answers ``carries``.

    With ``few`` there is a kernel of few rows.
    """

    def __init__(self, carries: bool, few: bool) -> None:
        self.carries = carries
        self.few = few
        self.calls: list[str] = []

    def cuda_lora_carries(
        self, device: int, m: int, w: int, depth: int, down_rows: bool
    ) -> tuple[bool, bool]:
        return self.carries, self.carries

    def cuda_lora_max_columns(self, device: int, planes: int) -> int:
        return 64 if planes == 1 else 32

    def cuda_lora_kept_bytes(self, device: int, k: int, planes: int, use: str) -> int | None:
        assert use in ("auto", "always")
        return 16 * -(-k // 128) if k % 8 == 0 else None

    def cuda_lora_workspace(self, *_: Any) -> int:
        return WORKSPACE

    def cuda_dequantize_4bit(
        self, _: Any, stream: int, weight: Any, out: int, dtype: str, n: int, k: int, back: bool
    ) -> None:
        dense = torch.empty(n, k, dtype=getattr(torch, dtype))
        self._dequantize(weight, dense)
        at(out, dtype, *((k, n) if back else (n, k))).copy_(dense.t() if back else dense)

    def cuda_lora_forward(
        self, _: Any, stream: int, group: Any, given: list[Any], workspace: int
    ) -> None:
        self.calls.append(f"forward, {group[-1]}")
        at(workspace, "uint8", WORKSPACE).fill_(255)
        m, planes, columns = group[1], group[4], group[7]
        at(group[6], group[3], m, planes * columns).fill_(KEPT)
        if group[8]:
            (one,) = given
            kept = torch.zeros(m, self._kept(group).shape[1] * 8, dtype=torch.uint8)
            kept[:, : group[2]] = self._made(group, one) > 0
            places = torch.arange(8, dtype=torch.uint8)
            self._kept(group).copy_((kept.view(m, -1, 8) << places).sum(2, dtype=torch.uint8))
        for one in given:
            (_, _, _, n, _), _, (y, bias, lora_bias, kind), _, weight = one
            out = at(y, group[3], m, n)
            if group[-1] == "left" and not weight[0]:
                continue
            total = self._term(group, one)
            if lora_bias:
                total += one[1][0] * at(lora_bias, kind, n).to(F64)
            if bias:
                total += at(bias, group[3], n).to(F64)
            if group[-1] == "added":
                total += out.to(F64)
            if weight[0]:
                total += self._x(group) @ self._weight(group, weight, n).t()
            out.copy_(total)

    def cuda_lora_forward_gated(
        self, _: Any, stream: int, group: Any, given: list[Any], workspace: int, hidden: int,
        activation: str,
    ) -> None:  # fmt: skip
        assert len(given) == 2
        self.cuda_lora_forward(_, stream, group, given, workspace)
        self.calls[-1] = "gated"
        shape = (group[3], group[1], given[0][0][3])
        gate, up = (at(one[2][0], *shape).to(F64) for one in given)
        act = torch.nn.functional.silu(gate)
        if activation != "silu":
            assert activation == "gelu_tanh"
            act = torch.nn.functional.gelu(gate, approximate="tanh")
        at(hidden, *shape).copy_(act * up)

    def cuda_lora_products(self, *arguments: Any) -> None:
        group, given = arguments[2], arguments[3]
        assert group[-1] == "left"
        assert sum(bool(one[4][0]) for one in given) == 1
        self.cuda_lora_forward(*arguments)
        self.calls[-1] = "products"

    def cuda_lora_backward(
        self, _: Any, stream: int, group: Any, given: list[Any], workspace: int, grad_x: int
    ) -> None:
        self.calls.append(f"backward, {sum(bool(one[4][0]) for one in given)} weights")
        at(workspace, "uint8", WORKSPACE).fill_(255)
        m, k, dtype, planes, columns = group[1], group[2], group[3], group[4], group[7]
        assert (at(group[6], dtype, m, planes * columns) == KEPT).all()
        dx = torch.zeros(m, k, dtype=F64)
        for one in given:
            (A, B, kind, n, r), (scaling, *_), (grad, *_), (grad_A, grad_B, wide), weight = one
            g = at(grad, dtype, m, n).to(F64)
            mask = self._found(group, one) if group[8] else self._made(group, one)
            lora_A, lora_B = at(A, kind, r, k).to(F64), at(B, kind, n, r).to(F64)
            dropped = self._x(group) * mask
            if grad_A:
                at(grad_A, wide, r, k).copy_(scaling * (g @ lora_B).t() @ dropped)
            if grad_B:
                at(grad_B, wide, n, r).copy_(scaling * g.t() @ (dropped @ lora_A.t()))
            dx += scaling * mask * (g @ lora_B @ lora_A)
            if weight[0]:
                assert grad % ALIGNMENT == 0
                assert not group[5] or group[8]
                dx += g @ self._weight(group, weight, n)
        if grad_x:
            at(grad_x, dtype, m, k).copy_(dx)

    def cuda_small_division(self, _: Any, sizes: Any) -> tuple[int, int, int] | None:
        m, _, k, r, _ = sizes
        return (1, 2, 3) if self.few and m <= 64 and k % 32 == 0 and r <= 64 else None

    def cuda_small_linear(
        self, _: Any, stream: int, dtype: str, sizes: Any, how: Any, out: Any, weight: Any, one: Any
    ) -> None:
        assert how == (1, 2, 3)
        m, n, k, r, planes = sizes
        x, y, bias = out
        assert (x | weight[0]) % ALIGNMENT == 0
        self.calls.append(f"few, {n} by {r}")
        dense = torch.empty(n, k, dtype=getattr(torch, dtype))
        self._dequantize(weight, dense)
        rows = at(x, dtype, m, k).to(F64)
        total = rows @ dense.to(F64).t()
        if bias:
            total += at(bias, dtype, n).to(F64)
        if one is not None:
            (A, B), (lora_bias, kind), scaling, (h, stride, plane) = one
            adapter = dtype if planes == 1 else "float32"
            lora_A, lora_B = at(A, adapter, r, k).to(F64), at(B, adapter, n, r).to(F64)
            total += scaling * (rows @ lora_A.t() @ lora_B.t())
            if lora_bias:
                total += scaling * at(lora_bias, kind, n).to(F64)
            for part in range(planes):
                for row in range(m if h else 0):
                    at(h + 2 * (row * stride + part * plane), dtype, -(-r // 16) * 16).fill_(KEPT)
        at(y, dtype, m, n).copy_(total)

    def _x(self, group: Any) -> Tensor:
        return at(group[0], group[3], group[1], group[2]).to(F64)

    def _kept(self, group: Any) -> Tensor:
        """The bytes of the mask, which must start where H ends."""
        m, k, planes, columns = group[1], group[2], group[4], group[7]
        assert group[8] == group[6] + 2 * m * planes * columns
        return at(group[8], "uint8", m, 16 * -(-k // 128))

    def _found(self, group: Any, one: Any) -> Tensor:
        """The mask that forward kept."""
        bits = self._kept(group)[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
        p = one[1][1]
        return bits.view(group[1], -1)[:, : group[2]].to(F64) / (1 - p if p < 1 else 1)

    def _made(self, group: Any, one: Any) -> Tensor:
        shape, (_, p, stream, _) = (group[1], group[2]), one[1]
        if not p:
            return torch.ones(shape, dtype=F64)
        return ops.dropout_mask(shape, p, at(group[5], "int64", 1), stream, dtype=F64)

    def _term(self, group: Any, one: Any) -> Tensor:
        (A, B, kind, n, r), (scaling, *_) = one[:2]
        lora_A, lora_B = at(A, kind, r, group[2]).to(F64), at(B, kind, n, r).to(F64)
        dropped = self._x(group) * self._made(group, one)
        return scaling * (dropped @ lora_A.t() @ lora_B.t())

    def _weight(self, group: Any, weight: Any, n: int) -> Tensor:
        address, transposed, quant = weight
        assert address % ALIGNMENT == group[0] % ALIGNMENT == 0
        k, dtype = group[2], group[3]
        found = at(address, dtype, *((k, n) if transposed else (n, k)))
        if quant is not None:
            self._dequantize(quant, found)
        return (found.t() if transposed else found).to(F64)

    def _dequantize(self, weight: Any, out: Tensor) -> None:
        packed, absmax, nested, code, offset, quant_type, blocksize, _ = weight
        blocks = -(-out.numel() // blocksize)
        _native.dequantize_4bit_at(
            packed, -(-out.numel() // 2), absmax, blocks, nested,
            -(-blocks // 256) if nested else 0, code,
            at(offset, "float32", 1).item() if offset else 0.0,
            quant_type, blocksize, 256 if nested else 0,
            out.data_ptr(), out.numel(), str(out.dtype).removeprefix("torch."),
        )  # fmt: skip


def forget() -> None:
    """What was worked out by the native calls that were there before."""
    from ferrotune.ops import cuda_plan, cuda_small

    for cached in (
        cuda_plan._carries,
        cuda_plan._kept_bytes,
        cuda_plan._max_columns,
        cuda_plan._workspace_bytes,
        cuda_small._division,
    ):
        cached.cache_clear()
    cuda_plan._plans.clear()


def install(patch: pytest.MonkeyPatch, carries: bool, few: bool = False) -> Native:
    """The CUDA backend for CPU tensors, on a `Native` of its own."""
    from ferrotune.ops import autograd, cuda, cuda_lora, products, reference

    native = Native(carries, few)
    for name in dir(native):
        if name.startswith("cuda_"):
            patch.setattr(_native, name, getattr(native, name), raising=False)
    forget()
    patch.setattr(cuda, "_ready", lambda index: None)
    patch.setattr(cuda, "_raw_stream", lambda index: 0)
    patch.setattr(autograd, "choose", lambda x: cuda_lora)
    patch.setattr(products, "_has_onednn", lambda dtype: True)  # a device's are in x's type
    dense = reference.dense

    def of_device(projection: Any, dtype: torch.dtype) -> Tensor | None:
        quant = projection.quant
        if quant is None:
            return dense(projection, dtype)
        return cuda.dequantize_4bit(quant, quant.dtype).to(dtype)

    patch.setattr(reference, "dense", of_device)
    return native
