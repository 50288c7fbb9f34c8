"""Bottleneck adapters in torch, by the papers' formulas, and in ferrotune's own folder format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from methods import Family, classifies, task_of

LAST = {
    "llama": ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
    "gpt2": ("attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "bert": ("attention", "attention.output.dense", "output", "output.dense"),
}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
HIDDEN, COUNT = 48, 2


def blocks(family: str, variant: str) -> list[tuple[str, str]]:
    """The blocks that have an adapter, and the last projection of each."""
    attention, o, mlp, down = LAST[family]
    both = [(attention, o), (mlp, down)]
    return [
        (f"{LAYERS[family]}.{layer}.{block}", f"{LAYERS[family]}.{layer}.{last}")
        for layer in range(COUNT)
        for block, last in (both if variant == "houlsby" else both[1:])
    ]


def write(family: Family, variant: str, size: int, folder: Path, seed: int = 0) -> Path:
    """An adapter folder with random values, as the format's documentation has it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    shapes = {"down.weight": (size, HIDDEN), "down.bias": (size,), "up.weight": (HIDDEN, size),
              "up.bias": (HIDDEN,)}  # fmt: skip
    tensors = {
        f"{block}.adapter.{name}": torch.randn(*shape, generator=generator) * 0.3
        for block, _ in blocks(family[0], variant)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "adapter_type": "BOTTLENECK", "format_version": 1, "variant": variant,
        "bottleneck_size": size, "hidden_size": HIDDEN, "num_layers": COUNT,
        "activation": {"houlsby": "swish", "pfeiffer": "relu"}[variant],
        "task_type": task_of(family), "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def attached(base: Path, family: Family, folder: Path, dtype: str = "float64") -> Any:
    """transformers' model with a folder's adapters, whose parameters alone require gradients."""
    import torch
    import transformers
    from safetensors.torch import load_file

    from llamas import computing_in

    config = json.loads((folder / "adapter_config.json").read_text())
    source = folder if (folder / "config.json").exists() else base
    auto: Any = getattr(
        transformers,
        "AutoModelFor" + ("SequenceClassification" if classifies(family) else "CausalLM"),
    )
    model = auto.from_pretrained(
        base, config=transformers.AutoConfig.from_pretrained(source), attn_implementation="sdpa"
    )
    model = computing_in(model.requires_grad_(False), dtype)
    stored = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stored:
                parameter.copy_(stored[name]).requires_grad_(True)
    act: Any = {"swish": torch.nn.functional.silu, "relu": torch.relu}[config["activation"]]
    found = torch.nn.ParameterDict()
    for block, last in blocks(family[0], config["variant"]):
        weights = {}
        for part in ("down.weight", "down.bias", "up.weight", "up.bias"):
            name = f"{block}.adapter.{part}"
            weights[part] = torch.nn.Parameter(stored[name].to(getattr(torch, dtype)))
            found[name.replace(".", "/")] = weights[part]
        linear = torch.nn.functional.linear

        def bend(z: Any, w: Any = weights, linear: Any = linear) -> Any:
            return linear(
                act(linear(z, w["down.weight"], w["down.bias"])), w["up.weight"], w["up.bias"]
            )

        if config["variant"] == "houlsby":
            model.get_submodule(last).register_forward_hook(
                lambda _module, _inputs, y, bend=bend: y + bend(y)
            )
        elif family[0] == "bert":
            norm = model.get_submodule(block).LayerNorm
            plain = norm.forward
            norm.forward = lambda s, plain=plain, bend=bend: plain(s + bend(plain(s)))
        else:
            layer = model.get_submodule(block.rsplit(".", 1)[0])

            def on_sum(_module: Any, _inputs: Any, s: Any, bend: Any = bend) -> Any:
                if isinstance(s, tuple):
                    return (s[0] + bend(s[0]), *s[1:])
                return s + bend(s)

            layer.register_forward_hook(on_sum)
    model.ferrotune_adapters = found
    return model


def by_name(gradients: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix("ferrotune_adapters.").replace("/", "."): values
        for name, values in gradients.items()
    }
