"""Patched models under torch.compile, and processes that import in any order."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ferrotune
from python_face import environment
from side_by_side import assert_agree, step
from tiny_models import base_4bit_model, base_model, batch, with_lora


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["dense", "4bit"])
def test_one_graph_for_all_steps(quant: str, tmp_path: Path) -> None:
    """No graph break, and no recompilation from step to step; dropout is on."""
    import torch._dynamo as dynamo

    base: Any = (
        base_4bit_model("llama", torch.bfloat16, tmp_path)
        if quant == "4bit"
        else base_model("llama").train()
    )
    model = with_lora(base, lora_dropout=0.1)
    ferrotune.patch(model, strict=True)
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        inputs = batch("llama", seed=seed)
        found = {name.replace("_orig_mod.", ""): t for name, t in step(compiled, inputs).items()}
        dtype = torch.bfloat16 if quant == "4bit" else torch.float32
        assert_agree(step(model, inputs), found, dtype)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout


def test_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import ferrotune\n"
        "for name in ('patch', 'verify', 'TrainerCallback'):\n"
        "    try: getattr(ferrotune, name)\n"
        "    except ImportError as error: print(error)"
    )
    said = run(code).splitlines()
    assert (
        said
        == ["ferrotune.patch and ferrotune.verify need PyTorch: pip install 'ferrotune[torch]'"] * 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ferrotune", "peft"])
def test_any_import_order(first: str) -> None:
    """Importing imports none of the libraries, and changes none of them."""
    code = f"""
import sys
first = {first!r}
if first == "ferrotune":
    import ferrotune.patching
    assert not {{"peft", "bitsandbytes", "transformers"}} & set(sys.modules)
import torch, peft, bitsandbytes
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.bnb import Linear4bit
classes = (Linear, Linear4bit, bitsandbytes.nn.Linear4bit, torch.nn.Linear)
before = [(cls, cls.forward, cls.__subclasses__()) for cls in classes]
if first == "peft":
    import ferrotune.patching
assert [(cls, cls.forward, cls.__subclasses__()) for cls in classes] == before
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))
print(repr(ferrotune.patch(model)))
"""
    assert run(code).strip() == "<PatchReport: ferrotune runs 2 of 2 LoRA layers>"
