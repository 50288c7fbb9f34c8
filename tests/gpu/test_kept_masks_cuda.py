"""The mask that forward keeps behind H for its backward, on Hopper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ferrotune import ops
from ferrotune.ops import cuda_lora
from ferrotune.ops.types import Need, Projection

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED, STREAM = 12_345, 3
PLACES = [i // 2 + 16 * (i % 2) for i in range(32)]  # of 32 elements' bits in their word
# Odd rows; columns no multiple of 32, 64 or 128; fewer than a tile and more; the last fill a chip.
SIZES = [(1, 8), (37, 40), (129, 200), (1031, 1032), (1030, 2048), (7600, 264)]

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="masks are kept on Hopper alone",
)


@pytest.fixture(params=["auto", "always"])
def use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Hopper's own kernels are used: forward has another to its rank, which keeps it, too."""
    monkeypatch.setattr("ferrotune.ops.cuda_lora.hopper", request.param)


def case(
    m: int, k: int, n: int, r: int, p: float, dtype: torch.dtype, adapter: torch.dtype
) -> tuple[Tensor, Projection, Tensor]:
    """x, a projection, and a gradient."""
    draw = torch.Generator("cuda").manual_seed(m + k)

    def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=draw, device="cuda").mul(k**-0.25).to(kind)

    lora_A, lora_B = normal(r, k, kind=adapter), normal(n, r, kind=adapter)
    one = Projection(normal(n, k), None, None, lora_A, lora_B, None, 0.5, p, STREAM)
    return normal(m, k), one, normal(m, n)


def seed() -> Tensor:
    return torch.tensor([SEED], device="cuda")


def split(h: Tensor, one: Projection, x: Tensor) -> tuple[Tensor, Tensor]:
    """H, and the words of the mask."""
    (m, k), planes = x.shape, 1 if one.lora_A.dtype == x.dtype else 3
    columns = planes * -(-one.rank // 16) * 16
    flat = h.view(-1)
    mask = flat[m * columns :].view(torch.int32).view(m, 4 * -(-k // 128))
    return flat[: m * columns].view(x.dtype).view(m, columns), mask


def kept_elements(words: Tensor, k: int) -> Tensor:
    places = torch.tensor(PLACES, dtype=torch.int32, device=words.device)
    return (words[:, :, None] >> places & 1).flatten(1)[:, :k].bool()


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (F16, F16), (BF16, F32)])
@pytest.mark.parametrize("p", [1e-5, 0.05, 0.5, 0.9999, 1.0])
def test_it_is_the_mask_of_the_formula(p: float, dtype: torch.dtype, adapter: torch.dtype) -> None:
    for m, k in SIZES:
        x, one, _ = case(m, k, 24, 16, p, dtype, adapter)
        _, (h,) = cuda_lora.forward(x, [one], seed())
        (again,) = cuda_lora.ranks(x, [one], seed())
        assert h is not None
        assert again is not None
        assert (tuple(h.shape), h.dtype) == cuda_lora.saved(x, [one])[0]
        want = ops.dropout_mask((m, k), p if p < 1 else 0.9999, seed(), STREAM) > 0
        for kept in (h, again):
            bits = kept_elements(split(kept, one, x)[1], k)
            if p < 1:
                assert torch.equal(bits, want), (m, k)
            else:
                assert not (bits & ~want).any(), (m, k)
        assert torch.equal(split(h, one, x)[0], split(again, one, x)[0]), (m, k)


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (F16, F32)])
def test_backward_takes_it(dtype: torch.dtype, adapter: torch.dtype) -> None:
    """With another mask in its place all that depends on it is as under that one."""
    p = 0.25
    for m, k in [(1031, 264), (1152, 1032)]:
        x, one, grad = case(m, k, 128, 16, p, dtype, adapter)
        how = cuda_lora.plan(x, [one])
        _, (h,) = cuda_lora.forward(x, [one], seed(), how)
        assert h is not None
        split(h, one, x)[1].fill_(0x5A3C_17E9)
        keeps = kept_elements(split(h, one, x)[1], k)
        need = Need(True, (True,), (False,), (False,), (False,))
        found = cuda_lora.backward([grad], x, [h], [one], seed(), need, how)
        wide = [part.double() for part in (grad, x, one.weight, one.lora_A, one.lora_B)]  # type: ignore[union-attr]
        g, x64, weight, lora_A, lora_B = wide
        down = g @ lora_B * (one.scaling / (1 - p))
        true_A, term = down.t() @ (x64 * keeps), down @ lora_A * keeps
        assert found.lora_A[0] is not None
        assert found.x is not None
        assert (found.lora_A[0].double() - true_A).norm() < 6e-3 * true_A.norm()
        if not cuda_lora.planned_backward(how, [grad], x, [one], need).passes[0].live[0].based:
            continue  # elsewhere the term's own kernel makes the mask again
        assert (found.x.double() - g @ weight - term).norm() < 6e-3 * (g @ weight + term).norm()


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("adapter", [BF16, F32])
@pytest.mark.parametrize("asked", ["x", "lora_A", "lora_B", "all but lora_A"])
def test_what_is_asked_for_alone_is_the_same(asked: str, adapter: torch.dtype) -> None:
    for m, k, r in [(1031, 264, 16), (1500, 2048, 48), (1500, 1032, 64)]:
        x, one, grad = case(m, k, 256, r, 0.1, BF16, adapter)
        how = cuda_lora.plan(x, [one])
        _, hs = cuda_lora.forward(x, [one], seed(), how)

        def run(need: Need) -> list[Tensor | None]:
            found = cuda_lora.backward([grad], x, hs, [one], seed(), need, how)  # noqa: B023
            return [found.x, found.lora_A[0], found.lora_B[0]]

        most, no = asked == "all but lora_A", (False,)
        for_A, for_B = (asked == "lora_A",), (most or asked == "lora_B",)
        some = run(Need(most or asked == "x", for_A, for_B, no, no))
        every = run(Need(True, (True,), (True,), (False,), (False,)))
        for found, want in zip(some, every, strict=True):
            assert want is not None
            assert found is None or torch.equal(found, want), (m, k, r)
