"""Few rows by a 4-bit weight within one kernel: beside the other path and the float64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from covering import pairwise
from exactness import Exactness
from ferrotune import ops
from ferrotune.ops import cuda_lora, cuda_small
from ferrotune.ops.types import Projection
from lora_cases import Case, error, make, ours, run, truth

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is built for Hopper",
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = [(F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]  # of x, of the adapter
IDS = [f"{str(x)[6:]}-adapter-{str(adapter)[6:]}" for x, adapter in TYPES]
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "double_quant": False},
    "nf4 nested": {"quant_type": "nf4"},
    "fp4": {"quant_type": "fp4", "double_quant": False},
    "fp4 nested": {"quant_type": "fp4"},
    "nf4 nested, blocks of 32": {"quant_type": "nf4", "blocksize": 32},
    "fp4, blocks of 256": {"quant_type": "fp4", "blocksize": 256, "double_quant": False},
    "nf4 nested, blocks of 4096": {"quant_type": "nf4", "blocksize": 4096},
}
SETTINGS: dict[str, Any] = {
    "form": list(FORMS),
    "r": (0, 1, 8, 16, 17, 40, 64),
    "m": (1, 2, 3, 7, 8, 9, 16, 17, 33, 64),
    "size": (
        (1, 32), (7, 64), (33, 96), (257, 160), (384, 1024), (1001, 2080), (520, 4096), (72, 14336),
    ),
    "bias": (False, True),
    "lora_bias": (False, True),
}  # fmt: skip


def case_of(
    form: str, r: int, m: int, size: tuple[int, int], device: torch.device, **settings: Any
) -> Case:
    n, k = size
    return make((m, k), n, r, **FORMS[form], **settings).to(device)


def projection(case: Case) -> Projection:
    return Projection(
        None, case.quant, case.bias, case.lora_A, case.lora_B, case.lora_bias, case.scaling
    )


def taken(case: Case) -> bool:
    plan = cuda_lora.plan(case.x, [projection(case)])
    return bool(plan.small) or any(one.small for one in plan.passes)


@pytest.fixture(autouse=True)
def small(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cuda":
        pytest.skip("the kernel runs on CUDA alone")
    monkeypatch.setattr("ferrotune.ops.cuda_lora.small", "always")
    return


@pytest.mark.parametrize(("dtype", "adapter"), TYPES, ids=IDS)
def test_no_less_exact_than_dequantising_first(
    dtype: torch.dtype, adapter: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, H having been kept by the kernel."""
    errors = Exactness()
    for i, settings in enumerate(pairwise(SETTINGS)):
        case = case_of(**settings, device=device, dtype=dtype, adapter_dtype=adapter, seed=i)
        assert taken(case), settings
        found = run(case, ours)
        with monkeypatch.context() as patch:
            patch.setattr("ferrotune.ops.cuda_lora.small", "never")
            assert not taken(case)
            other = run(case, ours)
        rows = settings["m"] * settings["r"] or 1 << 60
        label = " ".join(f"{name}={value}" for name, value in settings.items())
        errors.add(label, found, other, truth(case), rows)
    errors.check()


@pytest.mark.parametrize(("dtype", "adapter"), TYPES, ids=IDS)
def test_runs_are_equal_with_a_gradient_and_without(
    dtype: torch.dtype, adapter: torch.dtype, device: torch.device
) -> None:
    for i, settings in enumerate(pairwise(SETTINGS, seed=1)[:40]):
        case = case_of(**settings, device=device, dtype=dtype, adapter_dtype=adapter, seed=i)
        with torch.no_grad():
            bare = ours(
                case, case.x, **{name: leaf for name, leaf in case.inputs().items() if name != "x"}
            )
        for _ in range(2):
            again = run(case, ours)
            assert torch.equal(again["y"], bare), settings


@pytest.mark.parametrize("adapter", [BF16, F32])
@pytest.mark.parametrize("m", [1, 5, 12, 30, 64])
def test_every_division(m: int, adapter: torch.dtype, device: torch.device) -> None:
    """However blocks and warpgroups share the work, and wherever they end within the weight."""
    n, k, r = 300, 2080, 24
    case = case_of("nf4 nested", r, m, (n, k), device, dtype=BF16, adapter_dtype=adapter, bias=True)
    true = truth(case)["y"]
    one = projection(case)
    planes = 1 if adapter == BF16 else 3
    x = case.x.double()
    assert case.lora_A is not None
    rank = case.scaling * x @ case.lora_A.double().t()
    for splits in (1, 2, 4, 8):
        for k_groups in (1, 2, 4, 8):
            for groups in (1, 2, 3, 17):
                y = torch.full((m, n), torch.nan, dtype=BF16, device=device)
                h = torch.full((m, planes * 48), torch.nan, dtype=BF16, device=device)
                label = (splits, k_groups, groups)
                try:
                    cuda_small.run(case.x, m, one, label, y, h, 16, 48)
                except NotImplementedError:
                    continue  # no room in shared memory, or a block without work
                assert error(y, true) < 4e-3, label
                parts = h.view(m, planes, 48).double()
                assert parts[:, :, :16].isnan().all()
                assert not parts[:, :, 16 + r :].any()
                assert error(parts[:, :, 16 : 16 + r].sum(1), rank) < (
                    4e-3 if planes == 1 else 1e-5
                )


