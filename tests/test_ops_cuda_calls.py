"""What the CUDA backend hands to its native calls, held to plain PyTorch on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import native_lora
from ferrotune import ops
from ferrotune.ops import autograd, cuda_lora, cuda_plan, reference
from ferrotune.ops.types import Projection, Quant4bit
from native_lora import Native

BF16, F32 = torch.bfloat16, torch.float32
N, K, R = 48, 32, 8


@pytest.fixture(params=["own product", "PyTorch's", "few rows"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Native]:
    few = request.param == "few rows"
    yield native_lora.install(monkeypatch, request.param != "PyTorch's", few)
    native_lora.forget()


def random(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    return (torch.randn(shape) / 2).to(dtype).requires_grad_(grad)


def weight(kind: str) -> Tensor | Quant4bit | None:
    if kind == "none":
        return None
    if kind == "transposed":
        return random(K, N).t()
    if kind == "strided":
        return random(N, 2 * K)[:, ::2]
    if kind == "unaligned":
        return random(N * K + 1)[1:].view(N, K)
    dense = random(N, K)
    return dense if kind == "dense" else ops.quantize_4bit(dense, double_quant=kind == "nested")


def projection(
    kind: str, *, adapter: torch.dtype = BF16, biases: bool = False, p: float = 0.0, r: int = R
) -> Projection:
    found = weight(kind)
    dense, quant = (None, found) if isinstance(found, Quant4bit) else (found, None)
    bias = random(N, grad=True) if biases and found is not None else None
    lora_bias = random(N, dtype=adapter, grad=True) if biases else None
    A, B = random(r, K, dtype=adapter, grad=True), random(N, r, dtype=adapter, grad=True)
    return Projection(dense, quant, bias, A, B, lora_bias, 0.5, p)


def leaves(x: Tensor, projections: list[Projection]) -> list[Tensor]:
    trained = [part for one in projections for part in (one.bias, *one[3:6])]
    return [x, *[part for part in trained if part is not None]]


def run(
    x: Tensor, projections: list[Projection], seed: Tensor, grads: list[Tensor | None]
) -> list[Tensor]:
    """The outputs, and the gradients that are there."""
    ys = ops.lora_linear_group(x, projections, seed=seed)
    used = [(y, grad) for y, grad in zip(ys, grads, strict=True) if grad is not None]
    wanted = [leaf for leaf in leaves(x, projections) if leaf.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in used], wanted, [grad for _, grad in used], allow_unused=True
    )
    return [y.detach() for y in ys] + [torch.zeros(0) if one is None else one for one in found]


def agree(
    x: Tensor,
    projections: list[Projection],
    monkeypatch: pytest.MonkeyPatch,
    grads: list[Tensor | None] | None = None,
) -> None:
    seed = torch.tensor([5])
    if grads is None:
        grads = [random(*x.shape[:-1], N) for _ in projections]
    found = run(x, projections, seed, grads)
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "choose", lambda x: reference)
        want = run(x, projections, seed, grads)
    for one, other in zip(found, want, strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize(
    "kind", ["dense", "transposed", "strided", "unaligned", "nested", "plain", "none"]
)
@pytest.mark.parametrize("adapter", [BF16, F32])
def test_one_projection(
    native: Native,
    monkeypatch: pytest.MonkeyPatch,
    adapter: torch.dtype,
    kind: str,
    shape: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    for biases in (False, True):
        for p in (0.0, 0.3, 1.0):
            one = projection(kind, adapter=adapter, biases=biases, p=p)
            agree(random(*shape, K, grad=True), [one], monkeypatch)
            agree(random(*shape, K), [one], monkeypatch)
    assert bool(native.calls) == (shape != (0,))


@pytest.mark.parametrize("left_out", [None, 0, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_groups(
    native: Native, monkeypatch: pytest.MonkeyPatch, p: float, left_out: int | None
) -> None:
    """Of weights that take one call, several, and passes of their own."""
    torch.manual_seed(0)
    x = random(2, 3, K, grad=True)
    for kinds in (("dense", "dense"), ("nested", "plain", "dense"), ("transposed", "dense")):
        group = [projection(kind, p=p, biases=True) for kind in kinds]
        group += [projection("dense", adapter=F32), projection("dense", r=65)]
        grads: list[Tensor | None] = [random(2, 3, N) for _ in group]
        if left_out is not None:
            grads[left_out] = None
        agree(x, group, monkeypatch, grads)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapter", [BF16, F32])
def test_ranks_are_those_of_forward(native: Native, adapter: torch.dtype, p: float) -> None:
    """Without the products; also without an adapter, and of a rank that no kernel takes."""
    x, seed = random(6, K), torch.tensor([5])
    projections = [
        projection("nested", adapter=adapter, p=p, biases=True),
        Projection(random(N, K), None, None),
        projection("dense", adapter=adapter, p=p),
        projection("dense", adapter=adapter, r=512),
    ]
    for some in (projections, projections[:1]):
        with torch.no_grad():
            _, want = cuda_lora.forward(x, some, seed)
            found = cuda_lora.ranks(x, some, seed)
        for one, other, form in zip(found, want, cuda_lora.saved(x, some), strict=True):
            assert (one is None) == (other is None) == (form is None)
            if one is not None and other is not None:
                assert (tuple(one.shape), one.dtype) == form
                # A view in integers: a mask's bits are no numbers.
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_plans_are_told_apart(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that differ in one thing alone, one after the other and again."""
    torch.manual_seed(0)
    x, one = random(6, K, grad=True), projection("dense", biases=True)
    frozen = one._replace(lora_A=random(R, K), lora_B=random(N, R), lora_bias=None)
    variants = [
        one,
        one._replace(dropout_p=0.5),
        one._replace(dropout_p=1.0),
        one._replace(scaling=2.0),
        one._replace(stream=3, dropout_p=0.5),
        one._replace(bias=None),
        one._replace(weight=random(K, N).t()),
        one._replace(weight=random(N * K + 1)[1:].view(N, K)),
        one._replace(weight=random(N, 2 * K)[:, ::2]),
        one._replace(weight=None, quant=ops.quantize_4bit(random(N, K)), bias=None),
        projection("dense", adapter=F32),
        projection("dense", adapter=F32, p=0.5),
        projection("dense", p=1.0),
        projection("dense", r=R + 1),
        frozen,
    ]

    def calls(variant: Projection) -> list[str]:
        native.calls.clear()
        agree(x, [variant], monkeypatch)
        return list(native.calls)

    alone = []
    for variant in variants:
        cuda_plan._plans.clear()
        alone.append(calls(variant))
    for _ in range(2):
        assert [calls(variant) for variant in variants] == alone
    made = len(cuda_plan._plans)
    assert made < len(variants)  # scaling and stream are no matter of plans
    agree(x, [one], monkeypatch)
    assert len(cuda_plan._plans) == made
    unaligned = random(6 * K + 1)[1:].view(6, K).requires_grad_()
    agree(unaligned, [one], monkeypatch)
    agree(x, [one], monkeypatch, [random(6 * N + 1)[1:].view(6, N)])
    agree(x.detach(), [one], monkeypatch)


