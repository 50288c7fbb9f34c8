"""ferrotune.nn's layers as ordinary modules."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ferrotune import ops
from ferrotune.nn import Linear4bit, LoraLinear, LoraLinear4bit
from modules import COLUMNS, ROWS, dense, difference, inputs, randomised, run

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PARTS = ("weight", "absmax", "nested_absmax", "nested_code", "nested_offset")


def lora(**options: Any) -> Any:
    return randomised(LoraLinear(COLUMNS, ROWS, **{"r": 4, "lora_alpha": 12, **options}))


def lora_4bit(**options: Any) -> Any:
    return randomised(LoraLinear4bit(COLUMNS, ROWS, **{"r": 4, "lora_alpha": 12, **options}))


def four_bit(**options: Any) -> Any:
    torch.manual_seed(0)
    return Linear4bit(COLUMNS, ROWS, **options)


MAKERS = [lora, lora_4bit, four_bit]
ADAPTED = [lora, lora_4bit]


def saved(layer: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    return stream


def parts(layer: Linear4bit) -> list[torch.Tensor | None]:
    """Copies of the weight's parts, the codes as bytes."""
    found = [getattr(layer, name) for name in PARTS]
    found[0] = found[0].data.view(torch.uint8)
    return [None if part is None else part.clone() for part in found]


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def test_forward_is_the_formula() -> None:
    x, _ = inputs()
    for make in ADAPTED:
        layer = make(lora_bias=True, use_rslora=True)
        weight = layer.base_layer.weight if make is lora else layer.base_layer.dequantize()
        up = layer.lora_B["default"]
        term = x.double() @ layer.lora_A["default"].weight.double().t() @ up.weight.double().t()
        wanted = x.double() @ weight.double().t() + layer.base_layer.bias.double()
        wanted += 12 / 4**0.5 * (term + up.bias.double())
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_trained_are_the_adapters_alone() -> None:
    for make in ADAPTED:
        trained = [name for name, p in make(lora_bias=True).named_parameters() if p.requires_grad]
        assert trained == [
            "lora_A.default.weight",
            "lora_B.default.weight",
            "lora_B.default.bias",
        ]


