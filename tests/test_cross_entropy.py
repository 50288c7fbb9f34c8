"""Linear cross-entropy beside float64: values, gradients, chunks, adapters, errors."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from ferrotune import ops  # noqa: E402
from ferrotune.nn import LinearCrossEntropyLoss  # noqa: E402
from ferrotune.ops import cross_entropy_chunks, cross_entropy_reference  # noqa: E402
from loss_cases import Loss, make, ours, run, stock  # noqa: E402

# Relative (Frobenius) errors against float64, of the rounded inputs.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"reduction": "sum", "label_smoothing": 1.0},
    {"num_items": 7, "softcap": 20.0, "label_smoothing": 0.2},
    {"num_items": torch.tensor([3.5]), "ignore_index": 5},
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def agree(case: Loss, tolerance: float | None = None) -> None:
    found, true = run(case, ours), run(case, stock, torch.float64)
    limit = TOLERANCES[case.hidden.dtype] if tolerance is None else tolerance
    for name, tensor in found.items():
        assert tensor is not None, name
        assert relative(tensor, true[name]) <= limit, name


@pytest.fixture(params=[None, 1, 4], ids=["one chunk", "rows of 1", "rows of 4"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    rows: int | None = request.param
    if rows is not None:
        monkeypatch.setattr(cross_entropy_reference, "chunk_rows", lambda *_: rows)
    return rows


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_is_the_loss_of_float64(
    settings: dict[str, Any], dtype: torch.dtype, chunk: int | None
) -> None:
    for seed, (shape, bias) in enumerate([((3, 7), True), ((5,), False), ((), True)]):
        agree(make(shape, dtype=dtype, bias=bias, seed=seed, grad=0.3, ignored=0.2, **settings))


def test_dtypes_of_results() -> None:
    for dtype in TOLERANCES:
        case = make(dtype=dtype)
        found = run(case, ours)
        assert found["loss"].dtype == torch.promote_types(dtype, torch.float32)
        assert found["loss"].shape == ()
        assert {tensor.dtype for name, tensor in found.items() if name != "loss"} == {dtype}


def test_large_logits_and_masked_classes() -> None:
    agree(make(size=200.0, bias=False))
    case = make(ignored=0.0, label_smoothing=0.0)
    assert case.bias is not None
    case.bias[5:20] = -torch.inf
    case.labels %= 5
    agree(case)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_labels_ignored(reduction: str) -> None:
    """A mean of nothing is NaN, as PyTorch's; no gradient is."""
    case = make(ignored=1.1, reduction=reduction)
    found, torchs = run(case, ours), run(case, stock)
    assert torch.equal(found["loss"], torchs["loss"]) or (
        bool(found["loss"].isnan()) and bool(torchs["loss"].isnan())
    )
    for name, tensor in found.items():
        assert name == "loss" or not tensor.any(), name


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    found = run(make(shape, reduction="sum"), ours)
    assert found["loss"] == 0
    assert found["gradient of hidden"].shape == (*shape, 16)
    assert not found["gradient of weight"].any()
    assert run(make(shape), ours)["loss"].isnan()


@pytest.mark.parametrize("label", [37, -1, 2**40])
def test_a_label_out_of_range(label: int) -> None:
    case = make(ignored=0.0)
    case.labels[1, 2] = label
    with pytest.raises(
        IndexError, match=rf"label {label} is neither ignore_index \(-100\) nor one"
    ):
        run(case, ours)


def test_strides_and_integer_types() -> None:
    case = make((4, 6), ignored=0.2)
    want = run(case, ours)
    assert torch.equal(
        ours(case, {name: leaf.detach() for name, leaf in case.leaves().items()}), want["loss"]
    )
    turned = case.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    doubled = case.weight.repeat_interleave(2, 1)[:, ::2]
    loss = ops.linear_cross_entropy(turned, doubled, case.labels.int(), bias=case.bias)
    assert torch.equal(loss, want["loss"])
    assert torch.equal(
        ops.linear_cross_entropy(turned, doubled.t().contiguous().t(), case.labels, bias=case.bias),
        want["loss"],
    )


def test_the_logits_are_never_held() -> None:
    """No tensor of a step is larger than the weight, whose gradient is computed, or a chunk."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    case = make((4096,), 1001, 8, softcap=5.0)
    rows = cross_entropy_reference.chunk_rows(case.hidden, 1001 * 64, True)
    assert rows < 1024
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_reference, "chunk_rows", lambda *_: rows)
        with Sizes():
            run(case, ours)
    assert max(sizes) == rows * 1001


def test_chunks_of_the_cpu_are_bounded() -> None:
    for classes in (32_000, 128_256, 256_000):
        for dtype, softcap in ((torch.bfloat16, False), (torch.float32, True)):
            x = torch.empty(0, 4096, dtype=dtype)
            rows = cross_entropy_reference.chunk_rows(x, classes, softcap)
            assert 32 <= rows <= 2048
            assert rows * classes * 4 <= 128 << 20


def test_frozen_parts_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    asked = []
    original = cross_entropy_chunks.run

    def spy(*arguments: Any) -> Any:
        asked.append(tuple(arguments[-1]))
        return original(*arguments)

    monkeypatch.setattr("ferrotune.ops.cross_entropy.run", spy)
    for frozen in (("weight", "bias"), ("hidden",), ("hidden", "weight", "bias")):
        leaves = case.leaves()
        for name in frozen:
            leaves[name].requires_grad_(False)
        loss = ours(case, leaves)
        if len(frozen) < 3:
            loss.backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name in frozen)
        assert asked.pop()[:3] == tuple(name not in frozen for name in leaves)
    with torch.no_grad():
        assert not ours(case, case.leaves()).requires_grad
    assert not any(asked.pop())


def test_backward_twice_and_gradients_of_any_size() -> None:
    case = make(dtype=torch.float64)
    leaves = case.leaves()
    loss = ours(case, leaves)
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(loss * 3, list(leaves.values()))
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one * 3, other)


def test_float16_gradients_do_not_vanish() -> None:
    """Probabilities of 1e-6 over 1e5 tokens, under a GradScaler's 2¹⁶."""
    agree(make((64,), 2003, 64, dtype=torch.float16, num_items=1e5, grad=2.0**16, size=0.1))


