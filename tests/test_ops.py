"""ferrotune.ops beside PEFT's formula and the float64 truth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from error_table import ErrorTable, Row, mean_square  # noqa: E402
from ferrotune import ops  # noqa: E402
from ferrotune.ops import products, scratch  # noqa: E402
from lora_cases import DTYPES, Case, error, make, ours, peft, run, truth  # noqa: E402

SHAPES = [((7, 33), 17), ((2, 9, 40), 24), ((1, 2, 3, 64), 5), ((11, 64), 8), ((20, 129), 12)]
RANKS = [1, 3, 8, 64]
TINY = 4 * torch.finfo(torch.float32).eps
# Adapters as wide as x or wider, and narrower ones, which PEFT would narrow x to.
ADAPTERS = [
    (dtype, adapter)
    for dtype in DTYPES
    for adapter in DTYPES
    if adapter in (dtype, torch.float32) or dtype == torch.float32
]


class Errors:
    """Both errors of every case of a test against float64."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, case: Case, group: str, label: str) -> None:
        found, stock, true = run(case, ours), run(case, peft), truth(case)
        assert set(found) == set(true)
        for name, tensor in found.items():
            dtype = case.x.dtype if name == "y" else getattr(case, name).dtype
            assert tensor.shape == true[name].shape
            assert tensor.dtype == dtype, name
            mine, theirs = error(tensor, true[name]), error(stock[name], true[name])
            of = name if name == "y" else f"gradient of {name}"
            self.rows.append(Row(group, label, of, mine, theirs, tensor.numel()))
            # Where both round alike, the two errors are two samples of N roundings.
            slack = 1.01 + 6 / max(1, tensor.numel()) ** 0.5
            assert mine <= max(theirs * slack, TINY), (group, label, name, mine, theirs)

    def check(self) -> None:
        """Over all cases, where samples no longer matter."""
        assert self.rows
        for of in {row.of for row in self.rows}:
            rows = [row for row in self.rows if row.of == of]
            mine = mean_square([(row.ferrotune, row.elements) for row in rows])
            theirs = mean_square([(row.peft, row.elements) for row in rows])
            assert mine <= max(theirs * 1.05, TINY), (of, mine, theirs)


@pytest.fixture
def errors(error_table: ErrorTable, request: pytest.FixtureRequest) -> Iterator[Errors]:
    found = Errors()
    yield found
    error_table.add(request.node.nodeid, found.rows)


def short(*dtypes: torch.dtype) -> str:
    return ", adapter ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@pytest.mark.parametrize(("dtype", "adapter"), ADAPTERS)
def test_no_less_exact_than_peft(dtype: torch.dtype, adapter: torch.dtype, errors: Errors) -> None:
    for i, ((shape, n), r) in enumerate(itertools.product(SHAPES, RANKS)):
        dropout_p, bias = 0.3 * (i % 2), i % 3 > 0  # every pair of them at some shape and rank
        case = make(
            shape, n, r, dtype=dtype, adapter_dtype=adapter,
            dropout_p=dropout_p, bias=bias, lora_bias=bias, seed=i,
        )  # fmt: skip
        label = f"{shape} n={n} r={r} p={dropout_p} bias={bias}"
        errors.add(case, f"LoRA linear {short(dtype, adapter)}", label)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_4bit_no_less_exact_than_peft(
    dtype: torch.dtype, quant_type: str, double_quant: bool, errors: Errors
) -> None:
    for blocksize, ((shape, n), r) in itertools.product(
        (32, 64, 4096), [(SHAPES[0], 3), (SHAPES[1], 8), (SHAPES[4], 0)]
    ):
        case = make(
            shape, n, r, dtype=dtype, quant_type=quant_type, blocksize=blocksize,
            double_quant=double_quant, dropout_p=0.2 if r else 0.0, bias=True,
        )  # fmt: skip
        label = f"{quant_type} blocksize={blocksize} double_quant={double_quant} {shape} r={r}"
        errors.add(case, f"QLoRA linear {short(dtype)}", label)
    errors.check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_exact_at_the_size_of_layers(dtype: torch.dtype, errors: Errors) -> None:
    for r, quant_type, bias in [(16, None, True), (16, "nf4", False), (256, None, True)]:
        for adapter in {dtype, torch.float32}:
            case = make(
                (2, 65, 512), 768, r, dtype=dtype, adapter_dtype=adapter, bias=bias,
                lora_bias=bias, quant_type=quant_type, dropout_p=0.05,
                scaling=0.5,  # a power of two costs PEFT no rounding
            )  # fmt: skip
            label = f"512x768 r={r} {quant_type or 'dense'}"
            errors.add(case, f"large (Q)LoRA linear {short(dtype, adapter)}", label)
    errors.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fast", [True, False])
