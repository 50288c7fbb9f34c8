"""Projections that share x, and every form in which gradients come and are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from covering import pairwise
from exactness import Exactness
from ferrotune import ops
from lora_cases import Case, error, make, ours, peft, run, truth
from test_lora_cuda import BF16, F16, F32, IDS, TYPES, WEIGHTS, build

# n, r, scaling and kind of weight of each projection.
GROUPS: dict[str, list[tuple[int, int, float, str]]] = {
    "q, k, v": [(64, 8, 2.0, "nf4 nested"), *[(16, 8, 2.0, "nf4 nested")] * 2],
    "gate, up": [(136, 16, 0.5, "dense"), (136, 16, 0.5, "dense")],
    "other n and r": [(33, 3, 0.7, "dense"), (130, 17, 1.3, "dense"), (7, 64, 2.0, "dense")],
    "one without adapter": [(40, 0, 1.0, "nf4 nested"), (24, 16, 2.0, "nf4 nested")],
    "wide ranks": [(64, 100, 0.25, "fp4 nested"), (72, 256, 0.1, "fp4 nested")],
    "mixed weights": [(64, 8, 2.0, "dense"), (48, 4, 1.0, "nf4"), (40, 8, 0.5, "none")],
    "ranks above a pass together": [(64, 64, 0.25, "dense"), (64, 64, 0.5, "dense")],
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "group": list(GROUPS),
    "shape": [(5, 40), (2, 33, 64), (1, 2, 3, 129), (0, 16), (300, 256)],
    "dropout_p": ["none", "all", "some"],
    "bias": [False, True],
    "unused": [False, True],  # a loss that takes no part of the last projection
}


def members(settings: dict[str, Any], **options: Any) -> list[Case]:
    """The cases of a group: the first one's x and seed are all of theirs."""
    probabilities = {"none": [0.0], "all": [0.1, 0.1, 0.1], "some": [0.3, 0.0, 0.05]}
    found: list[Case] = []
    for i, (n, r, scaling, weight) in enumerate(GROUPS[settings["group"]]):
        case = build(
            (settings["shape"], n), r, weight, settings["bias"], lora_bias=settings["bias"],
            scaling=scaling, seed=i, **options,
        )  # fmt: skip
        p = probabilities[settings["dropout_p"]]
        p = p[i % len(p)] if r else 0.0
        found.append(replace(case, dropout_p=p, seed=torch.tensor([77]), x=(found or [case])[0].x))
    return found


def gathered(
    cases: Sequence[Case], used: Sequence[bool], formula: Any, grads: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of a group by name and number; x's once."""
    leaves = [case.inputs() for case in cases]
    x = leaves[0].pop("x")
    for other in leaves[1:]:
        del other["x"]
    ys = formula(cases, x, leaves)
    given = [case.grad for case in cases] if grads is None else grads
    torch.autograd.backward(
        list(itertools.compress(ys, used)),
        [grad.to(y.dtype) for grad, y in itertools.compress(zip(given, ys, strict=True), used)],
    )
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"x": x.grad}
    for i, one in enumerate(leaves):
        for name, leaf in one.items():
            assert (leaf.grad is not None) >= used[i], name
            if used[i]:
                found[f"{name}{i}"] = leaf.grad
            else:  # no gradient is as good as a zero one
                assert leaf.grad is None or not leaf.grad.any()
    return found


def group(cases: Sequence[Case], x: Tensor, leaves: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    projections = [
        ops.Projection(
            None if case.quant is not None or case.alone else case.weight, case.quant,
            one.get("bias"), one.get("lora_A"), one.get("lora_B"), one.get("lora_bias"),
            case.scaling, case.dropout_p,
        )
        for case, one in zip(cases, leaves, strict=True)
    ]  # fmt: skip
    return ops.lora_linear_group(x, projections, seed=cases[0].seed)


def one_by_one(
    cases: Sequence[Case], x: Tensor, leaves: Sequence[dict[str, Tensor]]
) -> list[Tensor]:
    """PEFT's sequence for each, with its own stream of masks."""
    return [
        peft(case, x, stream=i, **one)
        for i, (case, one) in enumerate(zip(cases, leaves, strict=True))
    ]


def in_float64(case: Case) -> Case:
    names = ("x", "weight", "lora_A", "lora_B", "bias", "lora_bias", "grad")
    parts = {name: getattr(case, name) for name in names}
    wide = {name: part.double() for name, part in parts.items() if part is not None}
    return replace(case, quant=None, **wide)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("dtype", "adapter"), TYPES, ids=IDS)