@pytest.mark.parametrize("make", ADAPTED)
def test_training_lowers_the_loss(make: Any) -> None:
    layer = make(lora_dropout=0.1)
    x, wanted = inputs()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(layer(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_base_weight_that_is_trained_gets_its_gradient() -> None:
    layer = lora()
    x, weights = inputs()
    frozen = run(layer, x, weights)
    layer.base_layer.requires_grad_(True)
    found = run(layer, x, weights)
    assert difference({name: found[name] for name in frozen}, frozen) < 1e-6
    wanted = weights.flatten(0, 1).t() @ x.flatten(0, 1)
    torch.testing.assert_close(found["base_layer.weight"], wanted)
    torch.testing.assert_close(found["base_layer.bias"], weights.sum((0, 1)))


def test_bias_of_linear_4bit_is_trained() -> None:
    x, weights = inputs(BF16)
    found = run(four_bit(), x, weights)
    assert found["bias"].dtype == F32
    assert found["x"].dtype == BF16
    wanted = weights.bfloat16().float().sum((0, 1))  # y's gradient, rounded once more when summed
    torch.testing.assert_close(found["bias"], wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("make", MAKERS)
def test_empty_and_flat_inputs(make: Any) -> None:
    layer = make()
    assert layer(torch.empty(0, COLUMNS)).shape == (0, ROWS)
    x = inputs()[0][0, 0]
    torch.testing.assert_close(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("storage", [torch.uint8, BF16, F32], ids=str)
def test_to_keeps_the_4bit_weight(storage: torch.dtype) -> None:
    for layer in (lora_4bit(quant_storage=storage), four_bit(quant_storage=storage)):
        base = getattr(layer, "base_layer", layer)
        before, values = parts(base), base.dequantize()
        steps: list[Any] = [
            lambda module: module.to(BF16),
            lambda module: module.half(),
            lambda module: module.double(),
            lambda module: module.type(BF16),
            lambda module: module.to("cpu", F32),
        ]
        for step in steps:
            assert step(layer) is layer
            assert equal(parts(base), before)
            assert torch.equal(base.dequantize(), values)
            assert base.weight.dtype == storage
        assert base.bias.dtype == F32
        assert layer.to(BF16)(inputs(BF16)[0]).dtype == BF16
        assert base.bias.dtype == BF16


@pytest.mark.parametrize("make", MAKERS)
def test_from_meta_by_assignment(make: Any) -> None:
    x, _ = inputs()
    layer, empty = make(), make(device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))
    made = make(device="meta").to_empty(device="cpu")
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x), layer(x))


@pytest.mark.parametrize("make", MAKERS)
def test_deepcopy_shares_nothing(make: Any) -> None:
    layer = make()
    x, _ = inputs()
    y = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), y)
    own = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    assert not own & {tensor.data_ptr() for tensor in (*other.parameters(), *other.buffers())}
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("make", MAKERS)
def test_pickle(make: Any) -> None:
    layer = make()
    x, _ = inputs()
    loaded = torch.load(saved(layer), weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    known = [
        type(layer), Linear4bit, nn.Linear, nn.ModuleDict,
        set,
    ]  # fmt: skip
    with torch.serialization.safe_globals(known):
        assert torch.equal(torch.load(saved(layer), weights_only=True)(x), layer(x))
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = make(bias=True)
    randomised(other, seed=9)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_state_dict_in_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(lora_4bit(), nn.Linear(ROWS, COLUMNS), lora_4bit(init_lora_weights=False))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = nn.Sequential(lora_4bit(), nn.Linear(ROWS, COLUMNS), lora_4bit())
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x, _ = inputs()
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("make", ADAPTED)
def test_merge_and_unmerge(make: Any, dtype: torch.dtype) -> None:
    for bias in (True, False):
        layer = make(dtype=dtype, lora_bias=True, lora_dropout=0.5, bias=bias).eval()
        x, _ = inputs(dtype)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        y = layer(x)
        layer.merge(safe_merge=True)
        assert layer.merged
        assert "merged" in repr(layer)
        # A dense weight is rounded to its type; a 4-bit one is quantised again.
        bound = {F32: 1e-5, F16: 5e-3, BF16: 3e-2}[dtype] if make is lora else 0.2
        assert (layer(x).float() - y.float()).norm() / y.float().norm() < bound
        assert layer(x).dtype == dtype
        with pytest.raises(RuntimeError, match="merged already"):
            layer.merge()
        with pytest.raises(RuntimeError, match="unmerge"):
            layer.load_state_dict(before)
        layer.unmerge()
        after = layer.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(layer(x), y)
        with pytest.raises(RuntimeError, match="not merged"):
            layer.unmerge()


@pytest.mark.parametrize("make", ADAPTED)
def test_merged_layer_is_copied_moved_and_pickled(make: Any) -> None:
    layer = make()
    x, _ = inputs()
    y = layer(x)
    layer.merge()
    merged = layer(x)
    for other in (copy.deepcopy(layer), torch.load(saved(layer), weights_only=False)):
        assert torch.equal(other(x), merged)
        other.unmerge()
        assert torch.equal(other(x), y)
    layer.to(BF16)
    layer.unmerge()
    assert layer(x.to(BF16)).dtype == BF16


def test_merge_of_an_adapter_that_is_not_finite() -> None:
    for make in ADAPTED:
        layer = make()
        with torch.no_grad():
            layer.lora_B["default"].weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="'default' has values that are not finite"):
            layer.merge(safe_merge=True)
        assert not layer.merged


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", ADAPTED)
def test_gradient_checkpointing_draws_the_same_masks(make: Any, reentrant: bool) -> None:
    layer = make(lora_dropout=0.3)
    x, weights = inputs()
    torch.manual_seed(5)
    wanted = run(layer, x, weights)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    torch.manual_seed(5)
    found = run(Checkpointed(), x, weights)
    found = {name.removeprefix("layer."): tensor for name, tensor in found.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_dropout_is_for_training_alone() -> None:
    for make in ADAPTED:
        plain, dropping = make(), make(lora_dropout=0.5)
        dropping.load_state_dict(plain.state_dict())
        x, _ = inputs()
        assert not torch.equal(dropping(x), plain(x))
        assert not torch.equal(dropping(x), dropping(x))
        assert torch.equal(dropping.eval()(x), plain(x))


def test_autocast() -> None:
    x, _ = inputs()
    with torch.autocast("cpu", BF16):
        assert lora()(x).dtype == BF16
        # As bitsandbytes' Linear4bit, which gives back x's type.
        assert lora_4bit()(x).dtype == F32
        assert four_bit()(x).dtype == F32


@pytest.mark.parametrize("make", MAKERS)
def test_compiles_as_one_graph_once(make: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    layer = make(**({} if make is four_bit else {"lora_dropout": 0.2, "lora_bias": True}))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x, weights = inputs()
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = run(layer, x, weights)
        torch.manual_seed(seed)
        found = run(compiled, x, weights)
        found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
        assert difference(found, wanted) < 1e-6
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.9)
    assert counter.frame_count == 1


def test_dense_state_dict_is_quantised() -> None:
    source = dense()
    layer = four_bit(blocksize=128, double_quant=False)
    layer.load_state_dict(source.state_dict())
    wanted = ops.quantize_4bit(source.weight, blocksize=128, double_quant=False)
    assert torch.equal(layer.dequantize(), ops.dequantize_4bit(wanted))
    empty = four_bit(device="meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), Linear4bit.from_linear(source).dequantize())


def test_state_dict_of_other_settings_is_taken_with_them() -> None:
    source = four_bit(quant_type="fp4", blocksize=32, double_quant=False, dtype=BF16)
    layer = four_bit(quant_storage=BF16)
    layer.load_state_dict(source.state_dict())
    assert (layer.quant_type, layer.blocksize, layer.double_quant) == ("fp4", 32, False)
    assert layer.dtype == BF16
    assert layer.weight.dtype == BF16
    x, _ = inputs()
    y = source(x)
    assert torch.equal(layer(x), y)
    with torch.no_grad():
        layer.absmax.zero_()
    assert torch.equal(source(x), y), "the layers share tensors"


def test_layers_that_share_a_weight_are_loaded_together() -> None:
    one = four_bit()
    other = Linear4bit.from_linear(one)
    fresh = Linear4bit(COLUMNS, ROWS)
    one.load_state_dict(fresh.state_dict())
    assert torch.equal(other.dequantize(), fresh.dequantize())


def broken(change: Any) -> dict[str, Any]:
    state = dict(four_bit().state_dict())
    change(state)
    return state


JSON = "weight.quant_state.bitsandbytes__nf4"
BROKEN: dict[str, Any] = {
    "truncated": lambda s: s.update(weight=s["weight"][:-1]),
    r"lacks the tensors \['nested_absmax'\]": lambda s: s.pop("weight.nested_absmax"),
    "nested absmax: 3 of them": lambda s: s.update({"weight.nested_absmax": torch.ones(3)}),
    "quant_map is not that of nf4": lambda s: s["weight.quant_map"].mul_(1.1),
    "needs one tensor 'quant_state": lambda s: s.pop(JSON),
    "is not a quant state in JSON": lambda s: s.update({JSON: s[JSON][:-4]}),
    "that no 4-bit weight has: ": lambda s: s.update({"weight.SCB": torch.ones(1)}),
    r"has shape \[48, 64\]": lambda s: s.update(Linear4bit(64, ROWS).state_dict()),
}


@pytest.mark.parametrize("message", BROKEN)
def test_state_dict_that_does_not_fit(message: str) -> None:
    model = nn.Sequential(four_bit())
    before, state = parts(model[0]), broken(BROKEN[message])
    with pytest.raises(RuntimeError, match=f"0.weight: .*{message}"):
        model.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert equal(parts(model[0]), before)


def test_missing_and_unexpected_keys_are_named() -> None:
    layer = four_bit()
    state = layer.state_dict()
    without = {name: x for name, x in state.items() if name != "bias"}
    found = layer.load_state_dict({**without, "other": state["bias"]}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["bias"], ["other"])
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": state["bias"]})


def test_bytes_that_were_cast_as_numbers_are_noticed() -> None:
    layer = four_bit()
    layer.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
    with pytest.raises(TypeError, match=r"construct the layer with quant_storage=torch\.float32"):
        layer(inputs()[0])


def test_bad_arguments() -> None:
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "r must be 1 or more, not 0", lambda: LoraLinear(4, 4, r=0)),
        (ValueError, "lora_dropout must be in", lambda: LoraLinear(4, 4, lora_dropout=1.5)),
        (ValueError, "init_lora_weights", lambda: LoraLinear(4, 4, init_lora_weights="pissa")),  # type: ignore[arg-type]
        (ValueError, "blocksize must be one of", lambda: Linear4bit(4, 4, blocksize=48)),
        (ValueError, "blocksize must be one of", lambda: Linear4bit(4, 4, blocksize=0)),
        (ValueError, "quant_type must be", lambda: LoraLinear4bit(4, 4, quant_type="int4")),
        (ValueError, "needs features", lambda: Linear4bit(0, 4)),
        (TypeError, "dtype must be float32", lambda: Linear4bit(4, 4, dtype=torch.float64)),
        (TypeError, "compute_dtype must", lambda: Linear4bit(4, 4, compute_dtype=torch.int8)),
        (TypeError, "quant_storage must", lambda: Linear4bit(4, 4, quant_storage=torch.int8)),
        (TypeError, "takes an nn.Linear", lambda: LoraLinear.from_linear(nn.Conv1d(1, 1, 1))),  # type: ignore[arg-type]
        (TypeError, "not torch.nn.modules", lambda: Linear4bit.from_linear(nn.Embedding(2, 2))),
        (ValueError, "x has shape", lambda: lora()(torch.ones(2, 3))),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_from_linear_wraps_the_layer_itself() -> None:
    source = dense()
    layer = LoraLinear.from_linear(source, r=2, lora_alpha=4)
    assert layer.base_layer is source
    assert not source.weight.requires_grad
    assert layer.scaling == 2
    assert not LoraLinear.from_linear(source.eval()).training
    base = four_bit()
    assert LoraLinear4bit.from_linear(base).base_layer.weight.data_ptr() == base.weight.data_ptr()


def test_repr() -> None:
    text = repr(lora_4bit(compute_dtype=BF16, use_rslora=True))
    assert "r=4, lora_alpha=12, scaling=6, lora_dropout=0.0, use_rslora=True" in text
    assert (
        "in_features=128, out_features=48, bias=True, quant_type='nf4', blocksize=64, "
        "double_quant=True, compute_dtype=torch.bfloat16" in text
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("make", ADAPTED)
def test_hooks_of_the_modules_inside_are_called(make: Any, dtype: torch.dtype) -> None:
    layer = make(dtype=dtype, lora_bias=True, lora_dropout=0.3)
    x, weights = inputs(dtype)
    torch.manual_seed(5)
    wanted = run(layer, x, weights)
    called: list[str] = []
    for name in ("base_layer", "lora_A.default", "lora_B.default"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    torch.manual_seed(5)
    found = run(layer, x, weights)
    assert called == ["base_layer", "lora_A.default", "lora_B.default"]
    assert difference(found, wanted) < {F32: 1e-6, BF16: 1.2e-2}[dtype]
