"""What Python decides for the CUDA kernels of linear cross-entropy, without a device.

The native calls are stood in for by what they promise, on CPU tensors by address.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ferrotune import _native
from ferrotune.ops import cross_entropy, cross_entropy_chunks, cross_entropy_library, cuda
from ferrotune.ops import cross_entropy_reference as reference
from ferrotune.ops import cuda_cross_entropy as ours_on_cuda
from ferrotune.ops.cross_entropy_types import Settings
from loss_cases import make, ours, run, stock

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def at(address: int, dtype: str, *shape: int) -> Tensor:
    kind = getattr(torch, dtype)
    memory = (ctypes.c_char * (math.prod(shape) * kind.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=kind).view(shape)


class Native:
    """``rows``: of each chunk."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def cuda_cross_entropy_prepare(
        self,
        _: int,
        stream: int,
        labels: Any,
        reduction: str,
        divisor: int,
        lift: float,
        facts: int,
    ) -> None:
        address, rows, ignore_index, classes = labels
        given = at(divisor, "float32", 1).reshape(()) if divisor else None
        values = at(address, "int64", rows) if rows else torch.zeros(0, dtype=torch.int64)
        settings = Settings(ignore_index, 0.0, 0.0, reduction)
        found = reference.prepare(values, classes, settings, torch.zeros(1), given)
        out = at(facts, "float32", 4)
        out.copy_(torch.stack([found.divisor, found.multiplier * lift, found.scale / lift, out[3]]))
        out[3] = 1

    def cuda_cross_entropy(
        self, _: int, stream: int, logits: int, dtype: str, stride: int, labels: Any,
        smoothing: float, softcap: float, multiplier: int, losses: int,
    ) -> None:  # fmt: skip
        address, rows, ignore_index, classes = labels
        self.rows.append(rows)
        assert logits % 16 == 0
        assert stride * getattr(torch, dtype).itemsize % 16 == 0
        reference.rows(
            at(logits, dtype, rows, stride)[:, :classes],
            at(address, "int64", rows),
            at(losses, "float32", rows),
            at(multiplier, "float32", 1) if multiplier else None,
            Settings(ignore_index, smoothing, softcap, "mean"),
        )

    def cuda_scale_gradient(
        self, _: int, stream: int, gradient: int, dtype: str, elements: int, scale: int, grad: int,
        out: int, out_dtype: str,
    ) -> None:  # fmt: skip
        if elements == 0:
            return
        one, other = at(scale, "float32", 1).reshape(()), at(grad, "float32", 1).reshape(())
        found = reference.scale_gradient(
            at(gradient, dtype, elements), one, other, getattr(torch, out_dtype)
        )
        at(out, out_dtype, elements).copy_(found)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Native:
    made = Native()
    for name in dir(made):
        if name.startswith("cuda_"):
            monkeypatch.setattr(_native, name, getattr(made, name), raising=False)
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: 0)
    for module in (cross_entropy, cross_entropy_chunks, cross_entropy_library):
        monkeypatch.setattr(module, "steps", lambda x: ours_on_cuda)
    monkeypatch.setattr(ours_on_cuda, "chunk_rows", lambda *_: 8)
    return made


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"reduction": "sum"}, {"num_items": 9.0, "softcap": 3.0, "label_smoothing": 0.1}],
    ids=str,
)
def test_calls_agree_with_pytorch(
    settings: dict[str, Any], dtype: torch.dtype, native: Native
) -> None:
    for shape, bias in (((21,), True), ((3, 7), False), ((0,), True)):
        case = make(shape, 37, dtype=dtype, bias=bias, grad=0.3, **settings)
        found, true = run(case, ours), run(case, stock, torch.float64)
        assert native.rows == ([8, 8, 5] if math.prod(shape) else [])
        native.rows.clear()
        for name, tensor in found.items():
            tolerance = {F32: 2e-6, F16: 4e-3, BF16: 3e-2}[dtype]
            torch.testing.assert_close(
                tensor.double(), true[name], rtol=tolerance, atol=tolerance, equal_nan=True
            )


@pytest.mark.parametrize("classes", [32_000, 50_257, 128_256, 151_936, 256_000, 262_208])
@pytest.mark.parametrize("d", [2048, 4096, 8192])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_chunks_fit_the_workspace(classes: int, d: int, dtype: torch.dtype) -> None:
    for m in (1, 100, 1024, 2048, 3000, 8192, 100_000):
        x = torch.empty(m, d, dtype=dtype, device="meta")
        rows = ours_on_cuda.chunk_rows(x, classes, False)
        stride = ours_on_cuda.stride(x, classes)
        assert classes <= stride < classes + 8
        assert 0 < min(m, rows) * stride * dtype.itemsize < 512 << 20
        if dtype == BF16 and classes <= 256_000 and m in (1024, 2048, 8192):
            assert rows >= 1024
