"""One LoRA or QLoRA linear as each library runs it, on one device, for the benchmarks.

Every contender is a PEFT layer of its own weights: run by PEFT (over bitsandbytes for 4 bits), by
Unsloth's fused function, or patched by ferrotune; beside the frozen bf16 layer alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cuda_common as cuda
import torch
from torch import Tensor, nn

import ferrotune

BF16 = torch.bfloat16
Forward = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear k → n on ``tokens`` rows, W in bf16 or NF4 (double-quantised, blocks of 64)."""

    k: int
    n: int
    tokens: int
    quant: bool
    adapter: torch.dtype
    r: int = 16

    def __str__(self) -> str:
        return f"{self.k}→{self.n}"

    @property
    def scratch(self) -> int:
        """Bytes of W in bf16."""
        return self.k * self.n * BF16.itemsize

    @property
    def h(self) -> int:
        """Bytes of ``scaling · dropout(x) · Aᵀ``, what LoRA keeps for its backward."""
        return self.tokens * self.r * self.adapter.itemsize


@dataclasses.dataclass(frozen=True)
class Peers:
    """What could be imported."""

    bnb: Any
    unsloth: Callable[[Any, Tensor], Tensor] | None  # of a holder with o_proj, and x [1, m, k]

    @classmethod
    def load(cls, folder: str | None) -> Peers:
        """``folder`` goes onto the path first; what fails to import is left out, with a word."""
        if folder is not None:
            sys.path.insert(0, folder)
        bnb = _imported("bitsandbytes")
        with _forwards_kept(bnb):
            unsloth = _imported("unsloth", "unsloth.kernels.fast_lora")
        return cls(bnb, None if unsloth is None else unsloth.apply_lora_o)


