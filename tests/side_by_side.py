"""One step of the stock model and of the patched one, from the same random state."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import ferrotune
from ferrotune.patching.masks import index_dropout

# Relative (Frobenius) differences that rounding explains in tiny models: f32 about 100 epsilons;
# a bf16 step rounds every activation to 8 bits, which a ReLU's switching enlarges.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def step(model: torch.nn.Module, batch: Any, seed: int = 5) -> dict[str, torch.Tensor]:
    """Outputs and the gradients of all that is trained."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    found = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(found, torch.Tensor):
        outputs, loss = {"output": found}, found.float().pow(2).mean()
    else:
        outputs, loss = {"logits": found.logits, "loss": found.loss}, found.loss
    if loss.requires_grad:
        loss.backward()
    grads = {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: tensor.detach().clone() for name, tensor in outputs.items()} | grads


def both(
    model: torch.nn.Module,
    batch: Any,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], ferrotune.PatchReport]:
    """Stock and patched results under the same dropout masks; the model stays patched."""
    ferrotune.unpatch(model)
    with index_dropout(model), context():
        stock = step(model, batch)
        report = ferrotune.patch(model)
        patched = step(model, batch)
    return stock, patched, report


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    difference, size = float((a.double() - b.double()).norm()), float(b.double().norm())
    return difference if size == 0 else difference / size


def assert_agree(
    stock: dict[str, torch.Tensor],
    patched: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
) -> float:
    """The same tensors of the same dtypes, equal to rounding; returns the largest difference."""
    assert stock.keys() == patched.keys()
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    worst = 0.0
    for name, a in stock.items():
        b = patched[name]
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        found = relative(b, a)
        assert found <= limit, f"{name}: {found:.2e}"
        worst = max(worst, found)
    return worst


@contextlib.contextmanager
def counted() -> Iterator[dict[str | None, int]]:
    """Forwards of replaced layers by reason: None are ferrotune's."""
    from ferrotune.patching import listening

    counts: dict[str | None, int] = {}

    def take(_: torch.nn.Module, reason: str | None) -> None:
        counts[reason] = counts.get(reason, 0) + 1

    with listening(take):
        yield counts
