"""Linear cross-entropy inside PyTorch: dispatcher, autograd, compile."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ferrotune import ops  # noqa: E402
from loss_cases import make, ours, run  # noqa: E402

OPS = torch.ops.ferrotune


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapted", [False, True])
def test_opcheck(dtype: torch.dtype, adapted: bool) -> None:
    case = make((11,), dtype=dtype)
    leaves = case.leaves()
    h = torch.randn(11, 4, requires_grad=True) if adapted else None
    lora_B = torch.randn(37, 4, requires_grad=True) if adapted else None
    parts = (leaves["hidden"], leaves["weight"], leaves["bias"], h, lora_B)
    for asked in ([True, True, True, adapted, adapted], [True, False, False, False, False]):
        for divisor in (None, torch.tensor(3.0)):
            given = [
                part if part is None or wanted else part.detach()
                for part, wanted in zip(parts, asked, strict=True)
            ]
            torch.library.opcheck(
                OPS.linear_cross_entropy.default,
                (*given, case.labels, -100, 0.1, 5.0, "mean", divisor, asked),
            )
    gradient = torch.randn(3, 5)
    torch.library.opcheck(
        OPS.scale_gradient.default, (gradient, torch.tensor(0.5), torch.tensor(2.0), dtype)
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0, "label_smoothing": 0.3, "num_items": 5}])
def test_gradcheck(
    settings: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:  # the dispatcher's autograd, without the compiler
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = make((4,), 7, 5, dtype=torch.float64, **settings)
    leaves = case.leaves()
    leaves["lora_A"] = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    leaves["lora_B"] = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)

    def formula(*tensors: torch.Tensor) -> torch.Tensor:
        hidden, weight, bias, lora_A, lora_B = tensors
        return ops.linear_cross_entropy(
            hidden, weight, case.labels, bias=bias, lora_A=lora_A, lora_B=lora_B, scaling=0.5,
            **settings,
        ).square()  # fmt: skip

    assert torch.autograd.gradcheck(formula, list(leaves.values()))


def test_the_two_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({}, {"softcap": 3.0}, {"num_items": 5}, {"reduction": "sum"}):
        case = make(dtype=torch.bfloat16, **settings)
        eager = run(case, ours)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            other = run(case, ours)
        for name, tensor in eager.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative_is_refused(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = make(dtype=torch.float64)
    leaves = case.leaves()
    loss = ours(case, leaves).square()
    (grad,) = torch.autograd.grad(loss, leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", [(), ("weight", "bias")])
def test_compiles_whole_and_once(frozen: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    case = make((2, 8), softcap=4.0)
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, items: Any) -> Any:
        return ops.linear_cross_entropy(
            hidden.tanh(), weight, case.labels, bias=bias, softcap=4.0, num_items=items
        )

    compiled = torch.compile(step, backend=counts, fullgraph=True)
    for i in range(3):
        results = []
        for call in (step, compiled):
            leaves = case.leaves()
            for name in frozen:
                leaves[name].requires_grad_(False)
            loss = call(*leaves.values(), torch.tensor(5.0 + i))
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves.values())])
        for eager, other in zip(*results, strict=True):
            assert (eager is None) == (other is None)
            assert eager is None or torch.equal(eager, other)
    assert counts.frame_count == 1


@pytest.mark.slow
def test_inductor_gives_eager_numbers() -> None:
    torch._dynamo.reset()
    case = make((2, 8), dtype=torch.bfloat16)
    eager = run(case, ours)
    compiled = torch.compile(lambda *a: ours(case, dict(zip(case.leaves(), a, strict=True))))
    leaves = case.leaves()
    loss = compiled(*leaves.values())
    loss.backward()
    torch.testing.assert_close(loss.detach(), eager["loss"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager[f"gradient of {name}"])
