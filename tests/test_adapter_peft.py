"""Adapters beside PEFT itself: target matching, scaling, and adapter folders in both directions."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrotune import _native

if TYPE_CHECKING:
    import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

KEYS = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
    "velora_config",
}  # fmt: skip


def tiny_llama(tie: bool = False) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def names_of(model: Any) -> tuple[list[str], list[str]]:
    """Linear modules, and all others that contain no module."""
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    leaves = [
        name for name, module in model.named_modules() if name and not list(module.children())
    ]
    return linear, [name for name in leaves if name not in linear]


def as_json(config: LoraConfig) -> str:
    fields: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return json.dumps(
        {key: list(value) if isinstance(value, set) else value for key, value in fields.items()}
    )


def randomise(model: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()


def logits(model: Any) -> torch.Tensor:
    import torch

    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
        return found


def peft_targets(model: Any) -> dict[str, tuple[int, float, float]]:
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            found[name] = (
                module.r["default"],
                float(module.lora_alpha["default"]),
                float(module.scaling["default"]),
            )
    return found


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r"^(?!.*self_attn).*_proj$", "use_rslora": True, "r": 5, "lora_alpha": 7},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "r": 6,
        "lora_alpha": 12,
        "rank_pattern": {
            "q_proj": 3,
            r".*\.1\.mlp\.down_proj": 2,
            "^model.layers.0.self_attn.k_proj": 9,
        },
        "alpha_pattern": {"layers.2.self_attn.q_proj": 5, "down_proj": 1},
    },
    {
        "target_modules": "all-linear",
        "use_rslora": True,
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {r"layers\.[12]\.mlp\.(up|gate)_proj": 7},
        "alpha_pattern": {"(q|k)_proj": 11},
    },
]


@pytest.mark.parametrize("settings_", CONFIGS)
@pytest.mark.parametrize("tie", [False, True])
def test_peft_model_chooses_the_same(settings_: dict[str, Any], tie: bool) -> None:
    model = tiny_llama(tie)
    linear, other = names_of(model)
    targets, _ = _native.match_targets(
        as_json(LoraConfig(task_type="CAUSAL_LM", **settings_)),
        linear,
        other=other,
        output="lm_head",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied lm_head
        theirs = peft_targets(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings_)))
    assert dict(targets) == theirs


@pytest.mark.parametrize("settings_", CONFIGS)
def test_peft_reads_what_is_written_here(settings_: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama()
    linear, other = names_of(model)
    config = LoraConfig(task_type="CAUSAL_LM", **settings_)
    theirs = get_peft_model(model, config)
    randomise(theirs)
    expected = logits(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    text, modules, notes = _native.read_adapter(tmp_path / "theirs")
    assert notes == []
    assert {m: (a.shape[0], b.shape[1]) for m, (a, b) in modules.items()} == {
        m: (r, r) for m, (r, _, _) in peft_targets(theirs).items()
    }
    # What is read is what PEFT holds, and the logits follow from it.
    deltas = {m: s * modules[m][1] @ modules[m][0] for m, (_, _, s) in peft_targets(theirs).items()}
    assert dict(
        _native.match_targets(text, linear, other=other, output="lm_head")[0]
    ) == peft_targets(theirs)
    np.testing.assert_allclose(
        logits(merged(tiny_llama(), deltas)).numpy(), expected.numpy(), rtol=1e-4, atol=1e-5
    )

    assert _native.write_adapter(tmp_path / "ours", text, modules, model_card="# card") == []
    ours, his = (
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs")
    )
    assert set(ours) == set(his) == KEYS
    for fields in (ours, his):
        if isinstance(fields["target_modules"], list):
            fields["target_modules"].sort()
        for name in ("layers_to_transform", "layers_pattern"):
            if fields[name] is not None and not isinstance(fields[name], list):
                fields[name] = [fields[name]]
    assert ours == his
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # what PEFT says of an adapter it does not fully understand
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours"))
    assert (logits(loaded) == expected).all()


def merged(model: Any, deltas: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += torch.from_numpy(np.ascontiguousarray(delta))
    return model


PART = st.sampled_from(
    ["a", "b", "ab", "q_proj", "k_proj", "layers", "h", "0", "1", "12", "mlp", "experts"]
)
NAME = st.lists(PART, min_size=1, max_size=6).map(".".join)
PATTERN = st.sampled_from(
    [
        "a",
        ".*",
        "q_proj",
        r".*\.q_proj",
        r"(a|b)\..*",
        r"a|b",
        r"layers\.\d+\.mlp",
        r"^(?!.*a).*$",
        r"\w+",
        "",
    ]
)
LAYERS_PATTERN = st.sampled_from(
    ["layers", "h", ["layers", "h"], ["experts", "layers"], "a|h", "(layers|h)", "lay.*"]
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    modules=st.lists(NAME, min_size=1, max_size=12, unique=True),
    target=st.one_of(st.lists(NAME, min_size=1, max_size=4), PATTERN, st.just(r"(?i)A.*")),
    exclude=st.one_of(st.none(), st.lists(NAME, max_size=2), PATTERN),
    layers=st.one_of(st.none(), st.integers(0, 13), st.lists(st.integers(-1, 13), max_size=3)),
    layers_pattern=st.one_of(st.none(), LAYERS_PATTERN),
    ranks=st.dictionaries(st.one_of(NAME, PATTERN), st.integers(1, 64), max_size=3),
    alphas=st.dictionaries(st.one_of(NAME, PATTERN), st.integers(1, 64), max_size=3),
    rslora=st.booleans(),
)
def test_random_names_match_as_in_peft(
    modules: list[str],
    target: Any,
    exclude: Any,
    layers: Any,
    layers_pattern: Any,
    ranks: dict[str, int],
    alphas: dict[str, int],
    rslora: bool,
) -> None:
    if isinstance(target, str):
        layers = layers_pattern = None
    if layers is None:
        layers_pattern = None
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=target,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=rslora,
    )
    expected = {}
    for name in modules:
        if (
            not isinstance(
                found := check_target_module_exists(config, name), bool | re.Match | None
            )
            or not found
        ):
            continue
        r = ranks.get(get_pattern_key(list(ranks), name), 8)
        alpha = alphas.get(get_pattern_key(list(alphas), name), 16)
        expected[name] = (r, float(alpha), alpha / math.sqrt(r) if rslora else alpha / r)
    containers = {
        name[:dot] for name in modules for dot in range(len(name)) if name[dot] == "."
    } - set(modules)
    wrong = [name for name in containers if check_target_module_exists(config, name)]
    wrong = [
        name
        for name in wrong
        if "_ExcludedModule" not in type(check_target_module_exists(config, name)).__name__
    ]
    if wrong:
        with pytest.raises(ValueError, match="not a linear layer"):
            _native.match_targets(as_json(config), modules)
    elif not expected:
        with pytest.raises(ValueError, match="target_modules"):
            _native.match_targets(as_json(config), modules)
    else:
        assert dict(_native.match_targets(as_json(config), modules)[0]) == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_types(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    modules = {
        "m.q_proj": (rng.normal(size=(2, 3)).astype("f4"), rng.normal(size=(4, 2)).astype("f4"))
    }
    config = as_json(LoraConfig(r=2, target_modules=["q_proj"]))
    _native.write_adapter(tmp_path, config, modules, dtype=dtype)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a = tensors["base_model.model.m.q_proj.lora_A.weight"]
    assert a.dtype is getattr(torch, dtype)
    assert torch.equal(a, torch.from_numpy(modules["m.q_proj"][0]).to(a.dtype))
    _, back, _ = _native.read_adapter(tmp_path)
    assert np.array_equal(back["m.q_proj"][0], a.float().numpy())


def test_strided_arrays_are_written_by_value(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype="f4").reshape(3, 2).T, np.arange(16, dtype="f4").reshape(4, 4)[:, ::2]
    _native.write_adapter(tmp_path, as_json(LoraConfig(r=2, target_modules=["q"])), {"q": (a, b)})
    _, back, _ = _native.read_adapter(tmp_path)
    assert np.array_equal(back["q"][0], a)
    assert np.array_equal(back["q"][1], b)


def test_what_is_not_supported_is_a_value_error(tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"adapter_config\.json: use_dora=true is not supported"):
        _native.read_adapter(tmp_path)
    theirs = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path))
    with pytest.raises(_native.FormatError, match=r"unexpected tensor.*(embeddings|base weight)"):
        _native.read_adapter(tmp_path)
    with pytest.raises(FileNotFoundError):
        _native.read_adapter(tmp_path / "nowhere")


FULL_DISK = """
import json, resource, sys
import numpy as np
from ferrotune import _native
folder, config = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big = np.ones((2, 100_000), "f4")
try:
    _native.write_adapter(folder, config, {"q": (big, big.T)})
except OSError as error:
    print(type(error).__name__, error.filename)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE stands for a full disk")
def test_a_disk_that_fills_leaves_the_old_adapter(tmp_path: Path) -> None:
    config = as_json(LoraConfig(r=2, target_modules=["q"]))
    small = np.ones((2, 2), "f4")
    _native.write_adapter(tmp_path, config, {"q": (small, small)}, model_card="old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), config],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stdout.split() == ["OSError", str(tmp_path / "adapter_model.safetensors")]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
