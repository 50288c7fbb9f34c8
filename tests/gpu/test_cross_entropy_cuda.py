"""Linear cross-entropy on CUDA: beside float64 and PyTorch's own operations, and its behaviour."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from covering import pairwise
from exactness import Exactness
from ferrotune import ops
from ferrotune.ops import cross_entropy_reference as reference
from ferrotune.ops import cuda, cuda_cross_entropy
from ferrotune.ops.cross_entropy_types import Settings
from loss_cases import Loss, make, ours, run, stock

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Within a vector, a block's threads, a multiprocessor's shared memory in each type, and beyond.
CLASSES = [1, 3, 7, 8, 9, 37, 1000, 4096, 5003, 32_000, 58_001, 120_000, 128_256, 256_001]
CASES: dict[str, Any] = {
    "size": [((5,), 3, 8), ((3, 7), 37, 16), ((40,), 32_001, 64), ((130,), 128_256, 32)],
    "dtype": [F32, F16, BF16],
    "bias": [False, True],
    "ignored": [0.0, 0.4],
    "reduction": ["mean", "sum", "items"],
    "label_smoothing": [0.0, 0.1],
    "softcap": [None, 4.0],
    "chunk": [None, 16],
    "grad": [1.0, 0.3],
}


def cases() -> Iterator[tuple[str, int | None, Loss]]:
    for number, row in enumerate(pairwise(CASES)):
        shape, classes, d = row.pop("size")
        reduction, chunk = row.pop("reduction"), row.pop("chunk")
        if reduction == "items":
            row["num_items"] = 77
        else:
            row["reduction"] = reduction
        label = f"{classes} classes, {row}, {reduction}, chunks of {chunk}"
        yield label, chunk, make(shape, classes, d, device="cuda", seed=number, **row)


def test_no_less_exact_than_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Exactness()
    for label, chunk, case in cases():
        with monkeypatch.context() as patch:
            if chunk is not None:
                patch.setattr(cuda_cross_entropy, "chunk_rows", lambda *_, rows=chunk: rows)
            found = run(case, ours)
        own = run(case, stock)
        if own["loss"].isnan():
            assert found.pop("loss").isnan()
            own.pop("loss")
        true = run(case, stock, torch.float64)
        true = {name: true[name] for name in found}
        exact.add(label, found, own, true, case.hidden.numel())
    exact.check()


def rows_of(
    step: Any, logits: Tensor, labels: Tensor, settings: Settings, multiplier: float | None
) -> tuple[Tensor, Tensor]:
    """What a step makes of a copy of the logits, rows apart as the CUDA kernel wants them."""
    rows, classes = logits.shape
    space = logits.new_full((rows, cuda_cross_entropy.stride(logits, classes) + 16), torch.nan)
    place = space[:, :classes]
    place.copy_(logits)
    wide = torch.promote_types(logits.dtype, F32)
    losses = logits.new_full((rows,), torch.nan, dtype=wide)
    factor = None if multiplier is None else logits.new_full((), multiplier, dtype=wide)
    step.rows(place, labels, losses, factor, settings)
    assert space[:, classes:].isnan().all()
    return losses, place


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_kernel(classes: int, dtype: torch.dtype) -> None:
    """Of the same logits: the loss to f32's rounding, the gradient to that of its type."""
    generator = torch.Generator("cuda").manual_seed(classes)
    rows = 150 if classes < 50_000 else 20  # more rows than there are multiprocessors
    logits = (torch.randn(rows, classes, generator=generator, device="cuda") * 5).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator, device="cuda")
    labels[rows // 3 : rows // 2] = -7
    for smoothing, softcap in ((0.0, 0.0), (0.2, 0.0), (0.0, 6.0), (0.3, 6.0)):
        settings = Settings(-7, smoothing, softcap, "mean")
        losses, gradient = rows_of(cuda_cross_entropy, logits, labels, settings, 1.7)
        true_losses, true = rows_of(reference, logits.double(), labels, settings, 1.7)
        torch.testing.assert_close(losses.double(), true_losses, rtol=2e-6, atol=3e-6)
        eps = torch.finfo(dtype).eps
        tiny = {F32: 1e-9, F16: 6e-8, BF16: 1e-9}[dtype]
        # exp's argument is exact to f32's rounding of a difference of up to 50.
        torch.testing.assert_close(gradient.double(), true, rtol=eps / 2 + 1e-5, atol=tiny + 4.1e-7)
        only, left = rows_of(cuda_cross_entropy, logits, labels, settings, None)
        assert torch.equal(only, losses)
        assert torch.equal(left, logits)


def test_logits_that_are_infinite_or_no_numbers() -> None:
    logits = torch.randn(6, 5000, device="cuda")
    logits[0, 100:4000] = -torch.inf
    logits[1, :4999] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 17] = torch.inf
    logits[4, 4999] = torch.nan
    labels = torch.tensor([5, 4999, 3, 4, 5, -1], device="cuda")
    settings = Settings(-1, 0.0, 0.0, "mean")
    losses, gradient = rows_of(cuda_cross_entropy, logits, labels, settings, 1.0)
    want, true = rows_of(reference, logits, labels, settings, 1.0)
    for row in (0, 1, 5):
        torch.testing.assert_close(losses[row], want[row])
        torch.testing.assert_close(gradient[row], true[row])
    assert losses[2:5].isnan().all()
    assert gradient[2:5].isnan().any(1).all()


