"""One LoRA linear beside the float64 truth and PEFT: every kind of input, output and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from covering import pairwise
from exactness import Exactness
from lora_cases import Case, error, make, ours, peft, run, truth

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = [(F32, F32), (F16, F16), (F16, F32), (BF16, BF16), (BF16, F32)]  # of x, of the adapter
IDS = [f"{str(x)[6:]}-adapter-{str(adapter)[6:]}" for x, adapter in TYPES]
RANKS = (0, 1, 3, 4, 8, 16, 17, 32, 48, 64, 65, 100, 128, 256)
# x and n: tiny, odd, no multiples of 8 or 16, beyond one tile in every direction, 1-D to 4-D.
SHAPES = [
    ((1, 1), 1), ((3, 5), 7), ((7, 33), 17), ((129,), 8), ((2, 9, 40), 24), ((1, 2, 3, 64), 5),
    ((0, 16), 8), ((2, 0, 24), 8), ((11, 8), 1000), ((130, 257), 129), ((64, 128), 256),
    ((2, 65, 96), 384), ((33, 1000), 1001), ((5, 1, 2, 72), 40), ((513, 1032), 776),
    ((300, 192), 8),
]  # fmt: skip
WEIGHTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense view of its transpose": {},  # as of GPT-2's Conv1D
    "none": {},
    "nf4": {"quant_type": "nf4", "double_quant": False},
    "nf4 nested": {"quant_type": "nf4"},
    "nf4 nested, blocks of 256": {"quant_type": "nf4", "blocksize": 256},
    "fp4 nested": {"quant_type": "fp4"},
    "fp4, blocks of 256": {"quant_type": "fp4", "blocksize": 256, "double_quant": False},
}
SETTINGS: dict[str, Any] = {
    "size": SHAPES,
    "r": RANKS,
    "weight": list(WEIGHTS),
    "dropout_p": (0.0, 0.05, 0.5, 1.0),
    "bias": (False, True),
    "lora_bias": (False, True),
}


def build(
    size: tuple[tuple[int, ...], int], r: int, weight: str, bias: bool, **settings: Any
) -> Case:
    shape, n = size
    r = 8 if weight == "none" and not r else r
    bias = bias and weight != "none"
    case = make(shape, n, r, bias=bias, **WEIGHTS[weight], **settings)
    if weight == "none":
        return replace(case, alone=True, weight=torch.zeros_like(case.weight))
    if "view" in weight:
        return replace(case, weight=case.weight.t().contiguous().t())
    return case


def compare(errors: Exactness, case: Case, label: str) -> None:
    rows, r = case.x.shape[:-1].numel(), 0 if case.lora_A is None else case.lora_A.shape[0]
    errors.add(label, run(case, ours), run(case, peft), truth(case), rows * r if r else 1 << 60)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("dtype", "adapter"), TYPES, ids=IDS)
def test_no_less_exact_than_peft(
    dtype: torch.dtype, adapter: torch.dtype, device: torch.device
) -> None:
    errors = Exactness()
    for i, settings in enumerate(pairwise(SETTINGS)):
        case = build(**settings, dtype=dtype, adapter_dtype=adapter, seed=i).to(device)
        compare(errors, case, " ".join(f"{name}={value}" for name, value in settings.items()))
    errors.check()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize(("dtype", "adapter"), TYPES, ids=IDS)
def test_no_less_exact_at_the_size_of_layers(
    dtype: torch.dtype, adapter: torch.dtype, quant_type: str | None, device: torch.device
) -> None:
    m, sizes = (1030, [(1024, 1536), (2048, 520)]) if device.type == "cuda" else (96, [(256, 320)])
    errors = Exactness()
    for i, (k, n) in enumerate(sizes):
        for r in (8, 16, 48, 64, 200):
            for dropout_p in (0.0, 0.05):
                case = make(
                    (2, m // 2, k), n, r, dtype=dtype, adapter_dtype=adapter,
                    quant_type=quant_type, dropout_p=dropout_p, seed=i,
                    scaling=2.0,  # a power of two costs PEFT no rounding
                ).to(device)  # fmt: skip
                compare(errors, case, f"m={m} k={k} n={n} r={r} p={dropout_p}")
    errors.check()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("dtype", "adapter"), TYPES, ids=IDS)
def test_two_runs_are_equal(dtype: torch.dtype, adapter: torch.dtype, device: torch.device) -> None:
    for i, settings in enumerate(pairwise(SETTINGS, seed=1)[:60]):
        case = build(**settings, dtype=dtype, adapter_dtype=adapter, seed=i).to(device)
        first, second = run(case, ours), run(case, ours)
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), (settings, name)


def test_float32_is_not_tf32(device: torch.device) -> None:
    """Not unless PyTorch's own setting allows it, which is off."""
    for quant_type in (None, "nf4"):
        for r in (8, 128):
            case = make((256, 512), 320, r, quant_type=quant_type, dropout_p=0.1).to(device)
            found, true = run(case, ours), truth(case)
            for name, tensor in found.items():
                assert error(tensor, true[name]) < 2e-6, (quant_type, r, name)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_large_and_small_values(dtype: torch.dtype, device: torch.device) -> None:
    """Nothing between overflows or vanishes that PEFT's arithmetic holds."""
    errors = Exactness()
    for i, scale in enumerate((1e-2, 1.0, 30.0)):
        case = make((65, 96), 72, 16, dtype=dtype, dropout_p=0.05, seed=i, bias=True).to(device)
        case = replace(case, x=case.x * scale, grad=case.grad / scale)
        compare(errors, case, f"{dtype} x of {scale}")
    errors.check()


def test_zero_sizes(device: torch.device) -> None:
    """No output features, and no input features, where the base is only its bias."""
    case = make((3, 16), 0, 4, dropout_p=0.5, bias=True).to(device)
    found = run(case, ours)
    assert found["y"].shape == (3, 0)
    for name in ("x", "lora_A", "lora_B", "bias"):
        assert not found[name].any(), name
    case = make((3, 16), 8, 4, bias=True, dtype=BF16).to(device)
    case = replace(case, x=case.x[:, :0], weight=case.weight[:, :0], lora_A=case.lora_A[:, :0])
    found = run(case, ours)
    assert torch.equal(found["y"], case.bias.expand(3, 8))
    assert found["x"].shape == (3, 0)
    assert not found["lora_B"].any()
    torch.testing.assert_close(found["bias"].double(), case.grad.double().sum(0), atol=1e-1, rtol=0)