def test_16_bits_with_and_without_fast_products(
    dtype: torch.dtype, fast: bool, errors: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs without 16-bit products the same ones run in float32, and round once."""
    monkeypatch.setattr(products, "_has_onednn", lambda _: fast)
    for adapter, quant_type, dropout_p, bias in [
        (dtype, None, 0.0, True), (dtype, "nf4", 0.3, False),
        (torch.float32, "fp4", 0.0, False), (torch.float32, None, 0.3, True),
    ]:  # fmt: skip
        case = make(
            (3, 17, 64), 24, 4, dtype=dtype, adapter_dtype=adapter, quant_type=quant_type,
            dropout_p=dropout_p, bias=bias, lora_bias=bias,
        )  # fmt: skip
        label = f"adapter {short(adapter)} {quant_type or 'dense'} p={dropout_p}"
        kind = "fast" if fast else "float32"
        errors.add(case, f"LoRA linear {short(dtype)}, {kind} products", label)
        one = ops.Projection(
            case.weight, None, None, case.lora_A, case.lora_B, None, 0.7, dropout_p
        )
        x = case.x.clone().requires_grad_()
        ys = ops.lora_linear_group(x, [one, one], seed=case.seed)
        sum(y.float().sum() for y in ys).backward()
        assert {y.dtype for y in ys} == {dtype}
        assert x.grad.dtype == dtype
    errors.check()
    wanted = dtype if fast else torch.float32
    assert products.product_dtype(torch.empty(0, dtype=dtype)) == wanted


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_blocks_of_rows_are_the_whole(
    dropout_p: float, errors: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 adapters on bfloat16: x, y and their gradients are widened in blocks."""
    monkeypatch.setattr(scratch, "_BLOCK_BYTES", 20 * 64 * 4)
    for tokens in (1, 19, 20, 21, 40, 73):
        case = make(
            (tokens, 64), 48, 4, dtype=torch.bfloat16, adapter_dtype=torch.float32,
            quant_type="nf4", dropout_p=dropout_p, bias=True, lora_bias=True, seed=tokens,
        )  # fmt: skip
        errors.add(case, "QLoRA linear bfloat16, adapter float32", f"{tokens} p={dropout_p}")
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_and_one_feature(dtype: torch.dtype) -> None:
    for shape, n, r in [((129,), 8, 3), ((1, 1), 1, 1), ((1, 64), 1, 8)]:
        case = make(shape, n, r, dtype=dtype, adapter_dtype=torch.float32, bias=True)
        true = truth(case)
        for name, tensor in run(case, ours).items():
            assert tensor.shape == true[name].shape
            assert error(tensor, true[name]) < 8 * torch.finfo(dtype).eps


def test_zero_tokens_and_zero_sizes() -> None:
    for shape, n, r in [((0, 16), 8, 4), ((2, 0, 16), 8, 4), ((3, 16), 0, 4), ((3, 0), 8, 4)]:
        case = make(shape, n, r, dropout_p=0.5, bias=True) if shape[-1] else None
        if case is None:
            x = torch.empty(shape, requires_grad=True)
            lora_A = torch.empty(r, 0, requires_grad=True)
            lora_B = torch.randn(n, r, requires_grad=True)
            y = ops.lora_linear(x, torch.empty(n, 0), lora_A, lora_B)
            y.sum().backward()
            assert torch.equal(y, torch.zeros(3, n))
            assert torch.equal(lora_B.grad, torch.zeros(n, r))
            continue
        found = run(case, ours)
        assert found["y"].shape == (*shape[:-1], n)
        assert found["x"].shape == shape
        if 0 in shape:
            assert not found["lora_A"].any()
            assert not found["lora_B"].any()


def test_only_what_is_asked_for_has_a_gradient() -> None:
    for mask in itertools.product((False, True), repeat=3):
        if not any(mask):
            continue
        case = make(dropout_p=0.2)
        leaves = {
            name: tensor.requires_grad_(wanted)
            for (name, tensor), wanted in zip(case.inputs().items(), mask, strict=True)
        }
        ours(case, **leaves).backward(case.grad)
        full = run(case, ours)
        for (name, tensor), wanted in zip(leaves.items(), mask, strict=True):
            assert (tensor.grad is not None) == wanted
            if wanted:
                assert torch.equal(tensor.grad, full[name])
    with torch.no_grad():
        assert not ours(make(), **make().inputs()).requires_grad


def test_gradients_of_any_strides() -> None:
    case = make((3, 5, 16), 8)
    expected = run(case, ours)
    wide = torch.randn(5, 8, 3, 2)
    strided = [
        case.grad.transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., 0].permute(2, 0, 1).copy_(case.grad),
    ]
    for grad in strided:
        assert not grad.is_contiguous()
        leaves = case.inputs()
        ours(case, **leaves).backward(grad)
        for name, tensor in leaves.items():
            torch.testing.assert_close(tensor.grad, expected[name])
    ones = run(make_with_grad(case, torch.ones_like(case.grad)), ours)
    leaves = case.inputs()
    ours(case, **leaves).sum().backward()  # an expanded gradient: all strides are 0
    for name, tensor in leaves.items():
        torch.testing.assert_close(tensor.grad, ones[name])


def make_with_grad(case: Case, grad: torch.Tensor) -> Case:
    from dataclasses import replace

    return replace(case, grad=grad)


