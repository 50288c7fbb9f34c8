"""The native base products of 4-bit layers on the CPU, beside PEFT's formula and float64."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from ferrotune import _native, ops  # noqa: E402
from ferrotune.ops import backend, cpu_lora, cpu_products, flat, reference  # noqa: E402
from lora_cases import Case, error, make, ours, peft, run, truth  # noqa: E402

UNITS = getattr(_native, "cpu_product_units", list)()

pytestmark = pytest.mark.skipif(not UNITS, reason="this CPU has no unit for native products")

TINY = 4 * torch.finfo(torch.float32).eps
TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
]
SHAPES = [((1, 1), 1), ((7, 33), 17), ((2, 9, 40), 24), ((33, 96), 65), ((5, 129), 12)]
RANKS = [0, 1, 16, 33, 256]


@pytest.fixture
def declined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that went the way of `reference`."""
    calls: list[str] = []

    def noted(name: str) -> None:
        original = getattr(reference, name)

        def call(*arguments: object) -> object:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(reference, name, call)

    noted("forward")
    noted("backward")
    return calls


@pytest.fixture(params=UNITS, autouse=True)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every unit that this CPU has, and not its fastest alone."""
    found: str = request.param
    for module in (cpu_lora, cpu_products):
        monkeypatch.setattr(module, "unit", lambda: found)
    monkeypatch.setattr(backend, "_on_cpu", lambda: cpu_lora)
    return found


def test_the_fastest_unit_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wanted = next(name for name in ("tiles", "wide", "vectors") if name in UNITS)
    assert cpu_lora.unit() == wanted
    assert backend.choose(torch.zeros(1)) is cpu_lora
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert "wide" in UNITS or not wide


def magnitudes(case: Case) -> Case:
    names = ("weight", "x", "lora_A", "lora_B", "bias", "lora_bias", "grad")
    given = {name: getattr(case, name) for name in names}
    return replace(case, **{name: one.abs() for name, one in given.items() if one is not None})


@pytest.mark.parametrize(("dtype", "adapter"), TYPES)
def test_no_less_exact_than_peft(
    dtype: torch.dtype, adapter: torch.dtype, declined: list[str]
) -> None:
    draw = itertools.cycle(itertools.product(("nf4", "fp4"), (32, 64, 4096), (False, True)))
    for i, ((shape, n), r) in enumerate(itertools.product(SHAPES, RANKS)):
        quant_type, blocksize, double_quant = next(draw)
        case = make(
            shape, n, r, dtype=dtype, adapter_dtype=adapter, quant_type=quant_type,
            blocksize=blocksize, double_quant=double_quant, bias=i % 3 > 0, lora_bias=i % 4 > 1,
            dropout_p=0.3 * (i % 2) if r else 0.0, seed=i,
        )  # fmt: skip
        found, stock, true = run(case, ours), run(case, peft), truth(case)
        terms = truth(magnitudes(case))
        assert set(found) == set(true)
        for name, tensor in found.items():
            mine, theirs = error(tensor, true[name]), error(stock[name], true[name])
            # Where both round alike, the two errors are two samples of N roundings.
            slack = 1.01 + 6 / max(1, tensor.numel()) ** 0.5
            least = TINY
            if tensor.numel() == 1:  # one number can be right by luck: its terms' half a unit
                least = max(TINY, (terms[name] / true[name]).abs().item() * 2**-24)
            assert mine <= max(theirs * slack, least), (shape, n, r, name, mine, theirs)
    assert not declined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_and_gradients_of_any_strides(dtype: torch.dtype, declined: list[str]) -> None:
    cases = [
        make((6, 5, 64), n, r, dtype=dtype, quant_type="nf4", dropout_p=p, bias=True, seed=n)
        for n, r, p in [(40, 4, 0.0), (7, 1, 0.2), (33, 0, 0.0)]
    ]
    seed = torch.tensor([5])
    x = cases[0].x
    alone = torch.zeros_like(x, dtype=torch.float64)
    group, leaves = [], [case.inputs() for case in cases]
    for i, (case, one) in enumerate(zip(cases, leaves, strict=True)):
        group.append(
            ops.Projection(
                None,
                case.quant,
                one["bias"],
                one.get("lora_A"),
                one.get("lora_B"),
                None,
                case.scaling,
                case.dropout_p,
            )
        )
        mask = (
            ops.dropout_mask((30, 64), case.dropout_p, seed, i).view(x.shape).double()
            if case.dropout_p
            else 1.0
        )
        alone += case.weight.double().sum(0)
        if case.lora_A is not None:
            narrow = case.lora_B.double().sum(0) @ case.lora_A.double()
            alone += case.scaling * narrow * mask
    rows = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    ys = ops.lora_linear_group(rows, group, seed=seed)
    torch.autograd.backward([y.sum() for y in ys])  # expanded gradients: all strides are 0
    assert error(rows.grad, alone) < 4 * torch.finfo(dtype).eps
    assert not declined


def test_only_what_is_asked_for_has_a_gradient(declined: list[str]) -> None:
    case = make((9, 64), 40, 4, quant_type="nf4", bias=True)
    full = run(case, ours)
    for wanted in ("x", "lora_A", "lora_B", "bias"):
        leaves = {
            name: tensor.requires_grad_(name == wanted) for name, tensor in case.inputs().items()
        }
        ours(case, **leaves).backward(case.grad)
        for name, tensor in leaves.items():
            assert (tensor.grad is not None) == (name == wanted)
        assert torch.equal(leaves[wanted].grad, full[wanted])
    assert not declined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ranks_alone_are_those_of_forward(dtype: torch.dtype) -> None:
    case = make((33, 64), 40, 4, dtype=dtype, quant_type="nf4")
    projections = [
        ops.Projection(None, case.quant, None, case.lora_A, case.lora_B, None, 2.0, p)
        for p in (0.0, 0.5)
    ]
    seed = torch.tensor([5])
    for some in (projections, projections[:1]):
        _, hs = cpu_lora.forward(case.x, some, seed)
        alone = cpu_lora.ranks(case.x, some, seed)
        for first, second in zip(hs, alone, strict=True):
            assert first is not None
            assert torch.equal(first, second)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "adapter"), TYPES)
def test_what_is_kept_is_what_compilers_are_told(
    dtype: torch.dtype, adapter: torch.dtype, dropout_p: float
) -> None:
    case = make((9, 64), 40, 4, dtype=dtype, adapter_dtype=adapter, quant_type="nf4")
    one = ops.Projection(None, case.quant, None, case.lora_A, case.lora_B, None, 2.0, dropout_p)
    seed = torch.tensor([5])
    for some in ([one], [one, one._replace(quant=None, weight=case.weight.to(dtype))]):
        _, hs = cpu_lora.forward(case.x, some, seed)
        told = cpu_lora.saved(case.x, some)
        assert [None if h is None else (tuple(h.shape), h.dtype) for h in hs] == told
    given = (case.x, seed, *flat.tensors(one), *(column[0] for column in flat.numbers([one])))
    torch.library.opcheck(
        torch.ops.ferrotune.lora_linear.default, given, test_utils="test_faketensor"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_lie_packed_at_a_time(dtype: torch.dtype, declined: list[str]) -> None:
    case = make((2, 555, 64), 40, 5, dtype=dtype, quant_type="nf4", bias=True)
    found, stock, true = run(case, ours), run(case, peft), truth(case)
    for name, tensor in found.items():
        assert error(tensor, true[name]) <= max(1.1 * error(stock[name], true[name]), TINY), name
    assert not declined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_threads_at_once(dtype: torch.dtype) -> None:
    cases = [make((70, 96), 48, 8, dtype=dtype, quant_type="nf4", seed=i) for i in range(4)]
    alone = [run(case, ours) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.map(lambda case: run(case, ours), cases) for _ in range(5)]
        for results in together:
            for first, second in zip(alone, results, strict=True):
                assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_at_every_run_and_of_every_row_alone(dtype: torch.dtype) -> None:
    case = make((40, 96), 48, 8, dtype=dtype, quant_type="nf4")
    first, second = run(case, ours), run(case, ours)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e30])
def test_magnitudes_that_tiles_decline(scale: float, declined: list[str], unit: str) -> None:
    case = make((9, 64), 40, 4, quant_type="nf4")
    case = replace(case, x=case.x * scale, grad=case.grad / scale)
    found, stock, true = run(case, ours), run(case, peft), truth(case)
    assert bool(declined) == (unit == "tiles")
    for name, tensor in found.items():
        assert error(tensor, true[name]) <= max(1.5 * error(stock[name], true[name]), TINY), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite(dtype: torch.dtype, value: float) -> None:
    case = make((9, 64), 40, 4, dtype=dtype, quant_type="nf4")
    case.x[3, 5] = value
    case.grad[4, 2] = value
    found, stock = run(case, ours), run(case, peft)
    for name in ("y", "x"):
        assert torch.equal(found[name].isfinite(), stock[name].isfinite()), name


def test_what_it_does_not_take(declined: list[str]) -> None:
    for case in (
        make((9, 64), 40, 4),
        make((9, 64), 40, 4, dtype=torch.float16, quant_type="nf4"),
        make((0, 64), 40, 4, quant_type="nf4"),
    ):
        declined.clear()
        true = truth(case)
        for name, tensor in run(case, ours).items():
            assert error(tensor, true[name]) < 8 * torch.finfo(case.x.dtype).eps
        assert declined


def test_weights_of_another_type_than_the_input(declined: list[str]) -> None:
    for quantised, dtype in itertools.permutations(
        (torch.float32, torch.bfloat16, torch.float16), 2
    ):
        if dtype == torch.float16:
            continue
        source = make((9, 64), 40, 4, dtype=quantised, quant_type="nf4")
        case: Case = make((9, 64), 40, 4, dtype=dtype)
        case = replace(case, quant=source.quant, weight=source.weight.to(dtype))
        found, stock, true = run(case, ours), run(case, peft), truth(case)
        for name, tensor in found.items():
            theirs = error(stock[name], true[name])
            assert error(tensor, true[name]) <= max(1.3 * theirs, TINY), name
    assert not declined