def test_plans_stay_few(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_plan, "_MOST_PLANS", 4)
    one = projection("dense")
    for m in range(1, 12):
        agree(random(m, K, grad=True), [one], monkeypatch)
        assert len(cuda_plan._plans) <= 4


def test_writes_between_forward_and_backward_are_seen(native: Native) -> None:
    one = projection("dense")
    for written in (one.lora_A, one.lora_B, one.weight):
        x = random(6, K, grad=True)
        y = ops.lora_linear_group(x, [one])[0]
        assert written is not None
        with torch.no_grad():
            written.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_second_derivative_is_refused(native: Native) -> None:
    x = random(6, K, grad=True)
    y = ops.lora_linear_group(x, [projection("dense")])[0]
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    y = ops.lora_linear_group(x, [projection("dense")])[0]
    scaled = (y * y).sum()
    (grad,) = torch.autograd.grad(scaled, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_parts_of_a_weight_on_another_device(native: Native) -> None:
    quant = ops.quantize_4bit(random(N, K))
    elsewhere = quant._replace(absmax=quant.absmax.to("meta"))
    one = projection("none")._replace(quant=elsewhere)
    for _ in range(2):
        with pytest.raises(ValueError, match="must all be on cpu"):
            ops.lora_linear_group(random(6, K), [one])


def test_dropout_wants_a_seed_where_x_is(native: Native) -> None:
    one = projection("dense", p=0.5)
    for seed in (None, torch.empty(1, dtype=torch.int64, device="meta")):
        with pytest.raises(ValueError, match="seed on x's device"):
            cuda_lora.forward(random(6, K), [one], seed)


@pytest.mark.usefixtures("native")
def test_cast_adapters_get_gradients_as_wide_as_they_are() -> None:
    """Under autocast their gradients are not rounded, unless a bias of the other type has one."""
    x, grad = random(5, K), random(5, N)
    for biases in (False, True):
        one = projection("nested", adapter=F32, biases=biases)
        if biases:
            one = one._replace(bias=random(N, grad=True), lora_bias=None)
        with torch.autocast("cpu", BF16):
            (y,) = ops.lora_linear_group(x, [one])
        y.backward(grad)
        for lora in (one.lora_A, one.lora_B):
            assert lora is not None
            assert lora.grad is not None
            assert lora.grad.dtype == F32
            assert torch.equal(lora.grad, lora.grad.to(BF16).to(F32)) is biases


@pytest.mark.parametrize("kind", ["dense", "nested", "transposed", "unaligned"])
@pytest.mark.parametrize("adapter", [BF16, F32])
def test_gate_and_up_at_once(native: Native, adapter: torch.dtype, kind: str) -> None:
    """With what comes after them, where one product takes both; elsewhere not at all."""
    torch.manual_seed(0)
    seed = torch.tensor([5])
    x = random(2, 3, K)
    for biases, p, r in itertools.product((False, True), (0.0, 0.3), (R, 17)):
        pair = [projection(kind, adapter=adapter, biases=biases, p=p, r=r) for _ in range(2)]
        how = cuda_lora.plan(x, pair)
        for activation in ("silu", "gelu_tanh", "gelu"):
            native.calls.clear()
            found = cuda_lora.gated(x, pair, activation, seed, how)
            fits = r == R or adapter == BF16  # what one product takes
            # Few rows have a kernel of their own.
            straight = kind == "dense" or (kind == "nested" and (p > 0 or not native.few))
            taken = native.carries and straight and fits and not biases and activation != "gelu"
            assert (found is not None) == taken
            assert native.calls == (["gated"] if taken else [])
            if found is None:
                continue
            ys, hidden, hs = found
            rows = x.view(6, K)
            with torch.no_grad():
                want, _ = reference.forward(rows, pair, seed)
            torch.testing.assert_close([y.view(6, N) for y in ys], want, rtol=0.05, atol=0.05)
            expected = ops.glu(*ys, activation)
            torch.testing.assert_close(hidden, expected, rtol=0.02, atol=0.02)
            assert [None if h is None else h.shape for h in hs] == [
                form and torch.Size(form[0]) for form in cuda_lora.saved(rows, pair)
            ]
