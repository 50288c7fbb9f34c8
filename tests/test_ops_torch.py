"""The operations inside PyTorch: dispatcher, autograd, compile, checkpointing, autocast."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from ferrotune import ops  # noqa: E402
from ferrotune.ops import flat  # noqa: E402
from lora_cases import DTYPES, Case, make, ours, run  # noqa: E402

OPS = torch.ops.ferrotune


def projection(case: Case, leaves: dict[str, torch.Tensor], stream: int = 0) -> ops.Projection:
    return ops.Projection(
        None if case.quant else case.weight, case.quant, leaves.get("bias"), leaves.get("lora_A"),
        leaves.get("lora_B"), leaves.get("lora_bias"), case.scaling, case.dropout_p, stream,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(dtype: torch.dtype, quant_type: str | None, dropout_p: float) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "quant_type": quant_type, "dropout_p": dropout_p}
    case = make((2, 5, 32), 8, bias=True, lora_bias=True, adapter_dtype=torch.float32, **settings)
    leaves = case.inputs()
    one = projection(case, leaves)
    numbers = flat.numbers([one])
    torch.library.opcheck(
        OPS.lora_linear.default,
        (leaves["x"], case.seed, *flat.tensors(one), *(column[0] for column in numbers)),
    )
    bare = ops.Projection(make((2, 5, 32), 3, dtype=dtype).weight)
    group = [one, bare, projection(case, case.inputs(), 1)]
    torch.library.opcheck(
        OPS.lora_linear_group.default,
        (leaves["x"], case.seed, *flat.by_name(leaves["x"], group), *flat.numbers(group)),
    )


def test_opcheck_of_the_backward_and_of_4bit() -> None:
    case = make((4, 32), 8, quant_type="nf4", bias=True)
    leaves = {name: tensor.detach() for name, tensor in case.inputs().items()}
    one = projection(case, leaves)
    columns, numbers = flat.by_name(leaves["x"], [one]), flat.numbers([one])
    _, h = OPS.lora_linear_group(leaves["x"], None, *columns, *numbers)
    torch.library.opcheck(
        OPS.lora_linear_group_backward.default,
        ([case.grad], h, [True] * 5, leaves["x"], None, *columns, *numbers),
    )
    for double_quant in (False, True):
        values = torch.randn(7, 33)
        torch.library.opcheck(OPS.quantize_4bit.default, (values, 32, "fp4", double_quant))
        quant = ops.quantize_4bit(values, blocksize=32, double_quant=double_quant)
        torch.library.opcheck(
            OPS.dequantize_4bit.default,
            (*quant.tensors, "nf4", 32, quant.nested_blocksize, [7, 33], torch.float32,
             torch.bfloat16),
        )  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradcheck(
    dropout_p: float,
    quant_type: str | None,
    grouped: bool,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if compiled:  # the dispatcher's autograd, without the compiler
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = make((3, 7), 5, 2, bias=True, lora_bias=True, dropout_p=dropout_p, quant_type=quant_type)
    case.weight = case.weight.double()
    leaves = {name: tensor.detach().double() for name, tensor in case.inputs().items()}
    names = list(leaves)

    def formula(*tensors: torch.Tensor) -> Any:
        found = dict(zip(names, tensors, strict=True))
        if not grouped:
            return ours(case, **found)
        one = projection(case, found)
        bare = ops.Projection(case.weight)
        group = [one, one._replace(scaling=1.5, lora_bias=None, stream=1), bare._replace(stream=2)]
        return tuple(ops.lora_linear_group(found["x"], group, seed=case.seed))

    assert torch.autograd.gradcheck(formula, [leaf.requires_grad_() for leaf in leaves.values()])


@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_have_no_gradient(double_quant: bool) -> None:
    values = torch.randn(8, 64, requires_grad=True)
    parts = OPS.quantize_4bit(values, 64, "nf4", double_quant)
    assert not any(part.requires_grad for part in parts)
    quant = ops.quantize_4bit(values, double_quant=double_quant)
    name = "nested_absmax" if double_quant else "absmax"
    trained = quant._replace(**{name: getattr(quant, name).clone().requires_grad_()})
    assert not ops.dequantize_4bit(trained).requires_grad


def test_codes_compile_whole() -> None:
    torch._dynamo.reset()

    def there_and_back(values: torch.Tensor) -> torch.Tensor:
        return ops.dequantize_4bit(ops.quantize_4bit(values, quant_type="fp4")) * 2

    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    values = torch.randn(8, 64)
    assert torch.equal(compiled(values), there_and_back(values))


def test_the_two_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({}, {"quant_type": "fp4", "bias": True}, {"dropout_p": 0.3, "r": 0}):
        case = make(**settings)  # type: ignore[arg-type]
        eager = run(case, ours)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            other = run(case, ours)
        for name, tensor in eager.items():
            assert torch.equal(tensor, other[name]), name


def test_compiles_whole_and_once() -> None:
    """`fullgraph` raises at a graph break; step after step takes the same graph, scaling too."""
    torch._dynamo.reset()
    case = make((2, 8, 32), 16, quant_type="nf4", dropout_p=0.2)
    case.seed = None  # drawn in the graph
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        y = ours(case, x, lora_A=lora_A, lora_B=lora_B)
        first, second = ops.lora_linear_group(
            x,
            [ops.Projection(case.weight, None, None, lora_A, lora_B), ops.Projection(case.weight)],
        )
        return (y * first + second).tanh()

    compiled = torch.compile(step, backend=counts, fullgraph=True)
    losses = []
    for i in range(4):
        torch.manual_seed(i)
        leaves = case.inputs()
        leaves["x"] = leaves["x"].detach() + i
        loss = compiled(**leaves).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert leaves["lora_A"].grad.any()
    assert counts.frame_count == 1
    assert len(set(losses)) == 4


@pytest.mark.parametrize("frozen", [None, "x", "lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_with_frozen_parts_and_under_autocast(frozen: str | None, autocast: bool) -> None:
    torch._dynamo.reset()
    case = make((2, 3, 4, 32), 16, quant_type="nf4", bias=True, dropout_p=0.2)

    def formula(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(case, **leaves)

    found = []
    compiled = torch.compile(formula, backend="aot_eager", fullgraph=True)
    for call in (formula, compiled):
        leaves = case.inputs()
        if frozen is not None:
            leaves[frozen].requires_grad_(False)
        y = call(leaves)
        y.backward(case.grad.to(y.dtype))
        found.append({"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()})
    eager, other = found
    for name, tensor in eager.items():
        if name == frozen:
            assert tensor is None
            assert other[name] is None
        else:
            assert torch.equal(tensor, other[name]), name


@pytest.mark.slow
def test_inductor_gives_eager_numbers() -> None:
    torch._dynamo.reset()
    case = make((2, 8, 32), 16, quant_type="nf4", bias=True, dropout_p=0.2)
    names = list(case.inputs())

    def formula(*tensors: torch.Tensor) -> torch.Tensor:
        return ours(case, **dict(zip(names, tensors, strict=True))).tanh()

    found = {}
    for key, call in {"eager": formula, "compiled": torch.compile(formula, fullgraph=True)}.items():
        leaves = case.inputs()
        y = call(*leaves.values())
        y.backward(case.grad)
        found[key] = [y.detach(), *(leaf.grad for leaf in leaves.values())]
    for eager, compiled in zip(found["eager"], found["compiled"], strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_mask(use_reentrant: bool) -> None:
    case = make((4, 40), dropout_p=0.5)
    case.seed = None
    results = []
    for wrap in (False, True):
        torch.manual_seed(5)
        leaves = case.inputs()

        def block(x: torch.Tensor, leaves: dict[str, torch.Tensor] = leaves) -> torch.Tensor:
            return ours(case, x, lora_A=leaves["lora_A"], lora_B=leaves["lora_B"]).tanh()

        x = leaves["x"]
        y = checkpoint(block, x, use_reentrant=use_reentrant) if wrap else block(x)
        torch.rand(3)  # what follows must not change the mask of the recomputation
        y.backward(case.grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_cast_operation(dtype: torch.dtype, quant_type: str | None) -> None:
    case = make((4, 32), 16, bias=True, quant_type=quant_type)
    leaves = case.inputs()
    with torch.autocast("cpu", dtype):
        y = ours(case, **leaves)
    assert y.dtype == dtype
    y.backward(case.grad.to(dtype))
    cast = case.inputs()
    narrow = make((4, 32), 16, bias=True)
    narrow.weight, narrow.quant = case.weight.to(dtype), case.quant
    expected = ours(narrow, **{name: tensor.to(dtype) for name, tensor in cast.items()})
    expected.backward(case.grad.to(dtype))
    assert torch.equal(y, expected)
    for name, tensor in leaves.items():
        assert tensor.grad.dtype == torch.float32
        assert torch.equal(tensor.grad, cast[name].grad)


def test_a_grad_scaler_skips_steps_that_overflow() -> None:
    case = make((4, 32), 16)
    leaves = case.inputs()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD([leaves["lora_A"], leaves["lora_B"]], lr=0.1)
    before = leaves["lora_A"].detach().clone()
    skipped, scale = 0, scaler.get_scale()
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = ours(case, **leaves).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
        skipped, scale = skipped + 1, scaler.get_scale()
        assert torch.equal(before, leaves["lora_A"].detach())  # infinite in float16: no step
    assert skipped > 0
    assert not torch.equal(before, leaves["lora_A"].detach())
    assert leaves["lora_A"].isfinite().all()


def test_a_grad_scaler_unscales() -> None:
    case = make((4, 32), 16)
    leaves = case.inputs()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([leaves["lora_A"], leaves["lora_B"]], lr=0.1)
    before = leaves["lora_A"].detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(case, **leaves).float().square().mean()
    scaler.scale(loss).backward()
    scaled = leaves["lora_A"].grad.clone()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(leaves["lora_A"].grad * 1024, scaled)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, leaves["lora_A"].detach())


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_around_the_backward_changes_nothing(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:  # the dispatcher's autograd
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = make((4, 32), 16, dtype=torch.bfloat16, adapter_dtype=torch.float32, quant_type="nf4")
    expected = run(case, ours)
    leaves = case.inputs()
    y = ours(case, **leaves)
    with torch.autocast("cpu", torch.float16):
        y.backward(case.grad)
    for name, tensor in leaves.items():
        assert torch.equal(tensor.grad, expected[name]), name


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_are_refused(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:  # the dispatcher's autograd
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = make((4, 32), 16)
    leaves = case.inputs()
    loss = ours(case, **leaves).square().sum()
    (grad,) = torch.autograd.grad(loss, leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|first derivatives only"):
        grad.square().sum().backward()


def test_lengths_that_vary_share_a_graph() -> None:
    """The second length makes its size a variable of the graph; no further one recompiles."""
    torch._dynamo.reset()
    case = make((2, 8, 32), 16, quant_type="nf4", dropout_p=0.2)
    case.seed = None
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda leaves: ours(case, **leaves).tanh(), backend=counts, fullgraph=True
    )
    for length in (8, 9, 5, 12, 7):
        leaves = case.inputs() | {"x": torch.randn(2, length, 32, requires_grad=True)}
        compiled(leaves).sum().backward()
    assert counts.frame_count == 2


def test_saved_tensors_are_freed_and_versions_checked() -> None:
    case = make((4, 32), 16)
    leaves = case.inputs()
    y = ours(case, **leaves)
    y.backward(case.grad)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(case.grad)
    y = ours(case, **leaves)
    with torch.no_grad():
        leaves["lora_B"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.grad)
