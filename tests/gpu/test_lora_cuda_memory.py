"""LoRA linears of more than 2³¹ elements, and what they allocate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ferrotune import ops
from ferrotune.ops import dropout
from lora_cases import error, make, ours, run, truth

BF16 = torch.bfloat16


def needs_free(bytes_needed: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < bytes_needed:
        pytest.skip(f"needs {bytes_needed >> 30} GiB of free device memory")


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_more_than_2_to_the_31_outputs(quant_type: str | None) -> None:
    needs_free(40 << 30)
    m, k, n, r, tail = 65_536, 16, 32_776, 8, 64
    assert m * n > 2**31
    small = make((tail, k), n, r, dtype=BF16, bias=True, quant_type=quant_type)
    case = small.to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(m, k, device="cuda", generator=generator).to(BF16)
    grad = torch.randn(m, n, device="cuda", generator=generator, dtype=BF16)
    leaves = case.inputs() | {"x": x.requires_grad_()}
    y = ours(case, **leaves)
    y.backward(grad)
    for rows in (slice(0, tail), slice(m // 2, m // 2 + tail), slice(m - tail, m)):
        part = replace(case, x=x[rows].detach(), grad=grad[rows])
        want, true = run(part, ours), truth(part)
        for name, found in (("y", y[rows].detach()), ("x", x.grad[rows])):
            # dX of all rows was seen 1.25 times as far off as that of these rows alone: cuBLAS
            # takes another product for another size.
            assert error(found, true[name]) < 1.5 * error(want[name], true[name]) + 1e-4, name
    sums: dict[str, Tensor] = {}
    for start in range(0, m, 4096):
        rows = slice(start, start + 4096)
        for name, part in truth(replace(case, x=x[rows].detach(), grad=grad[rows])).items():
            if name not in ("x", "y"):
                sums[name] = sums.get(name, 0) + part
    for name, true in sums.items():
        assert error(leaves[name].grad, true) < 1e-2, name


def mask_from(start: int, elements: int, p: float, seed: int) -> Tensor:
    """Which elements from ``start`` (a multiple of 8) on stream 0 keeps, by the formula."""
    lanes = torch.arange(start // 8, (start + elements) // 8, device="cuda")
    zero = torch.zeros_like(lanes)
    words = dropout._philox(
        [lanes & 0xFFFF_FFFF, lanes >> 32, zero, zero],
        [torch.tensor(seed & 0xFFFF_FFFF, device="cuda"), torch.tensor(seed >> 32, device="cuda")],
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).reshape(-1) >= round(p * 65_536)


def test_more_than_2_to_the_31_inputs_and_their_masks() -> None:
    """Over a base of zeros, dX is what the mask keeps of G·A."""
    needs_free(30 << 30)
    m, k, n, r, tail, p, seed = 65_536, 32_776, 16, 8, 64, 0.25, 1234
    assert m * k > 2**31
    ones = {"device": "cuda", "dtype": BF16}
    x = torch.ones(m, k, **ones, requires_grad=True)
    lora_A = torch.ones(r, k, **ones, requires_grad=True)
    lora_B = torch.ones(n, r, **ones, requires_grad=True)
    y = ops.lora_linear(
        x, torch.zeros(n, k, **ones), lora_A, lora_B, 2.0**-20, dropout_p=p,
        seed=torch.tensor([seed], device="cuda"),
    )  # fmt: skip
    y.backward(torch.ones(m, n, **ones))
    for first in (0, m // 2, m - tail):
        kept = mask_from(first * k, tail * k, p, seed).view(tail, k)
        rows = slice(first, first + tail)
        assert torch.equal(x.grad[rows] != 0, kept)
        want = kept.double().sum(1) / (1 - p) * r * 2.0**-20
        assert error(y[rows, 0].detach(), want) < 1e-2
    columns = slice(0, 2048)
    share = (x.grad[:, columns] != 0).double().sum(0) / (1 - p) * n * 2.0**-20
    assert error(lora_A.grad[0, columns], share) < 1e-2


def extra_memory(work: Callable[[], Sequence[Tensor]]) -> int:
    """Peak bytes of ``work`` beyond what was there before and what it returns."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = sum(tensor.numel() * tensor.element_size() for tensor in work())
    return torch.cuda.max_memory_allocated() - before - returned


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("adapter", [BF16, torch.float32])
@pytest.mark.parametrize(
    ("k", "outs"), [(4096, [4096]), (4096, [14336]), (14336, [4096]), (4096, [14336, 14336])]
)
def test_extra_memory(k: int, outs: list[int], adapter: torch.dtype, dropout_p: float) -> None:
    """Beyond y, dX and the adapters' gradients: two dense weights of the largest layer, and H."""
    needs_free(8 << 30)
    torch.utils.deterministic.fill_uninitialized_memory = False
    m, r, device = 8192, 16, torch.device("cuda")
    group, leaves = [], [torch.randn(1, m, k, device=device).to(BF16).requires_grad_()]
    for n in outs:
        weight = torch.randn(n, k, device=device).mul_(k**-0.5).to(BF16)
        lora_A = torch.randn(r, k, device=device).mul_(k**-0.5).to(adapter).requires_grad_()
        lora_B = torch.randn(n, r, device=device).mul_(r**-0.5).to(adapter).requires_grad_()
        leaves += [lora_A, lora_B]
        quant = ops.quantize_4bit(weight)
        group.append(ops.Projection(None, quant, None, lora_A, lora_B, None, 2.0, dropout_p))
    del weight
    grads = [torch.randn(1, m, n, device=device).to(BF16) for n in outs]

    def work() -> list[Tensor]:
        ys = ops.lora_linear_group(leaves[0], group)
        return [*ys, *torch.autograd.grad(ys, leaves, grads)]

    h = m * r * adapter.itemsize * len(outs)
    scratch = k * max(outs) * BF16.itemsize
    extra = extra_memory(work)
    print(f"{k} to {outs}: {(extra - h) / scratch:.2f} scratch weights beside H")
    assert extra <= 2 * scratch + h
