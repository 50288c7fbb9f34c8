"""The CUDA backend where no kernel takes the adapter: its bookkeeping, which needs no device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ferrotune.ops import cuda_lora, reference
from ferrotune.ops.types import Grads, Need, Projection

M, K = 6, 10
Group = list[Projection]


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def group(drop: float) -> Group:
    """f32: no kernel takes it. With and without adapter, weight and biases, and of rank 0."""
    return [
        Projection(random(7, K), None, random(7), random(4, K), random(7, 4), random(7), 0.5, drop),
        Projection(random(5, K), None, random(5), stream=1),
        Projection(random(3, K), None, None, random(0, K), random(3, 0), random(3), 0.5, stream=2),
        Projection(None, None, random(8), random(2, K), random(8, 2), None, 2.0, drop, stream=3),
    ]


def flat(grads: Grads) -> list[Tensor | None]:
    return [grads.x, *(grad for column in grads[1:] for grad in column)]


def same(found: Grads, want: Grads) -> None:
    for one, other in zip(flat(found), flat(want), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("left_out", [None, 0, 2])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_gradients_are_the_references(drop: float, left_out: int | None) -> None:
    torch.manual_seed(0)
    x, seed, projections = random(M, K), torch.tensor([7]), group(drop)
    ys, hs = cuda_lora.forward(x, projections, seed)
    want_ys, want_hs = reference.forward(x, projections, seed)
    for y, want_y in zip(ys, want_ys, strict=True):
        torch.testing.assert_close(y, want_y)
    assert [None if h is None else (tuple(h.shape), h.dtype) for h in hs] == cuda_lora.saved(
        x, projections
    )
    grads: list[Tensor | None] = [torch.randn_like(y) for y in ys]
    if left_out is not None:
        grads[left_out] = None
    for asked in (True, False):
        every = (asked,) * len(projections)
        need = Need(True, every, every, every, every)
        found = cuda_lora.backward(grads, x, hs, projections, seed, need)
        same(found, reference.backward(grads, x, want_hs, projections, seed, need))


def test_the_bias_of_an_adapter_of_rank_0_has_its_gradient() -> None:
    torch.manual_seed(0)
    x, projections = random(M, K), [group(0.0)[2]]
    grad = random(M, 3)
    need = Need(False, (False,), (False,), (False,), (True,))
    _, hs = cuda_lora.forward(x, projections, None)
    found = cuda_lora.backward([grad], x, hs, projections, None, need)
    assert found.lora_bias[0] is not None
    torch.testing.assert_close(found.lora_bias[0], 0.5 * grad.sum(0))
