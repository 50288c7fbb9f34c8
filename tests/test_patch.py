"""ferrotune.patch: what it changes and what it does not."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn

import ferrotune
from side_by_side import assert_agree, both, counted, step
from tiny_models import VOCABULARY, base_4bit_model, base_model, batch, fill_lora_b, with_lora


@pytest.fixture
def model() -> PeftModel:
    return with_lora(base_model("llama"))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def test_report_names_every_layer(model: PeftModel) -> None:
    report = ferrotune.patch(model, strict=True)
    assert [layer.name for layer in report.layers] == list(layers(model))
    assert report
    assert not report.left
    assert report.counts("LoRA") == (14, 14)
    text = str(report)
    assert text.startswith("ferrotune runs 14 of 14 LoRA layers\n")
    assert "2  base_model.model.model.layers.*.self_attn.q_proj" in text
    assert "default r=8" in text
    assert "lora.Linear on Linear float32" in text
    assert report._repr_html_().count("<tr>") == 14
    assert repr(report) == "<PatchReport: ferrotune runs 14 of 14 LoRA layers>"
    assert len(report.as_dict()["layers"]) == 14
    assert [block.name for block in report.blocks if block.kind == "MLP"] == [
        f"base_model.model.model.layers.{i}.mlp" for i in range(2)
    ]
    assert not ferrotune.patch(with_lora(base_model("llama")), blocks=False).blocks


def test_nothing_but_the_forward_changes(model: PeftModel, tmp_path: Path) -> None:
    before = {
        "repr": repr(model),
        "names": [name for name, _ in model.named_modules()],
        "keys": list(model.state_dict()),
        "trainable": model.get_nb_trainable_parameters(),
    }
    model.save_pretrained(tmp_path / "stock")
    ferrotune.patch(model)
    after = {
        "repr": repr(model),
        "names": [name for name, _ in model.named_modules()],
        "keys": list(model.state_dict()),
        "trainable": model.get_nb_trainable_parameters(),
    }
    assert before == after
    for layer in layers(model).values():
        assert isinstance(layer, lora.Linear)
        assert type(layer).__name__ == "Linear"
        assert layer.__dict__.keys() == lora_attributes()
    model.save_pretrained(tmp_path / "patched")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        stock, patched = ((tmp_path / kind / name).read_bytes() for kind in ("stock", "patched"))
        assert len(stock) == len(patched)
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "patched")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def lora_attributes() -> Any:
    return next(iter(layers(with_lora(base_model("llama"))).values())).__dict__.keys()


def test_unpatch_restores_the_classes(model: PeftModel) -> None:
    classes = [type(module) for module in model.modules()]
    assert ferrotune.unpatch(model) == 0
    ferrotune.patch(model)
    assert [type(module) for module in model.modules()] != classes
    assert ferrotune.unpatch(model) == 14
    assert [type(module) for module in model.modules()] == classes
    with counted() as counts:
        model(**batch("llama"))
    assert not counts


def test_patch_is_idempotent_and_takes_up_new_layers(model: PeftModel) -> None:
    first = ferrotune.patch(model)
    classes = [type(module) for module in model.modules()]
    assert ferrotune.patch(model) == first
    assert [type(module) for module in model.modules()] == classes
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    report = ferrotune.patch(model)
    assert report.counts("LoRA") == (15, 15)
    assert ferrotune.unpatch(model) == 15


def test_only_this_model_changes(model: PeftModel) -> None:
    other = with_lora(base_model("llama"))
    ferrotune.patch(model)
    with counted() as counts:
        other(**batch("llama"))
    assert not counts
    assert type(next(iter(layers(other).values()))) is lora.Linear


def test_a_part_of_a_model_can_be_patched(model: PeftModel) -> None:
    layer = next(iter(layers(model).values()))
    report = ferrotune.patch(layer)
    assert [row.name for row in report.layers] == ["(the model itself)"]
    assert ferrotune.unpatch(model) == 1


def test_copies_and_pickles_stay_patched(model: PeftModel) -> None:
    ferrotune.patch(model)
    inputs = batch("llama")
    expected = step(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with counted() as counts:
            found = step(twin, inputs)
        assert counts == {None: 14}
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert ferrotune.unpatch(twin) == 14
        assert type(next(iter(layers(twin).values()))) is lora.Linear


def test_merge_and_unload(model: PeftModel) -> None:
    merged = copy.deepcopy(model).merge_and_unload()
    ferrotune.patch(model)
    ours = model.merge_and_unload()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.2},
        {"rank_pattern": {"q_proj": 3, "mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 7}},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.(gate|o)_proj", "modules_to_save": ["lm_head"]},
    ],
    ids=["plain", "rslora-dropout", "patterns", "subset", "regex-modules-to-save"],
)
def test_options_of_lora(options: dict[str, Any]) -> None:
    model = with_lora(base_model("llama"), **options)
    stock, patched, report = both(model, batch("llama"))
    assert not report.left
    assert_agree(stock, patched)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_biases(bias: str, lora_bias: bool) -> None:
    if lora_bias and bias != "none":
        pytest.skip("PEFT allows one of them")
    model = with_lora(
        base_model("qwen2"), bias=bias, lora_bias=lora_bias, target_modules=["q_proj"]
    )
    stock, patched, report = both(model, batch("qwen2"))
    assert not report.left
    assert_agree(stock, patched)
    trained = [name for name in stock if "bias" in name]
    assert bool(trained) == (bias != "none" or lora_bias)


def two_adapters(dropout: float = 0.0) -> PeftModel:
    model = with_lora(base_model("llama"), lora_dropout=dropout)
    config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], lora_dropout=dropout / 2)
    model.add_adapter("second", config)
    fill_lora_b(model)
    return model


def test_set_adapter_and_disable_adapter() -> None:
    model = two_adapters()
    inputs = batch("llama")
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        stock, patched, report = both(model, inputs)
        assert not report.left
        assert_agree(stock, patched)
    with counted() as counts, model.disable_adapter():
        ours = step(model, inputs)
    assert counts == {"its adapters are disabled": 14}
    ferrotune.unpatch(model)
    with model.disable_adapter():
        assert torch.equal(step(model, inputs)["logits"], ours["logits"])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_several_active_adapters(dropout: float) -> None:
    model = two_adapters(dropout)
    model.base_model.set_adapter(["default", "second"])
    stock, patched, _ = both(model, batch("llama"))
    assert any("second" in name for name in stock)
    assert_agree(stock, patched)


def test_adapters_in_another_dtype_than_the_base() -> None:
    """PEFT keeps adapters in f32 above a bf16 base, and casts the input up."""
    model = with_lora(base_model("llama", torch.bfloat16))
    assert model.get_parameter(next(n for n, _ in model.named_parameters() if "lora_A" in n)).dtype
    stock, patched, _ = both(model, batch("llama"))
    assert_agree(stock, patched, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    stock, patched, _ = both(model, batch("llama"))
    assert_agree(stock, patched, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, tmp_path: Path) -> None:
    def cast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    for base in (base_model("llama", dtype), base_4bit_model("llama", dtype, tmp_path)):
        model = with_lora(base, lora_dropout=0.1)
        with counted() as counts:
            stock, patched, _ = both(model, batch("llama"), cast)
        assert counts == {None: 14}
        assert_agree(stock, patched, torch.bfloat16)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    base = base_model("llama")
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    model = with_lora(base, lora_dropout=0.2)
    model.train()
    stock, patched, _ = both(model, batch("llama"))
    assert_agree(stock, patched)
    base.gradient_checkpointing_disable()
    with_all_saved = step(model, batch("llama"))
    for name, tensor in with_all_saved.items():
        assert torch.equal(tensor, step(model, batch("llama"))[name])


def test_inference(model: PeftModel) -> None:
    model.eval()
    inputs = batch("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
        ids = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False)
        ferrotune.patch(model)
        assert_agree({"logits": expected}, {"logits": model(**inputs).logits})
        again = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, again)


def test_trained_base_weight_gets_its_gradient(model: PeftModel) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    layer.base_layer.weight.requires_grad_(True)
    stock, patched, report = both(model, batch("llama"))
    assert f"gradient of {name}.base_layer.weight" in stock
    assert_agree(stock, patched)
    row = next(row for row in report.layers if row.name == name)
    assert row.note == (
        "its base layer is trained, so it runs by itself; the LoRA term is ferrotune's"
    )


def test_hooks_fire_as_before(model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    ferrotune.patch(model)
    fired: list[str] = []
    attention = model.base_model.model.model.layers[0].self_attn

    def hook(name: str) -> Any:
        return lambda *_: fired.append(name)

    attention.q_proj.register_forward_hook(hook("layer"))
    attention.k_proj.base_layer.register_forward_hook(hook("base"))
    attention.v_proj.lora_A["default"].register_forward_pre_hook(hook("lora_A"))
    attention.o_proj.lora_B["default"].register_full_backward_hook(hook("lora_B"))
    with counted() as counts:
        found = step(model, batch("llama"))
    assert fired == ["layer", "base", "lora_A", "lora_B"]
    assert counts[None] == 12
    assert "lora_A['default'] has hooks" in caplog.text
    report = ferrotune.patch(model)
    notes = {row.name.rsplit(".", 1)[1]: row for row in report.layers if ".0.self_attn" in row.name}
    assert "runs by itself" in (notes["k_proj"].note or "")
    assert notes["v_proj"].reason == "lora_A['default'] has hooks or a forward of its own"
    ferrotune.unpatch(model)
    assert_agree(step(model, batch("llama")), found)


def test_transforms_of_torch_func_go_to_peft(model: PeftModel) -> None:
    layer: Any = next(iter(layers(model).values()))
    x = torch.randn(4, 64)
    expected = torch.func.vmap(layer)(x)
    ferrotune.patch(model)
    with counted() as counts:
        assert torch.equal(torch.func.vmap(layer)(x), expected)
    assert counts == {"a transform of torch.func is active": 1}


def test_tracing_and_forward_mode_go_to_peft(model: PeftModel) -> None:
    from torch.autograd import forward_ad

    layer: Any = next(iter(layers(model).values()))
    x = torch.randn(4, 64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
        ferrotune.patch(model)
        with counted() as counts:
            found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
    assert counts == {"forward-mode differentiation is active": 1}
    assert torch.equal(found, tangent)
    with counted() as counts:
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert counts == {"torch.jit traces the model": 1}
    assert_agree({"y": layer(x).detach()}, {"y": traced(x).detach()})


def test_hooks_of_accelerate() -> None:
    """Of a model spread over devices: skipped where the weights stay; offloaded ones are PEFT's."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    base = base_model("llama").train()
    for module in base.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(
                module, AlignDevicesHook(execution_device="cpu", io_same_device=True)
            )
    model = with_lora(base)
    with counted() as counts:
        stock, patched, report = both(model, batch("llama"))
    assert counts == {None: 14}
    assert not [row for row in report.layers if row.note]
    assert_agree(stock, patched)
    offloaded = base_model("llama")
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    report = ferrotune.patch(with_lora(offloaded, filled=False))
    assert {row.reason for row in report.left} == {
        "its weights are offloaded: accelerate brings them for the time of a call"
    }
    assert len(report.left) == 14


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fsdp2_before_or_after(first: str, tmp_path: Path) -> None:
    """Between forwards the weights are sharded; within one they are plain tensors."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = with_lora(base_model("llama").train())
    expected = step(model, batch("llama"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        if first == "patch":
            ferrotune.patch(model, strict=True)
        for layer in (*model.base_model.model.model.layers, model):
            fully_shard(layer, mesh=mesh)
        report = ferrotune.patch(model, strict=True)
        assert not [row for row in report.layers if row.note]
        with counted() as counts:
            found = step(model, batch("llama"))
        assert counts == {None: 14}
        whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in found.items()}
        assert_agree(expected, whole)
        assert ferrotune.unpatch(model) == 14
    finally:
        dist.destroy_process_group()


def test_a_part_that_is_an_attention_layer() -> None:
    model = get_peft_model(Custom(), LoraConfig(r=4, target_modules=["attention"]))  # type: ignore[arg-type]
    attention = model.base_model.model.attention
    attention.base_layer.out_proj.merge()
    assert [row.name for row in ferrotune.patch(attention).left] == [
        "(the model itself)", "base_layer.out_proj",
    ]  # fmt: skip


def test_lora_above_another_method() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    config = LoHaConfig(r=4, target_modules=["0", "2"])
    model: Any = get_peft_model(base, config, adapter_name="loha", mixed=True)  # type: ignore[arg-type]
    model.add_adapter("lora", LoraConfig(r=4, target_modules=["0", "2"]))
    model.set_adapter(["loha", "lora"])
    fill_lora_b(model)
    with counted() as counts:
        stock, patched, report = both(model, torch.randn(3, 16))
    assert counts == {None: 2}
    assert report.layers[0].note == (
        "its base layer is a peft.tuners.loha.layer.Linear, so it runs by itself; "
        "the LoRA term is ferrotune's"
    )
    assert_agree(stock, patched)


class Custom(nn.Module):
    """Layers of all sorts, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.conv = nn.Conv1d(16, 16, 1)
        self.linear = nn.Linear(16, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = self.linear(x)
        found: torch.Tensor = self.head(self.attention(x, x, x)[0])
        return found


def test_what_is_not_covered_keeps_pefts_forward() -> None:
    torch.manual_seed(0)
    names = ["embed", "conv", "linear", "attention", "head"]
    model = get_peft_model(Custom(), LoraConfig(r=4, target_modules=names))  # type: ignore[arg-type]
    fill_lora_b(model)
    ids = torch.randint(0, VOCABULARY, (2, 7))
    stock, patched, report = both(model, ids)
    assert_agree(stock, patched)
    assert {row.name.split(".", 2)[2]: row.reason for row in report.left} == {
        "embed": "lora.Embedding is an embedding that ferrotune has no forward for",
        "conv": "lora.Conv1d is a convolution that ferrotune has no forward for",
        "attention": "lora.MultiheadAttention is an attention layer that ferrotune has no "
        "forward for",
        "attention.base_layer.out_proj": "lora.MultiheadAttention merges it for each call, and "
        "never calls it",
    }
    assert report.counts("LoRA") == (2, 6)
    assert "PEFT: lora.Embedding is an embedding" in str(report)


def test_dora_stays_pefts_per_adapter() -> None:
    model = with_lora(base_model("llama"), use_dora=True, target_modules=["q_proj", "v_proj"])
    report = ferrotune.patch(model)
    assert not report
    assert {row.reason for row in report.left} == {"adapter 'default' is DoRA, not plain LoRA"}
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("plain")
    fill_lora_b(model)
    stock, patched, report = both(model, batch("llama"))
    assert_agree(stock, patched)
    assert not report.left
    reason = "adapter 'default' is DoRA, not plain LoRA"
    assert report.layers[0].note == f"PEFT runs it where active: {reason}"
    model.set_adapter("default")
    with counted() as counts:
        ours = step(model, batch("llama"))
    assert counts == {reason: 4}
    assert len(ferrotune.patch(model).left) == 4
    ferrotune.unpatch(model)
    assert torch.equal(step(model, batch("llama"))["logits"], ours["logits"])


def test_mixed_batches_stay_pefts() -> None:
    model = two_adapters()
    model.eval()
    inputs = batch("llama") | {"adapter_names": ["default", "second", "__base__"]}
    with torch.no_grad():
        expected = model(**inputs).logits
        ferrotune.patch(model)
        with counted() as counts:
            assert torch.equal(model(**inputs).logits, expected)
    assert counts == {"adapter_names: every row of the batch has its own adapter": 14}


def test_low_level_api() -> None:
    from peft import inject_adapter_in_model

    model = base_model("gpt2")
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["c_attn", "c_proj"]), model)
    fill_lora_b(model)
    stock, patched, report = both(model, batch("gpt2"))
    assert_agree(stock, patched)
    assert report.counts("LoRA") == (6, 6)
    assert "Conv1D float32" in report.layers[0].layer
