"""ferrotune.nn beside PEFT's layers and bitsandbytes' Linear4bit with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ferrotune.nn import Linear4bit, LoraLinear, LoraLinear4bit
from modules import (
    COLUMNS,
    ROWS,
    bnb_linear,
    dense,
    difference,
    inputs,
    peft_layer,
    randomised,
    run,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of a relative error in the norm: a few roundings of each type.
TOLERANCE = {F32: 1e-6, F16: 2e-3, BF16: 1.2e-2}
KINDS = [
    {},
    {"lora_bias": True},
    {"use_rslora": True, "r": 3},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_lora_linear_is_pefts(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    peft = randomised(peft_layer(dense(dtype=dtype), **settings))
    layer = LoraLinear(COLUMNS, ROWS, dtype=dtype, **{"r": 4, "lora_alpha": 12, **settings})
    assert layer.load_state_dict(peft.state_dict()).missing_keys == []
    x, weights = inputs(dtype)
    found, wanted = run(layer, x, weights), run(peft, x, weights)
    assert difference(found, wanted) < TOLERANCE[dtype]

    randomised(layer, seed=2)
    peft.load_state_dict(layer.state_dict())
    assert difference(run(peft, x, weights), run(layer, x, weights)) < TOLERANCE[dtype]
    own, theirs = layer.state_dict(), peft.state_dict()
    assert list(own) == list(theirs)
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("compute_dtype", [None, F32, BF16], ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_lora_linear_4bit_is_pefts(
    dtype: torch.dtype, compute_dtype: torch.dtype | None, quant_type: str, double_quant: bool
) -> None:
    options: dict[str, Any] = {"compute_dtype": compute_dtype, "quant_type": quant_type}
    base = bnb_linear(dense(dtype=dtype), double_quant=double_quant, **options)
    peft = randomised(peft_layer(base, lora_bias=True))
    layer = LoraLinear4bit(
        COLUMNS, ROWS, dtype=dtype, double_quant=double_quant,
        r=4, lora_alpha=12, lora_bias=True, **options,
    )  # fmt: skip
    layer.load_state_dict(peft.state_dict())
    x, weights = inputs(dtype)
    found, wanted = run(layer, x, weights), run(peft, x, weights)
    assert difference(found, wanted) < TOLERANCE[compute_dtype or dtype] + TOLERANCE[dtype]
    own, theirs = layer.state_dict(), peft.state_dict()
    assert own.keys() == theirs.keys()
    # bitsandbytes has cast its own bias to the type in which it computes.
    assert all(torch.equal(own[name].to(tensor.dtype), tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("compute_dtype", [None, BF16], ids=str)
def test_autocast_gives_pefts_types_and_precision(compute_dtype: torch.dtype | None) -> None:
    x, weights = inputs()
    four_bit = LoraLinear4bit(COLUMNS, ROWS, r=4, lora_alpha=12, compute_dtype=compute_dtype)
    pairs: list[tuple[Any, nn.Module]] = [
        (peft_layer(dense()), LoraLinear(COLUMNS, ROWS, r=4, lora_alpha=12)),
        (peft_layer(bnb_linear(dense(), compute_dtype=compute_dtype)), four_bit),
    ]
    for peft, layer in pairs:
        layer.load_state_dict(randomised(peft).state_dict())
        with torch.autocast("cpu", BF16):
            found, wanted = run(layer, x, weights), run(peft, x, weights)
        assert difference(found, wanted) < TOLERANCE[BF16]


def test_autocast_leaves_bitsandbytes_product_alone() -> None:
    x, _ = inputs()
    layer = LoraLinear4bit.from_linear(bnb_linear(dense()), r=4)  # whose B is zero
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert torch.equal(y, layer(x))


def test_initialisation_draws_what_peft_draws() -> None:
    for init in (True, "gaussian", False):
        options: dict[str, Any] = {"init_lora_weights": init, "lora_bias": init != "gaussian"}
        torch.manual_seed(3)
        peft = peft_layer(nn.Linear(COLUMNS, ROWS), **options)
        torch.manual_seed(3)
        layer = LoraLinear(COLUMNS, ROWS, r=4, lora_alpha=12, **options)
        theirs = peft.state_dict()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, theirs[name]), (init, name)


def test_adapter_types_are_pefts() -> None:
    for dtype in (F32, F16, BF16, torch.float64):
        layer = LoraLinear.from_linear(dense(dtype=dtype))
        wanted = torch.float64 if dtype == torch.float64 else F32
        assert layer.lora_A["default"].weight.dtype == wanted
    layer = LoraLinear.from_linear(dense(), adapter_dtype=BF16, adapter_name="other")
    assert layer.lora_B["other"].weight.dtype == BF16


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_merged_weights_are_pefts(dtype: torch.dtype) -> None:
    peft = randomised(peft_layer(dense(dtype=dtype), lora_bias=True))
    layer = LoraLinear(COLUMNS, ROWS, dtype=dtype, r=4, lora_alpha=12, lora_bias=True)
    layer.load_state_dict(peft.state_dict())
    layer.merge()
    peft.merge()
    assert torch.equal(layer.base_layer.weight, peft.base_layer.weight)
    assert layer.base_layer.bias.dtype == dtype
    torch.testing.assert_close(layer.base_layer.bias, peft.base_layer.bias, rtol=1e-6, atol=0)


@pytest.mark.parametrize("double_quant", [True, False])
def test_merged_4bit_codes_are_pefts(double_quant: bool) -> None:
    peft = randomised(peft_layer(bnb_linear(dense(), double_quant=double_quant)))
    layer = LoraLinear4bit.from_linear(copy.deepcopy(peft.base_layer), r=4, lora_alpha=12)
    randomised(layer)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, dict(layer.named_parameters())[name])
    layer.merge()
    with pytest.warns(UserWarning, match="rounding errors"):
        peft.merge()
    theirs = Linear4bit.from_linear(peft.base_layer)
    assert torch.equal(layer.base_layer.weight, theirs.weight)
    assert torch.equal(layer.base_layer.dequantize(), theirs.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, BF16, F32], ids=str)
def test_bitsandbytes_weight_is_not_copied(storage: torch.dtype) -> None:
    theirs = bnb_linear(dense(), quant_storage=storage)
    for layer in (
        Linear4bit.from_linear(theirs),
        LoraLinear4bit.from_linear(theirs).base_layer,
        Linear4bit.from_linear(Linear4bit.from_linear(theirs)),
    ):
        state = theirs.quant_state
        pairs = [
            (layer.weight, theirs.weight),
            (layer.absmax, state.absmax),
            (layer.nested_absmax, state.state2.absmax),
            (layer.nested_code, state.state2.code),
            (layer.nested_offset, state.offset),
            (layer.bias, theirs.bias),
        ]
        for own, other in pairs:
            assert own is not None
            assert own.data_ptr() == other.data_ptr()
            assert own.dtype == other.dtype
        x, weights = inputs()
        found, wanted = run(layer, x, weights), run(theirs.requires_grad_(False), x, weights)
        assert difference(found, {name: wanted[name] for name in found}) < 1e-6


@pytest.mark.parametrize("storage", [torch.uint8, BF16], ids=str)
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_4bit_state_dicts_both_ways(
    storage: torch.dtype, quant_type: str, double_quant: bool
) -> None:
    import bitsandbytes

    theirs = bnb_linear(dense(dtype=BF16), quant_type, double_quant, quant_storage=storage)
    saved = theirs.state_dict()
    layer = Linear4bit(COLUMNS, ROWS, dtype=BF16, quant_storage=storage)
    layer.load_state_dict(saved)
    own = layer.state_dict()
    assert own.keys() == saved.keys()
    for name, tensor in saved.items():
        assert own[name].dtype == tensor.dtype, name
        assert torch.equal(own[name].view(torch.uint8), tensor.view(torch.uint8)), name

    parts = {name.removeprefix("weight."): x for name, x in own.items() if "weight." in name}
    weight = bitsandbytes.nn.Params4bit.from_prequantized(own["weight"], parts, device="cpu")
    state = weight.quant_state
    assert (state.blocksize, state.nested, state.quant_type) == (64, double_quant, quant_type)
    values = bitsandbytes.functional.dequantize_4bit(weight.data, state)
    assert values.dtype == BF16
    assert torch.equal(values, layer.dequantize())


def test_quantised_as_bitsandbytes_quantises() -> None:
    for dtype in (F32, F16, BF16):
        source = dense(dtype=dtype)
        layer, theirs = Linear4bit.from_linear(source), bnb_linear(source)
        own, saved = layer.state_dict(), theirs.state_dict()
        assert all(torch.equal(own[name], saved[name]) for name in saved)


def test_unquantised_bitsandbytes_layer_is_quantised_by_its_settings() -> None:
    import bitsandbytes

    source = dense()
    theirs = bitsandbytes.nn.Linear4bit(
        COLUMNS, ROWS, quant_type="fp4", compress_statistics=False, compute_dtype=BF16
    )
    theirs.load_state_dict(source.state_dict())
    layer = Linear4bit.from_linear(theirs, quant_type="nf4", blocksize=128)
    assert (layer.quant_type, layer.double_quant, layer.blocksize) == ("fp4", False, 64)
    assert layer.compute_dtype == BF16
    wanted = bnb_linear(source, "fp4", double_quant=False)
    assert torch.equal(layer.weight, wanted.weight)
    assert torch.equal(layer.absmax, wanted.quant_state.absmax)


def test_weight_that_bitsandbytes_repacked_is_refused() -> None:
    theirs = bnb_linear(dense())
    theirs.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked this weight for its CPU inference"):
        Linear4bit.from_linear(theirs)


def test_truncated_bitsandbytes_weight_is_refused() -> None:
    theirs = bnb_linear(dense())
    theirs.weight.data = theirs.weight.data[:-1]
    with pytest.raises(ValueError, match="truncated"):
        LoraLinear4bit.from_linear(theirs)
