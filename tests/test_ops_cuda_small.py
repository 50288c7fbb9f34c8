"""Which products of few rows go to their kernel, and what is handed to it; on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import native_lora
from ferrotune import ops
from ferrotune.ops import cuda_lora, cuda_small, reference
from ferrotune.ops.types import Projection
from native_lora import Native

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N, K, R = 48, 64, 8


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[Native]:
    yield native_lora.install(monkeypatch, carries=True, few=True)
    native_lora.forget()


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(shape) / 2).to(dtype)


def projection(
    dtype: torch.dtype = BF16, adapter: torch.dtype = BF16, n: int = N, k: int = K, r: int = R
) -> Projection:
    quant = ops.quantize_4bit(random(n, k, dtype=dtype))
    A, B = (random(r, k, dtype=adapter), random(n, r, dtype=adapter)) if r else (None, None)
    return Projection(None, quant, None, A, B, None, 0.5)


def few(x: Tensor, *projections: Projection) -> int:
    """How many of them the kernel takes."""
    plan = cuda_lora.plan(x, projections)
    return len(plan.small) + sum(len(one.small) for one in plan.passes)


def test_what_it_takes(native: Native) -> None:
    x = random(3, K)
    for one in (projection(), projection(adapter=F32), projection(r=0)):
        assert few(x, one) == 1
        assert few(x.view(1, 3, K), one) == 1
    assert few(x.to(F16), projection(F16, F16)) == 1
    assert few(random(64, K), projection()) == 1
    assert few(random(32, K), projection(r=0)) == 1
    biased = projection()._replace(bias=random(N), lora_bias=random(N, dtype=F32))
    assert few(x, biased) == 1


def test_what_it_does_not_take(native: Native) -> None:
    x, one = random(3, K), projection()
    assert one.quant is not None
    packed = torch.cat([one.quant.packed.new_zeros(1, 1), one.quant.packed])[1:]
    for other in (
        one._replace(dropout_p=0.1),
        one._replace(quant=one.quant._replace(packed=packed)),  # not on 16 bytes
        one._replace(quant=one.quant._replace(dtype=F16)),
        projection(adapter=F16),
        projection(r=65),
        one._replace(quant=None, weight=random(N, K)),
        one._replace(lora_A=random(R * K + 1)[1:].view(R, K)),
    ):
        assert few(x, other) == 0
    assert few(random(65, K), one) == 0
    assert few(random(33, K), projection(r=0)) == 0  # of a small weight
    assert few(random(0, K), one) == 0
    assert few(random(3, 48), projection(k=48)) == 0
    assert few(random(3 * K + 1)[1:].view(3, K), one) == 0
    assert few(x.float(), projection(F32, F32)) == 0
    assert few(x, one, projection(), one._replace(quant=None, weight=random(N, K))) == 0  # a pass


def test_switch_and_crossovers(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = random(9, K), projection()
    monkeypatch.setitem(cuda_small.CROSSOVERS, (N, K), 8)
    assert few(x, one) == 0
    assert few(x[:8], one) == 1
    monkeypatch.setattr(cuda_lora, "small", "always")
    assert few(x, one) == 1
    monkeypatch.setattr(cuda_lora, "small", "never")
    assert few(x[:8], one) == 0


def test_one_call_a_projection(native: Native) -> None:
    """In a group, of one pass or of several, without gradients."""
    x = random(2, 3, K)
    group = [
        projection()._replace(bias=random(N), lora_bias=random(N, dtype=F32)),
        projection(n=32, r=17),
        projection(n=80, r=0),
        projection(adapter=F32),
    ]
    with torch.no_grad():
        ys = ops.lora_linear_group(x, group)
        want, _ = reference.forward(x.view(6, K), group, None)
    assert sorted(native.calls) == ["few, 32 by 17", "few, 48 by 8", "few, 48 by 8", "few, 80 by 0"]
    for y, other in zip(ys, want, strict=True):
        assert y.shape == (2, 3, other.shape[1])
        torch.testing.assert_close(y.view(other.shape), other, rtol=0.05, atol=0.05)


def test_without_gradients_nothing_is_kept(native: Native) -> None:
    one = projection()
    leaves = (one.lora_A, one.lora_B)
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    with torch.no_grad():
        bare = ops.lora_linear_group(random(3, K), [one])[0]
    assert bare.grad_fn is None
    assert not bare.requires_grad
    assert ops.lora_linear_group(random(3, K), [one])[0].grad_fn is not None
