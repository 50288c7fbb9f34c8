"""Layers of PEFT and bitsandbytes, and what the tests of ferrotune.nn do with layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ROWS, COLUMNS = 48, 128  # n, k; bitsandbytes' CPU code wants k to be whole blocks


def randomised(layer: Any, seed: int = 1) -> Any:
    """Gives every parameter of the adapter values: B is zero before training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return layer


def dense(bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(COLUMNS, ROWS, bias=bias).to(dtype)


def bnb_linear(
    source: nn.Linear, quant_type: str = "nf4", double_quant: bool = True, **options: Any
) -> Any:
    """bitsandbytes' Linear4bit with the values of ``source``, quantised on the CPU."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        COLUMNS, ROWS, source.bias is not None,
        quant_type=quant_type, compress_statistics=double_quant, **options,
    )  # fmt: skip
    weight: Any = layer.weight
    weight.data = source.weight.detach().clone()
    if source.bias is not None:
        layer.bias = nn.Parameter(source.bias.detach().clone())
    return layer.to("cpu")


def peft_layer(base: nn.Module, **settings: Any) -> Any:
    """PEFT's LoRA layer around ``base``, with float32 adapters as `get_peft_model` makes them."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig
    from peft.tuners.lora import layer
    from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

    settings = {"r": 4, "lora_alpha": 12, **settings}
    config = LoraConfig(target_modules=["x"], **settings)
    kind: Any = PeftLinear4bit if isinstance(base, Linear4bit) else layer.Linear
    found = kind(base, "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return found


def run(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """y of x, and the gradients of ``(y · weights).sum()``: ``x`` and each trained parameter's."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y.float() * weights).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == parameter.dtype, name
            found[name] = parameter.grad.clone()
    return found


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest of all differences, each as a part of its tensor's norm."""
    assert found.keys() == wanted.keys()
    worst = 0.0
    for name, truth in wanted.items():
        assert found[name].dtype == truth.dtype, name
        assert found[name].shape == truth.shape, name
        error = (found[name].double() - truth.double()).norm() / truth.double().norm()
        worst = max(worst, float(error))
    return worst


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[2, 5, k]`` in ``dtype``, and weights of the outputs for `run`."""
    torch.manual_seed(7)
    return torch.randn(2, 5, COLUMNS).to(dtype), torch.randn(2, 5, ROWS)
