"""Bottleneck adapters beside AdapterHub's `adapters`, which wants a transformers of its own.

In an environment with it, `pip install adapters`, or where its folder comes first in PYTHONPATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bottlenecks
from llamas import Batch, engine

pytest.importorskip("adapters", reason="needs adapters, with a transformers of its own")

KINDS = {"bert": "ForSequenceClassification", "gpt2": "LMHeadModel", "llama": "ForCausalLM"}
PARTS = {
    "down.weight": "adapter_down.0.weight",
    "down.bias": "adapter_down.0.bias",
    "up.weight": "adapter_up.weight",
    "up.bias": "adapter_up.bias",
}


def build(family: str, folder: Path) -> Any:
    """A model with random weights, biases and norms; transformers' model in float64."""
    import torch
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64
        )
    else:
        kind: Any = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}[family]
        config = kind(
            vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=80, max_position_embeddings=64, num_labels=3,
        )  # fmt: skip
    name = "SequenceClassification" if family == "bert" else "CausalLM"
    auto: Any = getattr(transformers, f"AutoModelFor{name}")
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return auto.from_pretrained(folder).double().eval()


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", KINDS)
def test_adapters_compute_as_adapterhubs(family: str, variant: str, tmp_path: Path) -> None:
    """Logits of the engine, and of the reference that the other tests hold it to."""
    import adapters
    import torch
    from safetensors.torch import load_file

    model = build(family, tmp_path / "base")
    kind = (family, KINDS[family])
    folder = bottlenecks.write(kind, variant, 8, tmp_path / "adapter")
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(1))
    plain = model(ids).logits
    adapters.init(model)
    config = {"houlsby": adapters.DoubleSeqBnConfig, "pfeiffer": adapters.SeqBnConfig}[variant]
    model.add_adapter("own", config=config(reduction_factor=6))
    model.set_active_adapters("own")
    model.double().eval()
    places = {n: p for n, p in model.named_parameters() if ".adapters.own." in n}
    stored = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for block, _ in bottlenecks.blocks(family, variant):
            layer = next(part for part in block.split(".") if part.isdigit())
            for part, name in PARTS.items():
                (place,) = (
                    n
                    for n in places
                    if f".{layer}." in n.partition(".adapters.")[0] + "."
                    and ("att" in n) == ("att" in block)
                    and n.endswith(name)
                )
                places.pop(place).copy_(stored[f"{block}.adapter.{part}"].double())
    assert not places
    expected = model(ids).logits
    scale = expected.abs().max()
    assert (expected - plain).abs().max() / scale > 0.1
    reference = bottlenecks.attached(tmp_path / "base", kind, folder)(ids).logits
    assert (reference.double() - expected).abs().max() / scale < 1e-6
    targets = np.full((3, 9), -100, np.int32)
    targets[:, -1] = 1
    positions = np.tile(np.arange(9, dtype=np.uint32), (3, 1))
    batch = Batch(ids.numpy().astype(np.uint32), targets, positions)
    found = engine(tmp_path / "base", batch, adapter=folder).logits.reshape(expected.shape)
    assert np.abs(found - expected.detach().numpy()).max() / float(scale) < 1e-5
