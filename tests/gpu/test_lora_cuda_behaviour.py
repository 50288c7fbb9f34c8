"""LoRA linears on a device inside PyTorch: graphs, streams, memory, dispatcher and compiler."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ferrotune import ops
from ferrotune.ops import flat
from lora_cases import Case, error, make, ours, run

BF16 = torch.bfloat16
OPS = torch.ops.ferrotune
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "nf4": {"quant_type": "nf4"},
    "adapter in f32": {"quant_type": "nf4", "adapter_dtype": torch.float32},
    "r = 128": {"r": 128},
    "odd": {"shape": (3, 11, 65), "n": 33, "r": 3},
}


def build(kind: str, **options: Any) -> Case:
    settings = {"shape": (2, 48, 64), "n": 96, "r": 8, "dtype": BF16, "bias": True}
    return make(**(settings | KINDS[kind] | options))


def step(case: Case, leaves: dict[str, Tensor], seed: Tensor | None) -> list[Tensor]:
    """y and the gradients of a linear, and of it in a group beside another projection."""
    y = ours(replace(case, seed=seed), **leaves)
    weight = case.weight if case.quant is None else None
    pair = [
        ops.Projection(
            weight, case.quant, leaves.get("bias"), leaves["lora_A"], leaves["lora_B"], None,
            case.scaling, case.dropout_p,
        ),
        ops.Projection(case.weight),
    ]  # fmt: skip
    ys = [y, *ops.lora_linear_group(leaves["x"], pair, seed=seed)]
    grads = torch.autograd.grad(ys, list(leaves.values()), [case.grad] * len(ys))
    return [*(y.detach() for y in ys), *grads]


@pytest.mark.parametrize("drawn", [False, True], ids=["seed given", "seed drawn"])
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_replay_forward_and_backward(kind: str, drawn: bool) -> None:
    """Each replay draws fresh masks, those that eager calls draw from the same state."""
    case = build(kind, dropout_p=0.25).to(torch.device("cuda"))
    leaves = case.inputs()
    given = None if drawn else torch.zeros(1, dtype=torch.int64, device="cuda")

    def work() -> list[Tensor]:
        return step(case, leaves, given)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    masks = []
    for i in range(3):
        with torch.no_grad():
            leaves["x"].copy_(torch.randn_like(leaves["x"]))
            leaves["lora_B"].mul_(1.25)
        if given is not None:
            given.fill_(i)
        torch.manual_seed(i)
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        torch.manual_seed(i)
        want = work()
        for number, (one, other) in enumerate(zip(found, want, strict=True)):
            assert torch.equal(one, other), (i, number)
        masks.append(found[0])
    with torch.no_grad():
        graph.replay()
        first = captured[0].clone()
        graph.replay()
    assert torch.equal(first, captured[0]) == (not drawn)
    assert not torch.equal(masks[0], masks[1])


def test_work_goes_to_the_current_stream() -> None:
    for kind in KINDS:
        case = build(kind, dropout_p=0.25).to(torch.device("cuda"))
        want = run(case, ours)
        leaves = case.inputs()
        with torch.no_grad():
            values = leaves["x"].clone()
            leaves["x"].zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # on the default stream x would still be zeros
            with torch.no_grad():
                leaves["x"].copy_(values)
            y = ours(case, **leaves)
            y.backward(case.grad)
            assert not stream.query()  # nothing waited
        stream.synchronize()
        assert torch.equal(y, want["y"]), kind
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, want[name]), (kind, name)


@pytest.mark.usefixtures("hopper")
def test_a_thread_without_a_context() -> None:
    """As autograd's threads are before their first operation."""
    case = build("dense", shape=(4, 512, 256), n=512).to(torch.device("cuda"))
    want, leaves = run(case, ours)["y"], case.inputs()
    torch.cuda.synchronize()
    driver = ctypes.CDLL("libcuda.so.1")
    current = ctypes.c_void_p()
    found: list[Tensor] = []

    def work() -> None:
        assert driver.cuCtxGetCurrent(ctypes.byref(current)) == 0
        with torch.no_grad():
            found.append(ours(case, **leaves))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not current
    assert torch.equal(found[0], want)


