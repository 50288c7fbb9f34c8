"""Cases of linear cross-entropy: by ferrotune, by PyTorch's own operations, and in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ferrotune import ops


@dataclasses.dataclass
class Loss:
    """hidden ``[*shape, d]`` and a head of V classes; ``settings`` are those of the operation."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    settings: dict[str, Any]
    grad: float = 1.0

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {
            name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
            for name, tensor in found.items()
            if tensor is not None
        }


def make(
    shape: tuple[int, ...] = (3, 7),
    classes: int = 37,
    d: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    ignored: float = 0.3,
    size: float = 1.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    grad: float = 1.0,
    **settings: Any,
) -> Loss:
    """Hidden states of ``size``; a part ``ignored`` of the labels is ignore_index."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    labels = torch.randint(0, classes, shape, generator=generator)
    drop = torch.rand(shape, generator=generator) < ignored
    labels[drop] = settings.get("ignore_index", -100)
    return Loss(
        random(*shape, d, scale=size),
        random(classes, d, scale=2 / d**0.5),
        labels.to(device),
        random(classes) if bias else None,
        settings,
        grad,
    )


def ours(case: Loss, leaves: dict[str, Tensor]) -> Tensor:
    return ops.linear_cross_entropy(
        leaves["hidden"], leaves["weight"], case.labels, bias=leaves.get("bias"), **case.settings
    )


def stock(case: Loss, leaves: dict[str, Tensor]) -> Tensor:
    """As transformers does it, but for label smoothing: logits in hidden's dtype, widened."""
    settings = dict(case.settings)
    softcap, items = settings.pop("softcap", None), settings.pop("num_items", None)
    reduction = settings.pop("reduction", "mean")
    logits = nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]),
        case.labels.reshape(-1),
        reduction=reduction if items is None else "sum",
        **settings,
    )
    return loss if items is None else loss / float(items)


def run(case: Loss, formula: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The loss and the gradients of all leaves."""
    leaves = case.leaves(dtype)
    loss = formula(case, leaves)
    (loss * case.grad).backward()
    grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {"loss": loss.detach(), **grads}