def test_inputs_of_any_strides() -> None:
    case = make((6, 16), 8, dropout_p=0.3)
    leaves = case.inputs()
    expected = ours(case, **leaves)
    leaves["x"] = case.x.t().contiguous().t()
    leaves["lora_A"] = case.lora_A.t().contiguous().t()
    case.weight = case.weight.t().contiguous().t()
    torch.testing.assert_close(ours(case, **leaves), expected)


def test_a_group_is_its_projections() -> None:
    for dropout_p in (0.0, 0.4):
        cases = [
            make((4, 6, 32), n, r, dropout_p=dropout_p, bias=n == 7, seed=i)
            for i, (n, r) in enumerate([(16, 4), (7, 1), (5, 0)])
        ]
        x = cases[0].x.clone().requires_grad_()
        seed = torch.tensor([77]) if dropout_p else None
        leaves = [case.inputs() for case in cases]
        group = [
            ops.Projection(
                case.weight, None, one.get("bias"), one.get("lora_A"), one.get("lora_B"), None,
                case.scaling, case.dropout_p,
            )
            for case, one in zip(cases, leaves, strict=True)
        ]  # fmt: skip
        ys = ops.lora_linear_group(x, group, seed=seed)
        sum((y * case.grad).sum() for y, case in zip(ys, cases, strict=True)).backward()
        total = torch.zeros_like(x)
        for i, (case, one, y) in enumerate(zip(cases, leaves, ys, strict=True)):
            alone = case.inputs() | {"x": x.detach().clone().requires_grad_()}
            mask = 1.0
            if dropout_p:
                mask = ops.dropout_mask((24, 32), dropout_p, seed, stream=i).view(4, 6, 32)
            base = torch.nn.functional.linear(alone["x"], case.weight, alone.get("bias"))
            if case.lora_A is not None:
                base = base + (alone["x"] * mask) @ alone["lora_A"].t() @ alone["lora_B"].t() * 0.7
            (base * case.grad).sum().backward()
            torch.testing.assert_close(y, base)
            total += alone["x"].grad
            for name in ("lora_A", "lora_B", "bias"):
                if name in one:
                    torch.testing.assert_close(one[name].grad, alone[name].grad)
        torch.testing.assert_close(x.grad, total)


def test_a_projection_that_no_loss_uses() -> None:
    case = make((4, 32), 8)
    leaves = case.inputs()
    group = [ops.Projection(case.weight, None, None, leaves["lora_A"], leaves["lora_B"])] * 2
    first, _ = ops.lora_linear_group(leaves["x"], group)
    first.sum().backward()
    assert leaves["x"].grad.isfinite().all()
    assert leaves["lora_A"].grad.any()


def test_the_lora_term_alone() -> None:
    case = make(dropout_p=0.3)
    leaves = case.inputs()
    term = ops.lora_linear(
        leaves["x"], None, leaves["lora_A"], leaves["lora_B"], case.scaling,
        dropout_p=case.dropout_p, seed=case.seed,
    )  # fmt: skip
    base = torch.nn.functional.linear(case.x, case.weight)
    torch.testing.assert_close(term, ours(case, **case.inputs()) - base, atol=1e-5, rtol=1e-5)


def test_a_weight_that_is_trained() -> None:
    case = make(bias=True)
    weight = case.weight.clone().requires_grad_()
    leaves = case.inputs()
    y = ops.lora_linear(
        leaves["x"], weight, leaves["lora_A"], leaves["lora_B"], case.scaling, bias=leaves["bias"]
    )
    y.backward(case.grad)
    expected = run(case, ours)
    torch.testing.assert_close(y.detach(), expected["y"])
    torch.testing.assert_close(leaves["x"].grad, expected["x"])
    rows, grads = case.x.reshape(-1, 40), case.grad.reshape(-1, 24)
    torch.testing.assert_close(weight.grad, grads.t() @ rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x has shape \[3, 5\], but the weight is \[24, 40\]"),
        ({"x": torch.zeros(3, 40, dtype=torch.int64)}, "x must be float32"),
        ({"x": torch.zeros(3, 40, dtype=torch.float16)}, "weight is torch.float32, but x is"),
        ({"lora_A": torch.zeros(4, 39)}, r"lora_A must be \[r, 40\]"),
        ({"lora_B": torch.zeros(24, 5)}, r"and lora_B \[24, r\]"),
        ({"lora_B": None}, "lora_A and lora_B go together"),
        ({"bias": torch.zeros(3)}, r"bias must be \[24\]"),
        ({"lora_bias": torch.zeros(3)}, r"lora_bias must be \[24\]"),
    ],
)
def test_bad_arguments(change: dict[str, torch.Tensor], message: str) -> None:
    case = make((3, 40))
    leaves = case.inputs() | change
    with pytest.raises((ValueError, TypeError), match=message):
        ours(case, **leaves)


def test_bad_probabilities() -> None:
    case = make((3, 40))
    case.dropout_p = 1.5
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\], not 1.5"):
        ours(case, **case.inputs())
    with pytest.raises(ValueError, match="needs a weight or an adapter"):
        ops.lora_linear(torch.zeros(3, 40), None)
