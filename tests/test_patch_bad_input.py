"""Models that cannot be patched: one clear error naming the layer, and nothing changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

import ferrotune
from ferrotune.patching import UnsupportedLayerError
from tiny_models import base_4bit_model, base_model, with_lora

LAYER = "base_model.model.model.layers.1.mlp.up_proj"


def refused(model: Any, error: type[Exception], *words: str, **options: Any) -> Exception:
    """Patches, expects the error, and that the model is as it was."""
    classes = [type(module) for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error) as caught:
        ferrotune.patch(model, **options)
    for word in words:
        assert word in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, tensors[name])
    return caught.value


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not str"):
        ferrotune.patch("model")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not dict"):
        ferrotune.unpatch({})


def test_no_lora_layers() -> None:
    words = "LlamaForCausalLM has no LoRA layers and no 4-bit layers: nothing to patch"
    refused(base_model("llama"), ValueError, words, "get_peft_model")


def test_another_method() -> None:
    config = IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
    model = get_peft_model(base_model("llama"), config)
    refused(model, ValueError, "no LoRA layers", "of another method than LoRA")


def test_merged_layer() -> None:
    model = with_lora(base_model("llama"))
    model.get_submodule(LAYER).merge()
    error = refused(model, ferrotune.PatchError, LAYER, "'default' is merged", "unmerge_adapter()")
    assert error.layers == (LAYER,)
    model.unmerge_adapter()
    assert not ferrotune.patch(model).left


def test_merging_after_patch_is_fine() -> None:
    model = with_lora(base_model("llama"))
    ferrotune.patch(model)
    model.merge_adapter()
    assert not ferrotune.patch(model).left
    model.unmerge_adapter()


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_unsupported_dtype(part: str) -> None:
    model = with_lora(base_model("llama"))
    weight = model.get_submodule(f"{LAYER}.{part}")
    weight.weight = nn.Parameter(weight.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    error = refused(model, NotImplementedError, LAYER, "is float8_e4m3fn", "float32, float16")
    assert isinstance(error, UnsupportedLayerError)
    assert isinstance(error, ValueError)


def test_meta_device() -> None:
    model = with_lora(base_model("llama"))
    model.get_submodule(LAYER).base_layer.to("meta")
    refused(model, NotImplementedError, LAYER, "base weight is on the meta device")


def to_another_device(model: PeftModel) -> None:
    layer = model.get_submodule(LAYER)
    layer.lora_B["default"].to("meta")


def wrong_a(model: PeftModel) -> None:
    layer = model.get_submodule(LAYER)
    layer.lora_A["default"].weight = nn.Parameter(torch.zeros(8, 60))


def wrong_b(model: PeftModel) -> None:
    layer = model.get_submodule(LAYER)
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(128, 7))


def wrong_base(model: PeftModel) -> None:
    layer = model.get_submodule(LAYER)
    layer.base_layer.weight = nn.Parameter(torch.zeros(128, 32), requires_grad=False)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (to_another_device, "lora_B['default'] is on the meta device"),
        (wrong_a, "lora_A['default'] has shape [8, 60], but [r, k] of this layer is [8, 64]"),
        (wrong_b, "lora_B['default'] has shape [128, 7], but [n, r] of this layer is [128, 8]"),
        (wrong_base, "base weight has shape [128, 32], but [n, k] of this layer is [128, 64]"),
    ],
)
def test_mismatched_layers(break_it: Callable[[PeftModel], None], words: str) -> None:
    model = with_lora(base_model("llama"))
    break_it(model)
    refused(model, ValueError, f"{LAYER}: {words}")


def truncate(layer: Any) -> None:
    layer.weight.data = layer.weight.data[:-1]


def truncate_absmax(layer: Any) -> None:
    state = layer.weight.quant_state
    state.absmax = state.absmax[:-1]


def truncate_nested(layer: Any) -> None:
    state = layer.weight.quant_state
    state.state2.absmax = state.state2.absmax[:0]


def change_blocksize(layer: Any) -> None:
    layer.weight.quant_state.blocksize = 128


def odd_blocksize(layer: Any) -> None:
    layer.weight.quant_state.blocksize = 48


def change_shape(layer: Any) -> None:
    layer.weight.quant_state.shape = torch.Size([64, 128])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (truncate, "packed bytes: 4095 of them"),
        (truncate_absmax, "absmax: 127 of them"),
        (truncate_nested, "nested absmax: 0 of them"),
        (change_blocksize, "absmax: 128 of them, but shape [128, 64] in blocks of 128 has 64"),
        (odd_blocksize, "blocksize must be one of"),
        (change_shape, "its 4-bit weight is [64, 128], but the layer is [128, 64]"),
    ],
)
@pytest.mark.parametrize("with_adapter", [True, False])
def test_broken_quant_states(
    break_it: Callable[[Any], None], words: str, with_adapter: bool, tmp_path: Path
) -> None:
    model = base_4bit_model("llama", torch.float32, tmp_path)
    name = LAYER if with_adapter else LAYER.removeprefix("base_model.model.")
    if with_adapter:
        model = with_lora(model)
    layer = model.get_submodule(name)
    break_it(layer.get_base_layer() if with_adapter else layer)
    with pytest.raises(ferrotune.PatchError) as caught:
        ferrotune.patch(model)
    assert str(caught.value).startswith(f"{name}: ")
    assert words in str(caught.value)
    assert ferrotune.unpatch(model) == 0


def test_4bit_weights_not_quantised_yet() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    refused(model, ValueError, "0: its weight is not quantised yet; move the model to its device")
    assert not ferrotune.patch(model.to("cpu")).left


def test_strict_names_what_would_be_left() -> None:
    model = with_lora(base_model("llama"), use_dora=True, target_modules=["q_proj"])
    error = refused(model, ferrotune.PatchError, "2 LoRA layers would keep PEFT's", strict=True)
    names = tuple(f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2))
    assert error.layers == names
    assert f"{names[0]}: adapter 'default' is DoRA" in str(error)
