"""Folders that transformers and bitsandbytes saved in 4 bits: the engine uses those very codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
from llamas import (
    batch,
    computing_in,
    edit_config,
    engine,
    largest,
    llama,
    load,
    reference,
    relative,
    save,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import torch
from bitsandbytes.functional import get_4bit_type
from safetensors.torch import load_file

# The in-features are multiples of 64: bitsandbytes 0.50's AVX-512 path dequantises wrongly where
# the last dimension is not a multiple of the blocksize. Others are in
# `test_rows_that_end_inside_a_block`.
WIDE = {"hidden_size": 128, "intermediate_size": 192}


def save_4bit(
    folder: Path,
    quant_type: str,
    double_quant: bool,
    dtype: str = "float32",
    shard: str | None = None,
    **sizes: Any,
) -> None:
    """Saves a model in 4 bits in `folder`, and the dense one it was made of beside it."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    dense = save(llama(**{**WIDE, **sizes}), folder.parent / "dense", dtype)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    model: Any = LlamaForCausalLM.from_pretrained(
        dense,
        quantization_config=how,
        dtype=getattr(torch, dtype),
        device_map="cpu",
        attn_implementation="sdpa",
    )
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    assert "quantization_config" in json.loads((folder / "config.json").read_text())


def dequantised(folder: Path, dtype: str = "float64") -> Any:
    """The folder as a dense model whose weights are codes × absmax, read key by key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    dense = {}
    for name, tensor in tensors.items():
        if (
            tensor.dtype != torch.uint8
            and ".absmax" not in name
            and "quant_map" not in name
            and "nested" not in name
        ):
            dense[name] = tensor.double()
    for name, packed in tensors.items():
        state_key = next(
            (k for k in tensors if k.startswith(f"{name}.quant_state.bitsandbytes__")), None
        )
        if state_key is None:
            continue
        state = json.loads(bytes(tensors[state_key].tolist()))
        absmax = tensors[f"{name}.absmax"]
        if absmax.dtype == torch.uint8:
            size = state["nested_blocksize"]
            scales = tensors[f"{name}.nested_absmax"].repeat_interleave(size)[: len(absmax)]
            absmax = (
                tensors[f"{name}.nested_quant_map"][absmax.long()] * scales + state["nested_offset"]
            )
        flat = packed.flatten().long()
        codes = torch.stack([flat >> 4, flat & 15], 1).flatten()[: np.prod(state["shape"])]
        codebook: Any = get_4bit_type(state["quant_type"], device="cpu")  # type: ignore[no-untyped-call]
        assert torch.equal(tensors[f"{name}.quant_map"], codebook)
        values = tensors[f"{name}.quant_map"][codes]
        scales = absmax.float().repeat_interleave(state["blocksize"])[: len(values)]
        dense[name] = (values * scales).reshape(state["shape"]).double()
    fields = json.loads((folder / "config.json").read_text())
    del fields["quantization_config"]
    fields["attn_implementation"] = "sdpa"
    model: Any = LlamaForCausalLM(LlamaConfig(**fields)).double()
    missing, unexpected = model.load_state_dict(dense, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if fields["tie_word_embeddings"] else [])
    return computing_in(model, dtype)


@pytest.mark.parametrize(
    ("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", False), ("fp4", True)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_4bit_folders(quant_type: str, double_quant: bool, dtype: str, tmp_path: Path) -> None:
    save_4bit(tmp_path / "4bit", quant_type, double_quant, dtype)
    data = batch(97, 2, 65, documents=[[30]])
    found = engine(tmp_path / "4bit", data)
    truth = reference(dequantised(tmp_path / "4bit"), data)
    assert largest(found.logits, truth.logits) <= 1e-4
    assert relative(found.logits, truth.logits) <= 1e-5
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    # Beside bitsandbytes as it runs over the same folder, which rounds weights to the stored type.
    # In training mode: in evaluation it computes in bfloat16 on processors that have it.
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(
        tmp_path / "4bit", device_map="cpu", attn_implementation="sdpa"
    )
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.float()
    theirs = reference(model.train(), data)
    bound = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    assert relative(found.logits, theirs.logits) <= bound
    assert found.loss == pytest.approx(theirs.loss, rel=bound)


@pytest.mark.parametrize("tie", [False, True])
def test_sharded_4bit_folders(tie: bool, tmp_path: Path) -> None:
    save_4bit(
        tmp_path / "4bit",
        "nf4",
        True,
        "bfloat16",
        "40KB",
        tie_word_embeddings=tie,
        attention_bias=True,
    )
    assert len(list((tmp_path / "4bit").glob("model-*.safetensors"))) > 2
    data = batch(97, 2, 33)
    found, truth = engine(tmp_path / "4bit", data), reference(dequantised(tmp_path / "4bit"), data)
    assert relative(found.logits, truth.logits) <= 1e-5


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_rows_that_end_inside_a_block(quant_type: str, double_quant: bool, tmp_path: Path) -> None:
    """In-features that are no multiple of the blocksize: blocks go on in the next row.

    bitsandbytes 0.50's own dequantisation is wrong here where it uses AVX-512, so the reference is
    codes × absmax.
    """
    save_4bit(
        tmp_path / "4bit",
        quant_type,
        double_quant,
        hidden_size=40,
        intermediate_size=52,
        head_dim=6,
    )
    data = batch(97, 2, 33)
    found, truth = engine(tmp_path / "4bit", data), reference(dequantised(tmp_path / "4bit"), data)
    assert relative(found.logits, truth.logits) <= 1e-5


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", True)])
def test_quantising_at_load_is_what_the_saved_folder_holds(
    quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    """`quant_type` on the dense folder gives the saved 4-bit folder's logits, bit for bit."""
    save_4bit(tmp_path / "4bit", quant_type, double_quant)
    data = batch(97, 2, 33)
    saved = engine(tmp_path / "4bit", data)
    loaded = engine(tmp_path / "dense", data, quant_type=quant_type)
    assert np.array_equal(saved.logits, loaded.logits)
    # What is 4-bit already stays as it was saved.
    assert np.array_equal(engine(tmp_path / "4bit", data, quant_type="nf4").logits, saved.logits)