def test_accumulated_batches_are_one_large_batch() -> None:
    case = make((8, 12), 53, dtype=torch.float64, ignored=0.6)
    items = (case.labels != -100).sum()
    want = run(case, ours)
    leaves = case.leaves()
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 8)):
        part = leaves | {"hidden": leaves["hidden"][rows]}
        piece = Loss(case.hidden, case.weight, case.labels[rows], case.bias, {"num_items": items})
        loss = ours(piece, part)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, want["loss"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, want[f"gradient of {name}"])


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_an_adapted_head(dtype: torch.dtype, adapter: torch.dtype, dropout_p: float) -> None:
    case = make((4, 9), dtype=dtype)
    lora = {
        "lora_A": (torch.randn(5, 16) / 4).to(adapter),
        "lora_B": (torch.randn(37, 5) / 4).to(adapter),
    }
    seed = torch.tensor([11])

    def ferrotunes(case: Loss, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.linear_cross_entropy(
            leaves["hidden"], leaves["weight"], case.labels, bias=leaves["bias"],
            lora_A=leaves["lora_A"], lora_B=leaves["lora_B"], scaling=1.5, dropout_p=dropout_p,
            seed=seed,
        )  # fmt: skip

    def formula(case: Loss, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        x = leaves["hidden"]
        mask = ops.dropout_mask(x.shape, dropout_p, seed, dtype=torch.float64)
        low = (x * mask) @ leaves["lora_A"].t()
        logits = x @ leaves["weight"].t() + leaves["bias"] + 1.5 * low @ leaves["lora_B"].t()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), case.labels.flatten())

    found, true = [], []
    for call, kind, to in ((ferrotunes, None, found), (formula, torch.float64, true)):
        leaves = case.leaves(kind)
        leaves |= {n: t.to(kind or t.dtype, copy=True).requires_grad_() for n, t in lora.items()}
        loss = call(case, leaves)
        loss.backward()
        to += [loss.detach(), *(leaf.grad for leaf in leaves.values())]
    coarse = torch.promote_types(dtype, adapter) == torch.bfloat16 or dtype == torch.bfloat16
    limit = TOLERANCES[torch.bfloat16 if coarse or adapter == torch.bfloat16 else dtype]
    for one, other in zip(found, true, strict=True):
        assert relative(one, other) <= limit


def test_autocast_is_the_cast_operation() -> None:
    case = make()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(case, leaves := case.leaves())
    loss.backward()
    cast = {name: leaf.bfloat16() for name, leaf in case.leaves().items()}
    assert torch.equal(loss, ours(case, cast))
    assert leaves["hidden"].grad is not None
    assert leaves["hidden"].grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    case = make()
    want = run(case, ours)
    leaves = case.leaves()

    def block(hidden: torch.Tensor) -> torch.Tensor:
        return ours(case, leaves | {"hidden": hidden})

    loss: Any = checkpoint(block, leaves["hidden"], use_reentrant=use_reentrant)
    loss.backward()
    assert torch.equal(loss, want["loss"])
    assert torch.equal(leaves["hidden"].grad, want["gradient of hidden"])


def test_module() -> None:
    case = make(label_smoothing=0.1, softcap=4.0, ignore_index=3)
    loss = LinearCrossEntropyLoss(**case.settings)
    assert torch.equal(
        loss(case.hidden, case.weight, case.labels, bias=case.bias), run(case, ours)["loss"]
    )
    assert "softcap=4.0" in repr(loss)
    divided = loss(case.hidden, case.weight, case.labels, bias=case.bias, num_items=5)
    case.settings["num_items"] = 5
    assert torch.equal(divided, run(case, ours)["loss"])
    with pytest.raises(ValueError, match="reduction must be"):
        LinearCrossEntropyLoss(reduction="none")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(37, 15)}, ValueError, r"hidden must be \[..., d\] and weight"),
        ({"weight": torch.zeros(37, 16).half()}, TypeError, "weight is torch.float16, but hidden"),
        ({"weight": None}, TypeError, "weight must be a dense tensor"),
        ({"hidden": torch.zeros(3, 7, 16).int()}, TypeError, "hidden must be float32"),
        ({"labels": torch.zeros(3, 6).long()}, ValueError, r"labels must be \[3, 7\]"),
        ({"labels": torch.zeros(3, 7)}, TypeError, "labels must be integers"),
        ({"labels": torch.zeros(3, 7, device="meta").long()}, ValueError, "labels is on meta"),
        ({"bias": torch.zeros(36)}, ValueError, r"bias must be \[37\]"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items divides a mean"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must be one number"),
        ({"lora_A": torch.zeros(4, 16)}, ValueError, "lora_A and lora_B go together"),
        (
            {"lora_A": torch.zeros(4, 16), "lora_B": torch.zeros(36, 4)},
            ValueError,
            r"lora_B \[37, r\]",
        ),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = make()
    given = {"hidden": case.hidden, "weight": case.weight, "labels": case.labels, "bias": case.bias}
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(**(given | change))