def test_ranks_are_those_of_forward(device: torch.device) -> None:
    """Of a group in one pass, whose H lie side by side."""
    for dtype, adapter in TYPES:
        cases = [
            case_of(
                "nf4 nested", r, 7, (n, 512), device, dtype=dtype, adapter_dtype=adapter, seed=r
            )
            for n, r in ((96, 8), (264, 16))
        ]
        group = [projection(case) for case in cases]
        x = cases[0].x
        with torch.no_grad():
            ys, hs = cuda_lora.forward(x, group, None)
            again = cuda_lora.ranks(x, group, None)
        plan = cuda_lora.plan(x, group)
        assert [len(one.small) for one in plan.passes] == [2]
        for y, one in zip(ys, cases, strict=True):
            one.x = x
            assert error(y, truth(one)["y"]) < 4e-3
        for h, other in zip(hs, again, strict=True):
            assert (h is None) == (other is None)
            assert h is None or torch.equal(h, other)


def test_graphs_take_it(device: torch.device) -> None:
    case = case_of("nf4 nested", 16, 1, (512, 1024), device, dtype=BF16, bias=True)
    one = projection(case)
    x = case.x.clone()
    with torch.no_grad():
        want = ops.lora_linear_group(x, [one])[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.lora_linear_group(x, [one])[0]
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, want)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, ops.lora_linear_group(x, [one])[0])


def test_one_launch(device: torch.device) -> None:
    """Nothing else runs, with an adapter or without."""
    from torch.profiler import ProfilerActivity, profile

    for r in (0, 16):
        case = case_of("nf4 nested", r, 4, (512, 1024), device, dtype=BF16)
        one = projection(case)
        with torch.no_grad():
            ops.lora_linear_group(case.x, [one])
            before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)  # it fills what is allocated
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                ops.lora_linear_group(case.x, [one])
                torch.cuda.synchronize()
            torch.use_deterministic_algorithms(before, warn_only=True)
        names = [event.key for event in found.key_averages() if event.self_device_time_total > 0]
        assert names == ["linear_small_nested_bf16_8"]


def test_what_it_does_not_take_goes_elsewhere(device: torch.device) -> None:
    """Rows of codes that start anywhere, more rows, other types: no error, the same values."""
    odd = [
        case_of("nf4", 8, 3, (40, 72), device, dtype=BF16),
        case_of("nf4 nested", 8, 65, (40, 64), device, dtype=BF16),
        case_of("nf4 nested", 65, 3, (40, 64), device, dtype=BF16),
        case_of("nf4 nested", 8, 3, (40, 64), device, dtype=F32),
        case_of("nf4 nested", 8, 3, (40, 64), device, dtype=BF16, adapter_dtype=F16),
        case_of("nf4 nested", 8, 3, (40, 64), device, dtype=BF16, dropout_p=0.5),
    ]
    moved = case_of("nf4", 8, 3, (40, 64), device, dtype=BF16)
    assert moved.quant is not None
    packed = moved.quant.packed
    shifted = torch.cat([packed.new_zeros(1, 1), packed])[1:]
    moved.quant = moved.quant._replace(packed=shifted)
    for case in [*odd, moved]:
        with torch.no_grad():
            rows: Tensor = ours(case, case.x, **{
                name: leaf for name, leaf in case.inputs().items() if name != "x"
            })  # fmt: skip
        assert case is odd[-1] or not taken(case)
        assert error(rows, truth(case)["y"]) < 5e-3


def test_x_of_any_number_of_dimensions(device: torch.device) -> None:
    case = case_of("nf4 nested", 8, 6, (72, 64), device, dtype=BF16)
    with torch.no_grad():
        want = ops.lora_linear_group(case.x, [projection(case)])[0]
        for shape in ((1, 6, 64), (2, 3, 64), (3, 1, 2, 64)):
            found = ops.lora_linear_group(case.x.view(shape), [projection(case)])[0]
            assert torch.equal(found.view(6, 72), want)
        row = ops.lora_linear_group(case.x[2], [projection(case)])[0]
        assert row.shape == (72,)
        assert error(row, want[2].double()) < 5e-3
