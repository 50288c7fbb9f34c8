"""Bottleneck adapters, which PEFT lacks, in a transformers model: the engine's formulas and names.

``A(z) = act(z·Dᵀ + bias_D)·Uᵀ + bias_U``. Houlsby et al. (2019) add A to what attention and MLP
put out, before the residual sum. Pfeiffer et al. (2021) add it behind the MLP alone: to the
residual sum s, A(s) where norms come before the blocks, and A(norm(s)), normed again, where they
come after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

INFIX = ".adapter."
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": functional.silu,
    "relu": functional.relu,
}
# The last layer of a block, by the end of the block's name.
_LAST = {
    "self_attn": "o_proj",
    "mlp": "down_proj",
    "attn": "c_proj",
    "attention": "output.dense",
    "output": "dense",
}


class Bottleneck(nn.Module):
    """A, for z ``[..., hidden_size]``; its weights are float32, its result has z's dtype."""

    def __init__(self, hidden_size: int, size: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, size)
        self.up = nn.Linear(size, hidden_size)
        self.activation = activation

    def forward(self, z: Tensor) -> Tensor:
        hidden = _ACTIVATIONS[self.activation](self.down(z.to(self.down.weight.dtype)))
        return self.up(hidden).to(z.dtype)  # type: ignore[no-any-return]


def attach(model: nn.Module, config: Mapping[str, Any], names: list[str]) -> None:
    """Puts an adapter as `<block>.adapter` behind each block that a name in `names` begins with.

    `config` is that of the adapter's folder. The model's own parameters keep their names.
    """
    for block in dict.fromkeys(name.split(INFIX)[0] for name in names if INFIX in name):
        adapter = Bottleneck(config["hidden_size"], config["bottleneck_size"], config["activation"])
        module = model.get_submodule(block)
        module.add_module("adapter", adapter)
        if config["variant"] == "houlsby":
            end = block.rpartition(".")[2]
            last = getattr(module, "c_proj", None) if end == "mlp" else None
            found = last if last is not None else module.get_submodule(_LAST[end])
            found.register_forward_hook(_behind(adapter))
        elif isinstance(norm := getattr(module, "LayerNorm", None), nn.Module):
            norm.register_forward_pre_hook(_before_norm(adapter))
        else:
            layer = model.get_submodule(block.rpartition(".")[0])
            layer.register_forward_hook(_on_sum(adapter))


def _behind(adapter: Bottleneck) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
        return y + adapter(y)  # type: ignore[no-any-return]

    return hook


def _on_sum(adapter: Bottleneck) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + adapter(output[0]), *output[1:])
        return output + adapter(output)

    return hook


def _before_norm(adapter: Bottleneck) -> Callable[..., tuple[Tensor]]:
    def hook(norm: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (s,) = inputs
        normed = functional.layer_norm(s, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return (s + adapter(normed),)

    return hook