@pytest.mark.parametrize("elements", [0, 1, 7, 8, 9, 4096, 100_003])
def test_gradients_are_scaled_and_rounded_once(elements: int) -> None:
    scale, grad = torch.tensor(2.0**-9, device="cuda"), torch.tensor(0.3, device="cuda")
    for source, to in ((F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16)):
        gradient = torch.randn(elements + 1, device="cuda").to(source)
        for part in (gradient[:elements], gradient[1:]):  # the second one is not aligned
            found = cuda_cross_entropy.scale_gradient(part, scale, grad, to)
            assert torch.equal(found, reference.scale_gradient(part, scale, grad, to))


def test_strides_and_zero_rows() -> None:
    case = make((6, 9), 1003, 64, dtype=BF16, device="cuda", ignored=0.2)
    want = run(case, ours)
    turned = Loss(
        case.hidden.transpose(0, 1).contiguous().transpose(0, 1), case.weight,
        case.labels.t().contiguous().t(), case.bias, {},
    )  # fmt: skip
    for name, tensor in run(turned, ours).items():
        assert torch.equal(tensor, want[name]), name
    turned.weight = case.weight.t().contiguous().t()
    torch.testing.assert_close(run(turned, ours)["loss"], want["loss"], rtol=1e-3, atol=1e-3)
    empty = run(make((2, 0), 1003, 64, dtype=BF16, device="cuda", reduction="sum"), ours)
    assert empty["loss"] == 0
    assert not empty["gradient of weight"].any()
    assert run(make((0,), 1003, 64, dtype=BF16, device="cuda"), ours)["loss"].isnan()


def test_all_labels_ignored() -> None:
    for reduction in ("mean", "sum"):
        found = run(make((33,), 1003, 64, dtype=BF16, device="cuda", ignored=1.1,
                         reduction=reduction), ours)  # fmt: skip
        assert bool(found["loss"].isnan()) == (reduction == "mean")
        assert not any(tensor.any() for name, tensor in found.items() if name != "loss")