def _imported(*names: str) -> Any:
    try:
        return [importlib.import_module(name) for name in names][-1]
    except Exception as error:
        print(f"without {names[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


@contextlib.contextmanager
def _forwards_kept(bnb: Any) -> Iterator[None]:
    """PEFT's and bitsandbytes' columns are theirs, whatever Unsloth replaces when imported."""
    from peft.tuners.lora.layer import Linear

    kinds: list[Any] = [Linear]
    if bnb is not None:
        from peft.tuners.lora.bnb import Linear4bit

        kinds += [Linear4bit, bnb.nn.Linear4bit]
    before = [kind.forward for kind in kinds]
    yield
    for kind, forward in zip(kinds, before, strict=True):
        kind.forward = forward


def peft_layer(
    layer: Layer, weight: Tensor, peers: Peers, p: float, adapters: Sequence[Tensor]
) -> Any:
    """PEFT's layer around W with copies of the adapters, in training."""
    import peft.tuners.lora.layer as dense
    from peft import LoraConfig

    kind: Any = dense.Linear
    n, k = weight.shape
    if layer.quant:
        from peft.tuners.lora.bnb import Linear4bit

        kind, nn4 = Linear4bit, peers.bnb.nn
        base = nn4.Linear4bit(
            k, n, bias=False, compute_dtype=BF16, quant_type="nf4", compress_statistics=True
        )
        base.weight = nn4.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    else:
        base = nn.Linear(k, n, bias=False, device=weight.device, dtype=BF16)
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    config = LoraConfig(r=layer.r, lora_alpha=2 * layer.r, lora_dropout=p)
    made = kind(base.to(weight.device), "default", config, r=layer.r, lora_alpha=2 * layer.r)
    for part, values in zip((made.lora_A, made.lora_B), adapters, strict=True):
        part["default"].weight = nn.Parameter(values.clone())
    return made.to(weight.device).train()


def patched(
    layer: Layer, weight: Tensor, peers: Peers, p: float, adapters: Sequence[Tensor]
) -> Any:
    """The same layer run by ferrotune; ferrotune's own where bitsandbytes is not there."""
    if layer.quant and peers.bnb is None:
        base = nn.Linear(layer.k, layer.n, False, weight.device, BF16)
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        made: Any = ferrotune.nn.LoraLinear4bit.from_linear(
            base, r=layer.r, lora_alpha=2 * layer.r, lora_dropout=p, adapter_dtype=layer.adapter
        )
        with torch.no_grad():
            made.lora_A["default"].weight.copy_(adapters[0])
            made.lora_B["default"].weight.copy_(adapters[1])
        return made.train()
    model = nn.ModuleList([peft_layer(layer, weight, peers, p, adapters)])
    ferrotune.patch(model, strict=True)
    return model[0]


def unsloth(made: Any, peers: Peers) -> Forward:
    holder, apply = types.SimpleNamespace(o_proj=made), peers.unsloth
    assert apply is not None
    return lambda x: apply(holder, x)


class Contenders:
    """Forwards and backwards of one layer by every library, on the same rotated inputs.

    A contender's name is the library's, with "dropout" where x is dropped before A. Each returns
    y, the gradient of x, and those of the adapters.
    """

    def __init__(
        self, layer: Layer, peers: Peers, p: float, device: torch.device, *, sets: int = 2
    ) -> None:
        self.layer, self.peers, self.p = layer, peers, p
        draw = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
            return (torch.randn(*size, generator=draw, device=device) * scale).to(dtype)

        k, n, r = layer.k, layer.n, layer.r
        self.weight = normal(n, k, scale=k**-0.5)
        self.xs = [normal(1, layer.tokens, k).requires_grad_() for _ in range(sets)]
        self.grads = [normal(1, layer.tokens, n) for _ in range(sets)]
        self.adapters = {
            rank: (
                normal(rank, k, scale=k**-0.5, dtype=layer.adapter),
                normal(n, rank, scale=rank**-0.5, dtype=layer.adapter),
            )
            for rank in {r, 64}
        }

    def _made(self, make: Any, p: float, r: int | None = None) -> Any:
        layer = self.layer if r is None else dataclasses.replace(self.layer, r=r)
        return make(layer, self.weight, self.peers, p, self.adapters[layer.r])

    def forwards(self, *, alone: bool = False) -> dict[str, tuple[Forward, list[Tensor]]]:
        """By name: the forward, and the parameters that get gradients. ``alone``: no peers."""
        weight = self.weight
        found: dict[str, tuple[Forward, list[Tensor]]] = {
            "frozen": (lambda x: nn.functional.linear(x, weight), [])
        }
        for label, p in (("", 0.0), (" dropout", self.p)):
            made = self._made(patched, p)
            found[f"ferrotune{label}"] = (made, trained(made))
            if alone:
                continue
            if not self.layer.quant or self.peers.bnb is not None:
                stock = self._made(peft_layer, p)
                name = "PEFT + bitsandbytes" if self.layer.quant else "PEFT"
                found[f"{name}{label}"] = (stock, trained(stock))
                if self.peers.unsloth is not None:
                    found[f"Unsloth{label}"] = (unsloth(stock, self.peers), trained(stock))
        return found

    def with_rank_64(self) -> tuple[Forward, list[Tensor]]:
        made = self._made(patched, 0.0, 64)
        return made, trained(made)

    def work(self, forward: Forward, parameters: list[Tensor]) -> cuda.Work:
        """For graphs: gradients are returned, not kept."""

        def run(i: int) -> list[Tensor]:
            x, grad = self.xs[i % len(self.xs)], self.grads[i % len(self.grads)]
            y = forward(x)
            return [y, *torch.autograd.grad(y, [x, *parameters], grad)]

        return run

    def eager(self, forward: Forward, parameters: list[Tensor]) -> cuda.Work:
        """As a training loop calls it: gradients go to ``.grad``, which is empty before."""

        def run(i: int) -> None:
            x, grad = self.xs[i % len(self.xs)], self.grads[i % len(self.grads)]
            x.grad = None
            for parameter in parameters:
                parameter.grad = None
            y: Any = forward(x)
            y.backward(grad)

        return run

    def check(self, forwards: dict[str, tuple[Forward, list[Tensor]]]) -> None:
        """All contenders without dropout compute the same; raises SystemExit if not."""
        names = [name for name in forwards if "dropout" not in name and name != "frozen"]
        results: dict[str, Any] = {name: self.work(*forwards[name])(0) for name in names}
        for name in names[1:]:
            for mine, theirs in zip(results[names[0]], results[name], strict=True):
                mine, theirs = mine.detach().float(), theirs.detach().float()
                difference = float((mine - theirs).norm() / theirs.norm())
                if not difference < 2e-2:
                    raise SystemExit(f"{self.layer}: {name} differs by {difference:.1e}")


def trained(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
