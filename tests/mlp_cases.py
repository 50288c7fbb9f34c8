"""A gated MLP in one node beside its three layers, for tests on every device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ferrotune import ops
from ferrotune.ops import Projection, Quant4bit
from lora_cases import error

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def draw(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def layer(
    n: int, k: int, seed: int, dtype: torch.dtype, device: torch.device, **options: Any
) -> Projection:
    """Random; ``quant``, ``bias``, ``adapter`` (its dtype or None), ``r``, ``p``, ``lora_bias``."""
    weight: Tensor | Quant4bit = draw(n, k, seed=seed, dtype=dtype, device=device)
    quant = ops.quantize_4bit(weight) if options.get("quant") else None
    adapter = options.get("adapter", dtype)
    lora_A = lora_B = lora_bias = bias = None
    if adapter is not None:
        r = options.get("r", 8)
        lora_A = draw(r, k, seed=seed + 1, dtype=adapter, device=device).requires_grad_()
        lora_B = draw(n, r, seed=seed + 2, dtype=adapter, device=device).requires_grad_()
        if options.get("lora_bias"):
            lora_bias = draw(n, seed=seed + 3, dtype=adapter, device=device).requires_grad_()
    if options.get("bias"):
        bias = draw(n, seed=seed + 4, dtype=dtype, device=device).requires_grad_()
    p = options.get("p", 0.0) if adapter is not None else 0.0
    return Projection(
        None if quant is not None else weight, quant, bias, lora_A, lora_B, lora_bias, 1.5, p
    )


def cases(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """What the layers of one MLP are: 4-bit or dense, with adapters in both types, or without."""
    adapters = (dtype, torch.float32, None) if dtype != torch.float32 else (dtype, None)
    for quant, adapter, p in itertools.product((False, True), adapters, (0.0, 0.3)):
        if adapter is None and p:
            continue
        yield {"quant": quant, "adapter": adapter, "p": p, "bias": p > 0, "lora_bias": quant}


def mlp(
    shape: tuple[int, ...], inner: int, out: int, dtype: torch.dtype, device: torch.device,
    options: dict[str, Any],
) -> tuple[Tensor, list[Projection]]:  # fmt: skip
    k = shape[-1]
    x = draw(*shape, seed=1, dtype=dtype, device=device).requires_grad_()
    sizes = ((inner, k), (inner, k), (out, inner))
    layers = [layer(*size, 10 * i, dtype, device, **options) for i, size in enumerate(sizes)]
    return x, layers


Seeds = Tensor | list[Tensor] | None


def apart(x: Tensor, layers: list[Projection], activation: str, seed: Seeds) -> Tensor:
    """The same by the operations that it is made of; given three seeds, those of single layers."""
    if isinstance(seed, list):
        first, second = (
            ops.lora_linear_group(x, [one], seed=own)[0]
            for one, own in zip(layers[:2], seed[:2], strict=True)
        )
        hidden = ops.glu(first, second, activation)
        return ops.lora_linear_group(hidden, layers[2:], seed=seed[2])[0]
    gate, up, down = (one._replace(stream=i) for i, one in enumerate(layers))
    first, second = ops.lora_linear_group(x, [gate, up], seed=seed)
    return ops.lora_linear_group(ops.glu(first, second, activation), [down], seed=seed)[0]


def leaves(x: Tensor, layers: list[Projection]) -> list[Tensor]:
    """What gets a gradient."""
    found = [x]
    for one in layers:
        found += [
            tensor
            for tensor in (one.bias, one.lora_A, one.lora_B, one.lora_bias)
            if tensor is not None and tensor.requires_grad
        ]
    return found


def assert_same(
    shape: tuple[int, ...], inner: int, out: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Output and every gradient of one node against the operations apart, whose own exactness
    other tests show: the same kernels in the same order, so equal but for what products sum."""
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for number, options in enumerate(cases(dtype)):
        activation = ACTIVATIONS[number % len(ACTIVATIONS)]
        x, layers = mlp(shape, inner, out, dtype, device, options)
        seed: Seeds = None
        if options["p"]:
            seeds = [torch.tensor([number + i], device=device) for i in range(3)]
            seed = seeds if number % 2 else seeds[0]
        found = ops.gated_mlp(x, *layers, activation, seed=seed)
        expected = apart(x, layers, activation, seed)
        assert found.dtype == dtype
        assert found.shape == (*shape[:-1], out)
        coefficients = draw(*found.shape, seed=77, dtype=dtype, device=device)
        wanted = leaves(x, layers)
        ours = torch.autograd.grad(found, wanted, coefficients)
        theirs = torch.autograd.grad(expected, wanted, coefficients)
        for a, b in zip((found, *ours), (expected, *theirs), strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.isfinite().all()
            assert error(a, b) <= tolerance, (options, activation)