@pytest.mark.parametrize("adapter", [F32, BF16])
def test_an_adapted_head(adapter: torch.dtype) -> None:
    """float32 adapters of a bfloat16 head are used in full precision, as PEFT does it."""
    exact = Exactness()
    case = make((300,), 5003, 256, dtype=BF16, device="cuda")
    lora = {
        "lora_A": torch.randn(8, 256, device="cuda").div(16).to(adapter),
        "lora_B": torch.randn(5003, 8, device="cuda").div(3).to(adapter),
    }

    def ferrotunes(leaves: dict[str, Tensor]) -> Tensor:
        return ops.linear_cross_entropy(
            leaves["hidden"], leaves["weight"], case.labels, bias=leaves["bias"],
            lora_A=leaves["lora_A"], lora_B=leaves["lora_B"], scaling=2.0,
        )  # fmt: skip

    def pefts(leaves: dict[str, Tensor]) -> Tensor:
        base = torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves["bias"])
        x = leaves["hidden"].to(leaves["lora_A"].dtype)
        logits = base + (x @ leaves["lora_A"].t()) @ leaves["lora_B"].t() * 2.0
        logits = logits.to(base.dtype).to(torch.promote_types(base.dtype, F32))
        return torch.nn.functional.cross_entropy(logits, case.labels)

    results = []
    for call, kind in ((ferrotunes, None), (pefts, None), (pefts, torch.float64)):
        leaves = case.leaves(kind)
        leaves |= {n: t.to(kind or t.dtype, copy=True).requires_grad_() for n, t in lora.items()}
        loss = call(leaves)
        loss.backward()
        grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
        results.append({"loss": loss.detach(), **grads})
    exact.add(str(adapter), *results, 300 * 8)
    exact.check()


def test_the_same_bits_again() -> None:
    case = make((700,), 32_001, 256, dtype=BF16, device="cuda")
    first, second = run(case, ours), run(case, ours)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_nothing_waits_for_the_device() -> None:
    case = make((700,), 32_001, 256, dtype=BF16, device="cuda", num_items=500.0)
    run(case, ours)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_capture_and_replay() -> None:
    cuda.prepare()
    case = make((300,), 5003, 128, dtype=BF16, device="cuda")
    hidden = case.hidden.clone().requires_grad_()
    items = torch.tensor(123.0, device="cuda")

    def work() -> tuple[Tensor, Tensor]:
        loss = ops.linear_cross_entropy(hidden, case.weight, case.labels, num_items=items)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for step in range(3):
        with torch.no_grad():
            hidden.copy_(torch.randn_like(hidden))
        case.labels.copy_(torch.randint_like(case.labels, 5003))
        items.fill_(100.0 + step)
        graph.replay()
        for one, other in zip(captured, work(), strict=True):
            assert torch.equal(one, other)


BAD_LABEL = """
import torch
from ferrotune import ops
x = torch.randn(9, 16, device="cuda", requires_grad=True)
labels = torch.full((9,), 3, device="cuda")
labels[4] = {label}
loss = ops.linear_cross_entropy(x, torch.randn(7, 16, device="cuda"), labels)
loss.backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_a_label_out_of_range_stops_the_device(label: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BAD_LABEL.format(label=label)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "a label is neither ignore_index nor a class" in done.stderr
    assert "CUDA error" in done.stderr


@pytest.mark.parametrize("classes", [32_000, 128_256, 151_936, 256_000, 262_144])
def test_the_workspace_stays_under_512_mib(classes: int) -> None:
    """With a frozen head, beside the gradient of the hidden states."""
    m, d = 8192, 4096
    hidden = torch.randn(m, d, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(classes, d, device="cuda", dtype=BF16) / 64
    labels = torch.randint(0, classes, (m,), device="cuda")
    for _ in range(2):  # the second time, cuBLAS has its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = ops.linear_cross_entropy(hidden, weight, labels)
        gradient = torch.autograd.grad(loss, hidden)[0]
        peak = torch.cuda.max_memory_allocated() - before
        del loss
    assert peak - gradient.numel() * 2 < 512 << 20


def test_compiled() -> None:
    torch._dynamo.reset()
    case = make((64,), 1003, 64, dtype=BF16, device="cuda", softcap=5.0)
    eager = run(case, ours)
    compiled = torch.compile(ours, fullgraph=True)
    for name, tensor in run(case, compiled).items():
        torch.testing.assert_close(tensor, eager[name])