def test_groups_are_no_less_exact(
    dtype: torch.dtype, adapter: torch.dtype, device: torch.device
) -> None:
    errors = Exactness()
    for settings in pairwise(SETTINGS):
        cases = [case.to(device) for case in members(settings, dtype=dtype, adapter_dtype=adapter)]
        used = [True] * len(cases)
        used[-1] = not settings["unused"]
        rows = cases[0].x.shape[:-1].numel()
        rank = min((case.lora_A.shape[0] for case in cases if case.lora_A is not None), default=1)
        errors.add(
            str(settings),
            gathered(cases, used, group),
            gathered(cases, used, one_by_one),
            gathered([in_float64(case) for case in cases], used, one_by_one),
            rows * rank,
        )
    errors.check()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("weight", ["dense", "nf4 nested"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_only_what_is_asked_for_has_a_gradient(
    dtype: torch.dtype, weight: str, device: torch.device
) -> None:
    """x, lora_A, lora_B, lora_bias and bias, frozen in every combination."""
    case = build(((2, 9, 40), 24), 8, weight, bias=True, lora_bias=True, dtype=dtype, dropout_p=0.2)
    case = case.to(device)
    full = run(case, ours)
    for asked in itertools.product((False, True), repeat=5):
        leaves = case.inputs()
        for (_, tensor), wanted in zip(leaves.items(), asked, strict=True):
            tensor.requires_grad_(wanted)
        y = ours(case, **leaves)
        assert y.requires_grad == any(asked)
        assert error(y, full["y"].double()) < torch.finfo(dtype).eps
        if any(asked):
            y.backward(case.grad)
        for (name, tensor), wanted in zip(leaves.items(), asked, strict=True):
            assert (tensor.grad is not None) == wanted, (asked, name)
            if wanted:
                assert error(tensor.grad, full[name].double()) < 2 * torch.finfo(dtype).eps, name
    with torch.no_grad():
        y = ours(case, **case.inputs())
    assert not y.requires_grad
    assert error(y, full["y"].double()) < torch.finfo(dtype).eps


def strided(grad: Tensor) -> dict[str, Tensor]:
    """The same values with other strides; ``[2, 16, 24]``."""
    wide = grad.new_full((24, 2, 16, 3), torch.nan)
    wide[..., 1].permute(1, 2, 0).copy_(grad)
    padded = grad.new_full((2, 16, 31), torch.nan)
    padded[..., 3:27].copy_(grad)
    return {
        "rows outside": grad.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": grad.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every third": wide[..., 1].permute(1, 2, 0),
        "not aligned": padded[..., 3:27],
    }


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("weight", ["dense", "nf4 nested", "none"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_gradients_and_inputs_of_any_strides(
    dtype: torch.dtype, weight: str, device: torch.device
) -> None:
    case = build(((2, 16, 24), 24), 8, weight, bias=True, dtype=dtype, dropout_p=0.2).to(device)
    want = run(case, ours)
    for label, grad in strided(case.grad).items():
        leaves = case.inputs()
        ours(case, **leaves).backward(grad)
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, want[name]), (label, name)
    for label, x in strided(case.x).items():
        leaves = case.inputs() | {"x": x.detach().requires_grad_()}
        y = ours(case, **leaves)
        y.backward(case.grad)
        assert torch.equal(y, want["y"]), label
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, want[name]), (label, name)
    turned = case.inputs()
    for name in ("lora_A", "lora_B"):
        turned[name] = turned[name].detach().t().contiguous().t().requires_grad_()
    ours(case, **turned).backward(case.grad)
    for name, leaf in turned.items():
        assert error(leaf.grad, want[name].double()) < 2 * torch.finfo(dtype).eps, name


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_expanded_gradients(dtype: torch.dtype, device: torch.device) -> None:
    """`sum().backward()` sends one element with strides of 0."""
    errors = Exactness()
    for weight in WEIGHTS:
        case = build(((3, 11, 40), 24), 4, weight, bias=True, dtype=dtype, dropout_p=0.1).to(device)
        ones = replace(case, grad=torch.ones_like(case.grad))
        leaves = case.inputs()
        y = ours(case, **leaves)
        y.sum().backward()
        found = {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
        errors.add(weight, found, run(ones, peft), truth(ones), 33 * 4)
        column = case.grad[..., :1].expand_as(case.grad)
        leaves = case.inputs()
        ours(case, **leaves).backward(column)
        want = run(replace(case, grad=column.contiguous()), ours)
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, want[name]), (weight, name)
    errors.check()


def test_a_group_is_its_members_alone(device: torch.device) -> None:
    """Masks too: stream i of the seed, wherever a projection stands."""
    settings = {"group": "q, k, v", "shape": (2, 33, 64), "dropout_p": "all", "bias": True}
    cases = [case.to(device) for case in members(settings, dtype=BF16)]
    together = gathered(cases, [True] * 3, group)
    for i, case in enumerate(cases):
        leaves = case.inputs()
        one = ops.Projection(
            None, case.quant, leaves["bias"], leaves["lora_A"], leaves["lora_B"],
            leaves["lora_bias"], case.scaling, case.dropout_p, stream=i,
        )  # fmt: skip
        y = ops.lora_linear_group(leaves["x"], [one], seed=case.seed)[0]
        y.backward(case.grad)
        assert error(together[f"y{i}"], y.detach().double()) < torch.finfo(BF16).eps
        for name in ("lora_A", "lora_B", "bias", "lora_bias"):
            want = leaves[name].grad.double()
            assert error(together[f"{name}{i}"], want) < 2 * torch.finfo(BF16).eps, name


@pytest.mark.usefixtures("hopper")
def test_groups_twice_are_equal(device: torch.device) -> None:
    for settings in pairwise(SETTINGS, seed=1):
        cases = [case.to(device) for case in members(settings, dtype=BF16)]
        used = [True] * len(cases)
        first, second = gathered(cases, used, group), gathered(cases, used, group)
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), (settings, name)


def test_make_is_not_degenerate(device: torch.device) -> None:
    """The LoRA term and its gradients are large enough for their errors to show."""
    case = make((64, 128), 96, 16).to(device)
    base = replace(case, lora_A=None, lora_B=None)
    term = run(case, peft)["y"] - run(base, peft)["y"]
    assert 0.2 < float(term.norm() / run(base, peft)["y"].norm()) < 2