def test_adapters_over_a_saved_4bit_folder(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    save_4bit(tmp_path / "4bit", "nf4", True)
    tuned = get_peft_model(
        dequantised(tmp_path / "4bit", "float32"), LoraConfig(r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    data = batch(97, 2, 33)
    base = dequantised(tmp_path / "4bit")
    adapter = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    truth = reference(computing_in(adapter, "float64"), data)
    found = engine(tmp_path / "4bit", data, adapter=tmp_path / "adapter")
    assert largest(found.logits, truth.logits) <= 1e-4
    for name, gradient in found.gradients.items():
        expected = truth.gradients["base_model.model." + name.replace(".weight", ".default.weight")]
        assert relative(gradient, expected) <= 1e-5, name
    # Merging dequantises: the folder is dense and says so.
    merged = ferrotune.merge(
        tmp_path / "4bit", tmp_path / "adapter", tmp_path / "merged", dtype="float32"
    )
    assert "quantization_config" not in json.loads((merged.output / "config.json").read_text())
    assert relative(reference(load(merged.output), data).logits, truth.logits) <= 1e-5


def test_full_training_of_a_4bit_folder_is_refused(tmp_path: Path) -> None:
    save_4bit(tmp_path / "4bit", "nf4", True)
    with pytest.raises(
        ValueError,
        match=r"dense weights, but model\.layers\.0\.self_attn\.q_proj is stored in 4 bits",
    ):
        engine(tmp_path / "4bit", batch(97, 1, 3), full=True)


def test_a_missing_part_of_the_quant_state_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_4bit(tmp_path / "4bit", "nf4", True)
    path = tmp_path / "4bit" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ferrotune.FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*nested_absmax"
    ):
        engine(tmp_path / "4bit", batch(97, 1, 3))


def test_8bit_folders_are_refused_by_name(tmp_path: Path) -> None:
    save(llama(**WIDE), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(
        tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    )
    with pytest.raises(
        (ValueError, NotImplementedError), match=r"model\.layers\.0\.self_attn\.q_proj\.weight.*I8"
    ):
        engine(tmp_path, batch(97, 1, 3))
