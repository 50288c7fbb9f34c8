"""ferrotune.patch on models in bitsandbytes' 4 bits."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

import ferrotune
from side_by_side import assert_agree, both, counted, step
from tiny_models import base_4bit_model, batch, fill_lora_b, with_lora


class Two(nn.Module):
    """Two 4-bit layers without a model library around them.

    Rows are whole blocks: bitsandbytes' CPU code mixes up the absmax of others.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = bnb.nn.Linear4bit(64, 128, **options)
        self.second = bnb.nn.Linear4bit(128, 32, bias=False, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return found


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_plain_4bit_layers(quant_type: str, double_quant: bool, storage: torch.dtype) -> None:
    options = {"quant_type": quant_type, "compress_statistics": double_quant}
    model = Two(quant_storage=storage, compute_dtype=torch.float32, **options).to("cpu")
    x = torch.randn(5, 3, 64, requires_grad=True)
    with counted() as counts:
        stock, patched, report = both(model, x)
    assert counts == {None: 2}
    assert report.counts("4-bit") == (2, 2)
    assert f"Linear4bit {quant_type}" in str(report)
    assert_agree(stock, patched)
    assert ferrotune.unpatch(model) == 2
    assert type(model.first) is bnb.nn.Linear4bit


def test_the_packed_weight_is_read_where_it_lies() -> None:
    model = Two(quant_type="nf4").to("cpu")
    weight = model.first.weight
    places = (weight.data_ptr(), weight.quant_state.absmax.data_ptr())
    ferrotune.patch(model)
    model(torch.randn(4, 64))
    assert model.first.weight is weight
    assert (weight.data_ptr(), weight.quant_state.absmax.data_ptr()) == places
    assert set(model.state_dict()) >= {"first.weight", "first.weight.absmax"}


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_compute_dtypes(
    inputs: torch.dtype, compute: torch.dtype | None, with_adapter: bool
) -> None:
    model: nn.Module = Two(quant_type="nf4", compute_dtype=compute).to("cpu")
    if with_adapter:
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], lora_dropout=0.2)
        model = get_peft_model(model, config)  # type: ignore[arg-type,assignment]
        fill_lora_b(model)
    x = torch.randn(5, 64).to(inputs)
    stock, patched, report = both(model, x)
    assert not report.left
    lowest = max(inputs, compute or inputs, key=lambda dtype: torch.finfo(dtype).eps)
    assert_agree(stock, patched, lowest)


def test_qlora_of_a_loaded_model(tmp_path: Path) -> None:
    base = base_4bit_model("llama", torch.bfloat16, tmp_path)
    base = prepare_model_for_kbit_training(
        base, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = with_lora(base, lora_dropout=0.1)
    model.train()
    with counted() as counts:
        stock, patched, report = both(model, batch("llama"))
    assert set(counts) == {None}
    assert report.counts("LoRA") == (14, 14)
    assert report.counts("4-bit") == (0, 0)  # told with the LoRA layers above them
    assert_agree(stock, patched, torch.bfloat16)
    with counted() as counts, model.disable_adapter():
        step(model, batch("llama"))
    assert counts["its adapters are disabled"] == counts[None]  # the base is ferrotune's still
    assert ferrotune.unpatch(model) == 28


def test_4bit_layers_beside_lora(tmp_path: Path) -> None:
    base = base_4bit_model("llama", torch.float32, tmp_path)
    model = with_lora(base, target_modules=["q_proj", "v_proj"])
    stock, patched, report = both(model, batch("llama"))
    assert report.counts("LoRA") == (4, 4)
    assert report.counts("4-bit") == (10, 10)
    assert str(report).startswith("ferrotune runs 4 of 4 LoRA layers and 10 of 10 4-bit layers")
    assert_agree(stock, patched)


def test_dora_over_4bit_layers(tmp_path: Path) -> None:
    base = base_4bit_model("llama", torch.float32, tmp_path)
    model = with_lora(base, target_modules=["q_proj"], use_dora=True)
    stock, patched, report = both(model, batch("llama"))
    assert report.counts("LoRA") == (0, 2)
    assert report.counts("4-bit") == (14, 14)  # under the DoRA layers too
    assert_agree(stock, patched)


def test_8bit_layers_stay_pefts() -> None:
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), nn.Linear(64, 8))
    model.is_loaded_in_8bit = True  # type: ignore[assignment]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"]))  # type: ignore[arg-type]
    report = ferrotune.patch(peft_model)
    assert report.counts("LoRA") == (1, 2)
    assert report.left[0].reason == (
        "lora.Linear8bitLt is an 8-bit layer that ferrotune has no forward for"
    )


def test_weights_repacked_by_bitsandbytes_stay_its_own() -> None:
    model = Two(quant_type="nf4").to("cpu")
    model.first.weight.quant_state.packing_format_for_cpu = True
    report = ferrotune.patch(model)
    assert [row.name for row in report.left] == ["first"]
    assert report.left[0].reason == "bitsandbytes repacked its weight for inference on this CPU"


def test_merge_of_4bit(tmp_path: Path) -> None:
    models = [with_lora(base_4bit_model("llama", torch.float32, tmp_path)) for _ in range(2)]
    ferrotune.patch(models[0])
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
        ours, stock = (model.merge_and_unload() for model in models)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])
