"""`ferrotune plan`: sizes as transformers and PEFT count them, and what follows from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
from ferrotune import cli
from ferrotune.options import SettingError
from ferrotune.planning import advice
from ferrotune.planning.memory import Memory, Setup, block_bytes, loss_bytes, memory, weight_bytes
from ferrotune.planning.shapes import Shape, read, shape_of

GIB = 1 << 30
SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 208, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 331,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 24},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"pad_token_id": 0},
}
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Shape:
    return shape_of(LLAMA_8B, "here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    kind = name.replace(",", " ").split()[0]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    shape = read(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert shape.linear_parameters + shape.other_parameters == counted
    linear = {
        id(module.weight): module.weight.numel()
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and key != "lm_head"
    }
    assert shape.linear_parameters == sum(linear.values())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=7, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert shape.adapter_parameters(7) == adapted.get_nb_trainable_parameters()[0]
    assert {one.name for one in shape.linears} == {
        key.rpartition(".")[2]
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_four_bit_weights_are_as_large_as_quantised_ones(
    double_quant: bool, blocksize: int
) -> None:
    shape = shape_of({"model_type": "llama", **SIZES}, "here")
    setup = Setup(double_quant=double_quant, blocksize=blocksize)
    found = weight_bytes(shape, setup) - shape.other_parameters * 2
    made = 0
    for one in shape.linears:
        weight = np.random.default_rng().standard_normal((one.n, one.k), dtype=np.float32)
        made_of = ferrotune.quantize_4bit(weight, blocksize=blocksize, double_quant=double_quant)
        made += made_of.packed.nbytes + made_of.absmax.nbytes
        if made_of.nested_absmax is not None:
            made += made_of.nested_absmax.nbytes
    assert found == shape.layers * made


def test_the_loss_takes_what_the_operation_takes(llama: Shape) -> None:
    torch = pytest.importorskip("torch")
    from ferrotune.ops import cuda_cross_entropy

    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    rows = cuda_cross_entropy.chunk_rows(x, 128256, False)
    setup = Setup(batch_size=4)
    assert loss_bytes(llama, setup) == rows * 128256 * 2 + 8192 * 4096 * 2
    whole = loss_bytes(llama, dataclasses.replace(setup, fused_loss=False))
    assert whole == 8192 * 128256 * 14


def test_a_block_keeps_its_tensors() -> None:
    # Worked out by hand for a token: norms' inputs 2·96, inputs of attention and MLP 2·96, q 96,
    # k and v 2·32, attention's output 96, gate and up 2·208; f32: 2 norms, 6 heads, 7 ranks of 16.
    shape = shape_of({"model_type": "llama", **SIZES}, "here")
    setup = Setup(batch_size=3, sequence_length=5)
    a_token = (4 * 96 + 96 + 64 + 96 + 416) * 2 + (2 + 6 + 7 * 16) * 4
    assert block_bytes(shape, setup) == 15 * a_token
    dropped = dataclasses.replace(setup, lora_dropout=0.1)
    masks = 6 * 16 + 32  # a bit an element of seven inputs of 96 and 208, to whole 16 bytes
    assert block_bytes(shape, dropped) == 15 * (a_token + masks)
    wide = dataclasses.replace(dropped, dtype="float32")
    assert block_bytes(shape, wide) == 15 * (2 * a_token - (2 + 6 + 7 * 16) * 4)
    full = dataclasses.replace(setup, method="full")
    assert block_bytes(shape, full) == 15 * (a_token + 208 * 2 - 7 * 16 * 4)


def test_every_part_counts_where_it_should(llama: Shape) -> None:
    lora, qlora, full = (memory(llama, Setup(method=one)) for one in ("lora", "qlora", "full"))
    assert full.adapters == 0
    assert lora.adapters == qlora.adapters > 0
    assert full.gradients == full.weights == lora.weights > 2 * qlora.weights
    assert full.optimizer == 2 * full.weights
    assert lora.optimizer == 2 * lora.adapters
    assert lora.gradients == lora.adapters
    assert full.head_gradient
    assert not lora.head_gradient
    eight = memory(llama, Setup(method="full", optimizer="adamw_8bit"))
    assert 0.5 < eight.optimizer / full.weights / 2 < 0.52
    assert memory(llama, Setup(optimizer="sgd")).optimizer == 0
    longer = memory(llama, Setup(sequence_length=4096))
    assert longer.activations == 2 * qlora.activations
    assert longer.weights == qlora.weights
    recomputed = memory(llama, Setup(checkpointing=True))
    assert recomputed.activations < qlora.activations / 8


def test_the_peak_is_the_largest_moment() -> None:
    parts = Memory(1, 2, 4, 1000, 16, 32, 64, 0, 500)
    assert parts.moments == {
        "the loss": 87, "a block's backward": 55, "the optimiser's step": 1507,
    }  # fmt: skip
    assert (parts.peak, parts.peak_at) == (1507, "the optimiser's step")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_longest_sequence_is_the_longest(llama: Shape, checkpointing: bool) -> None:
    setup = Setup(batch_size=2, checkpointing=checkpointing)
    longest = advice.longest_sequence(llama, setup, 24 * GIB)
    assert longest is not None
    assert longest % 64 == 0
    peaks = [
        memory(llama, dataclasses.replace(setup, sequence_length=longest + more)).peak
        for more in (0, 64)
    ]
    assert peaks[0] <= 24 * GIB < peaks[1]
    assert advice.longest_sequence(llama, setup, 1 * GIB) is None


def test_changes_go_on_until_one_fits(llama: Shape) -> None:
    setup = Setup(method="full", batch_size=4, fused_loss=False)
    for available in (90, 60, 30, 20, 10):
        found = advice.changes(llama, setup, available * GIB)
        assert [one.fits for one in found] == [False] * (len(found) - 1) + [True]
        assert (
            found[-1].peak
            <= available * GIB
            < min([one.peak for one in found[:-1]] + [memory(llama, setup).peak])
        )
    hopeless = advice.changes(llama, setup, 1 * GIB)
    assert not any(one.fits for one in hopeless)
    assert "qlora" in hopeless[-1].change


def test_the_function_and_the_command_agree(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ferrotune.plan(folder, batch_size=4, gpu_memory=24)
    arguments = ["plan", str(folder), "--batch-size", "4", "--gpu-memory", "24", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == result.to_dict()
    assert result.fits is False
    assert result.changes[-1].fits
    assert result.peak == max(result.memory.moments.values())
    assert (result.parameters, result.gpu_memory) == (8_030_261_248, 24 * GIB)
    shown = str(result)
    assert "8.03B parameters" in shown
    assert "fits 24.00 GiB" in shown
    assert "checkpointing" in shown
    # A card that CUDA itself fills is still told what is missing.
    assert ferrotune.plan(folder, gpu_memory=0.75).changes
    roomy = ferrotune.plan(folder, gpu_memory=80)
    assert roomy.fits
    assert roomy.changes == ()
    assert roomy.longest_sequence


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA_8B, "model_type": "lama"}, "did you mean 'llama'"),
        ({**LLAMA_8B, "model_type": 3}, "model_type 3"),
        ({**LLAMA_8B, "hidden_size": None}, "hidden_size must be a whole number above 0"),
        ({**LLAMA_8B, "vocab_size": -1}, "vocab_size"),
        ({**LLAMA_8B, "num_hidden_layers": True}, "num_hidden_layers"),
        ({**LLAMA_8B, "num_key_value_heads": 7}, "cannot share 7"),
        ([], "no object"),
    ],
)
def test_a_config_that_is_no_use_is_one_error(config: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(SettingError, match=said) as error:
        ferrotune.plan(path)
    assert str(path) in str(error.value)


def test_bad_values_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for values in (
        {"r": 0}, {"batch_size": 0}, {"sequence_length": -4}, {"lora_dropout": 1.0},
        {"blocksize": 100}, {"gpu_memory": 0.0},
    ):  # fmt: skip
        with pytest.raises(SettingError, match=next(iter(values))):
            ferrotune.plan(folder, **values)  # type: ignore[arg-type]
    (folder / "config.json").write_text("{")
    assert cli.main(["plan", str(folder)]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert cli.main(["plan", str(folder / "nowhere")]) == 2