def test_two_streams_at_once() -> None:
    """Workspaces of one call are not those of another that still runs."""
    cases = [build(kind, shape=(4, 512, 256), n=512, dropout_p=0.1) for kind in list(KINDS)[:4]]
    cases = [case.to(torch.device("cuda")) for case in cases]
    want = [run(case, ours) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found: list[list[dict[str, Tensor]]] = [[] for _ in cases]
    for _ in range(5):
        for i, (case, stream) in enumerate(zip(cases, streams, strict=True)):
            with torch.cuda.stream(stream):
                found[i].append(run(case, ours))
    torch.cuda.synchronize()
    for results, expected in zip(found, want, strict=True):
        for result in results:
            for name, tensor in result.items():
                assert torch.equal(tensor, expected[name]), name


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits(kind: str) -> None:
    case = build(kind, dropout_p=0.25).to(torch.device("cuda"))
    leaves = case.inputs()
    step(case, leaves, None)
    torch.cuda.synchronize()
    with no_synchronisation():
        step(case, leaves, None)
        with torch.no_grad():
            ours(case, **leaves)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_repeats_the_mask(
    kind: str, use_reentrant: bool, device: torch.device
) -> None:
    case = replace(build(kind, dropout_p=0.5), seed=None).to(device)
    results = []
    for wrap in (False, True):
        torch.manual_seed(5)
        leaves = case.inputs()

        def block(x: Tensor, leaves: dict[str, Tensor] = leaves) -> Tensor:
            first, second = ops.lora_linear_group(
                x, [ops.Projection(case.weight, None, None, leaves["lora_A"], leaves["lora_B"],
                                   None, 0.5, 0.3)] * 2,
            )  # fmt: skip
            return (ours(case, **(leaves | {"x": x})) + first * second).tanh()

        x = leaves["x"]
        y = checkpoint(block, x, use_reentrant=use_reentrant) if wrap else block(x)
        torch.rand(3, device=device)  # must not change the mask of the recomputation
        y.backward(case.grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_autocast_is_the_cast_operation(
    dtype: torch.dtype, quant_type: str | None, device: torch.device
) -> None:
    case = make((64, 40), 24, 8, bias=True, quant_type=quant_type).to(device)
    leaves = case.inputs()
    with torch.autocast(device.type, dtype):
        y = ours(case, **leaves)
    assert y.dtype == dtype
    y.backward(case.grad.to(dtype))
    cast = case.inputs()
    narrow = replace(case, weight=case.weight.to(dtype))
    expected = ours(narrow, **{name: tensor.to(dtype) for name, tensor in cast.items()})
    expected.backward(case.grad.to(dtype))
    assert torch.equal(y, expected)
    for name, tensor in leaves.items():
        assert tensor.grad.dtype == torch.float32
        # Those of adapters are not rounded on their way.
        assert torch.equal(tensor.grad.to(dtype), cast[name].grad.to(dtype))
        if device.type == "cuda" and name.startswith("lora_") and tensor.grad.dim() == 2:
            assert not torch.equal(tensor.grad, cast[name].grad)


def test_a_grad_scaler_unscales_and_skips(device: torch.device) -> None:
    case = make((64, 40), 24, 8, quant_type="nf4").to(device)
    leaves = case.inputs()
    trained = [leaves["lora_A"], leaves["lora_B"]]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**14)
    optimizer = torch.optim.SGD(trained, lr=0.1)

    def train(factor: float) -> list[Tensor]:
        before = [tensor.detach().clone() for tensor in trained]
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = ours(case, **leaves).float().square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return [(a - b).detach() for a, b in zip(before, trained, strict=True)]

    plain = case.inputs()
    with torch.autocast(device.type, torch.float16):
        loss = ours(case, **plain).float().square().mean()
    loss.backward()
    for moved, name in zip(train(1.0), ("lora_A", "lora_B"), strict=True):
        assert error(moved, 0.1 * plain[name].grad.double()) < 5e-3
    assert scaler.get_scale() == 2.0**14
    for moved in train(1e30):  # the gradient overflows: no step
        assert not moved.any()
    assert scaler.get_scale() == 2.0**13


@pytest.mark.parametrize("adapter", [BF16, torch.float32])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_opcheck(quant_type: str | None, adapter: torch.dtype, device: torch.device) -> None:
    case = make(
        (2, 8, 32), 16, 8, bias=True, lora_bias=True, dtype=BF16, adapter_dtype=adapter,
        quant_type=quant_type, dropout_p=0.25,
    ).to(device)  # fmt: skip
    leaves = case.inputs()
    one = projection(case, leaves)
    numbers = flat.numbers([one])
    torch.library.opcheck(
        OPS.lora_linear.default,
        (leaves["x"], case.seed, *flat.tensors(one), *(column[0] for column in numbers)),
    )
    bare = ops.Projection(make((1, 32), 8, dtype=BF16).to(device).weight)
    group = [one, bare, projection(case, case.inputs(), 1)]
    columns, numbers = flat.by_name(leaves["x"], group), flat.numbers(group)
    torch.library.opcheck(
        OPS.lora_linear_group.default, (leaves["x"], case.seed, *columns, *numbers)
    )
    alone = [[tensor.detach() for tensor in column] for column in columns]
    ys, hs = OPS.lora_linear_group(leaves["x"].detach(), case.seed, *alone, *numbers)
    torch.library.opcheck(
        OPS.lora_linear_group_backward.default,
        ([torch.ones_like(y) for y in ys], hs, [True] * 13, leaves["x"].detach(), case.seed,
         *alone, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def projection(case: Case, leaves: dict[str, Tensor], stream: int = 0) -> ops.Projection:
    return ops.Projection(
        None if case.quant else case.weight, case.quant, leaves.get("bias"), leaves.get("lora_A"),
        leaves.get("lora_B"), leaves.get("lora_bias"), case.scaling, case.dropout_p, stream,
    )  # fmt: skip


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_compiles_whole_and_once(quant_type: str | None, device: torch.device) -> None:
    """`fullgraph` raises at a graph break; by inductor on CUDA, with the numbers of eager calls."""
    torch._dynamo.reset()
    case = make((2, 16, 32), 16, 8, dtype=BF16, quant_type=quant_type, dropout_p=0.2).to(device)
    names = ("x", "lora_A", "lora_B")

    def block(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y = ours(case, x, lora_A=lora_A, lora_B=lora_B)
        pair = [
            ops.Projection(case.weight, None, None, lora_A, lora_B), ops.Projection(case.weight),
        ]  # fmt: skip
        first, second = ops.lora_linear_group(x, pair)
        return (y * first + second).tanh()

    counts = torch._dynamo.testing.CompileCounterWithBackend(
        "inductor" if device.type == "cuda" else "aot_eager"
    )
    compiled = torch.compile(block, backend=counts, fullgraph=True)
    for i in range(3):
        results = []
        for call in (compiled, block):
            leaves = case.inputs()
            y = call(*(leaves[name] for name in names))
            y.backward(case.grad + i)
            results.append([y.detach(), *(leaves[name].grad for name in names)])
        for one, other in zip(*results, strict=True):
            assert error(one, other.double()) < 2e-2
    assert counts.frame_count == 1
    drawn = replace(case, seed=None)
    one = torch.compile(lambda x, a, b: ours(drawn, x, lora_A=a, lora_B=b), fullgraph=True,
                        backend="aot_eager")  # fmt: skip
    with torch.no_grad():
        leaves = case.inputs()
        ys = [one(*(leaves[name] for name in names)) for _ in range(2)]
    assert not torch.equal(*ys)  # masks are drawn in the graph
