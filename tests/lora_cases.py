"""What tests of the operations share: random projections, PEFT's formula, the float64 truth."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ferrotune import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "lora_A", "lora_B", "bias", "lora_bias")


@dataclass
class Case:
    """Inputs of one LoRA linear; ``weight`` dense, or the 4-bit one whose values it has."""

    x: Tensor
    weight: Tensor
    quant: ops.Quant4bit | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float
    seed: Tensor | None
    grad: Tensor
    alone: bool = False  # the LoRA term without a base: ``weight`` is zeros

    def to(self, device: torch.device) -> Case:
        """The same values on another device."""
        return replace(
            self,
            **{field.name: _moved(getattr(self, field.name), device) for field in fields(self)},
        )

    def inputs(self) -> dict[str, Tensor]:
        """Those that may have a gradient, as fresh leaves."""
        found = {name: getattr(self, name) for name in NAMES}
        return {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in found.items()
            if tensor is not None
        }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, ops.Quant4bit):
        return value._make(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def make(
    shape: tuple[int, ...] = (2, 9, 40),
    n: int = 24,
    r: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    quant_type: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    bias: bool = False,
    lora_bias: bool = False,
    scaling: float = 0.7,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Case:
    """Sizes as in real layers: the LoRA term is a part of the base product, not its master."""
    draw = torch.Generator().manual_seed(seed)
    adapter = dtype if adapter_dtype is None else adapter_dtype

    def normal(*size: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=draw) * scale).to(kind)

    k = shape[-1]
    weight = normal(n, k, scale=k**-0.5)
    quant = None
    if quant_type is not None:
        quant = ops.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, double_quant=double_quant
        )
        weight = ops.dequantize_4bit(quant)
    return Case(
        x=normal(*shape),
        weight=weight,
        quant=quant,
        lora_A=normal(r, k, scale=k**-0.5, kind=adapter) if r else None,
        lora_B=normal(n, r, scale=r**-0.5, kind=adapter) if r else None,
        bias=normal(n) if bias else None,
        lora_bias=normal(n, kind=adapter) if lora_bias and r else None,
        scaling=scaling,
        dropout_p=dropout_p,
        seed=torch.tensor([seed + 12345]) if dropout_p else None,
        grad=normal(*shape[:-1], n),
    )


def run(case: Case, formula: Any) -> dict[str, Tensor]:
    """Output and gradients, ``"y"`` and by name of the input."""
    leaves = case.inputs()
    y = formula(case, **leaves)
    y.backward(case.grad.to(y.dtype))
    return {"y": y.detach()} | {name: tensor.grad for name, tensor in leaves.items()}


def ours(case: Case, x: Tensor, **leaves: Tensor) -> Tensor:
    weight = None if case.alone else case.weight if case.quant is None else case.quant
    adapter = [leaves.get("lora_A"), leaves.get("lora_B")]
    return ops.lora_linear(
        x,
        weight,
        *adapter,
        case.scaling,
        bias=leaves.get("bias"),
        lora_bias=leaves.get("lora_bias"),
        dropout_p=case.dropout_p,
        seed=case.seed,
    )


def peft(case: Case, x: Tensor, *, stream: int = 0, **leaves: Tensor) -> Tensor:
    """PEFT's own sequence of operations, its casts and roundings, under the same mask."""
    result = torch.nn.functional.linear(x, case.weight, leaves.get("bias"))
    kind = result.dtype
    if case.lora_A is not None:
        wide = x.to(case.lora_A.dtype)
        if case.seed is not None:
            wide = wide * ops.dropout_mask(
                (x.shape[:-1].numel(), x.shape[-1]), case.dropout_p, case.seed, stream,
                dtype=wide.dtype,
            ).view(x.shape)  # fmt: skip
        down = torch.nn.functional.linear(wide, leaves["lora_A"])
        up = torch.nn.functional.linear(down, leaves["lora_B"], leaves.get("lora_bias"))
        result = result + up * case.scaling
    return result.to(kind)


def truth(case: Case) -> dict[str, Tensor]:
    """The same in float64, from the same inputs."""
    wide = {
        name: getattr(case, name).double()
        for name in ("weight", *NAMES, "grad")
        if getattr(case, name) is not None
    }
    return run(replace(case, quant=None, **wide), peft)


def error(found: Tensor, true: Tensor) -> float:
    """Relative error in the Frobenius norm; 0 of nothing."""
    scale = true.norm().item()
    return (found.double() - true).norm().item() / scale if scale else 0.0
