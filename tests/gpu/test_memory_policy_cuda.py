"""`patch(model, memory=...)` on CUDA: exact at every level, in the memory that it predicts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import ferrotune
from ferrotune.patching import memory as policies
from ferrotune.patching import offload
from ferrotune.patching.memory import policy_of
from ferrotune.planning.memory import LEVELS, memory
from side_by_side import assert_agree, step
from test_models_cuda import build
from test_patch_memory import LARGE, assert_equal, at
from tiny_models import batch, with_lora

NAMES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "bert",
    "roberta",
)  # fmt: skip
LAYERS, ROWS, LENGTH = 6, 4, 1024
MIB = 1 << 20
NEAR = 0.05  # of the prediction


@pytest.fixture(autouse=True)
def _small_inputs_move_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_MOVED", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, num_hidden_layers=LAYERS, intermediate_size=3584,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def large(folder: Path, device: torch.device) -> Iterator[Any]:
    """Large enough for memory to be that of activations."""
    if device.type != "cuda":
        pytest.skip("memory is CUDA's")
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four, dtype=torch.bfloat16, device_map="cuda"
    ).train()
    yield with_lora(model, r=16)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def ids(rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    found = torch.randint(3, 4096, (rows, length), device="cuda")
    return {"input_ids": found, "labels": found}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def a_step(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.autocast("cuda", torch.bfloat16):
        loss: torch.Tensor = model(**inputs).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("quant", ["dense", "4bit"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_every_level_is_exact(
    name: str, dropout: float, quant: str, tmp_path: Path, device: torch.device
) -> None:
    model = build(name, quant, "bf16", tmp_path, device, lora_dropout=dropout)
    inputs = batch(name, device=device.type)
    ferrotune.patch(model, strict=True)
    expected = step(model, inputs)
    ferrotune.patch(model, memory=LARGE)
    for level in (*LEVELS, ("offload", "mlp"), ("spill", "layer")):
        at(model, level)  # type: ignore[arg-type]
        assert_equal(step(model, inputs), expected)


@pytest.mark.usefixtures("hopper")
def test_every_level_is_exact_in_a_large_model(large: Any) -> None:
    ferrotune.patch(large, strict=True, fused_loss=True, memory=LARGE)
    inputs = ids(2, 512)
    expected = None
    for level in LEVELS:
        at(large, level)
        large.zero_grad(set_to_none=True)
        found = {"loss": a_step(large, inputs), **gradients(large)}
        expected = found if expected is None else expected
        assert_equal(found, expected)


def test_levels_keep_and_take_what_is_predicted(
    large: Any, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LEAST_MOVED", 1 << 20)
    torch.utils.deterministic.fill_uninitialized_memory = False
    ferrotune.patch(large, strict=True, fused_loss=True, memory=LARGE)
    (policy,) = policy_of(list(large.modules()))
    inputs = ids()
    setup = policies._setup(large, ROWS, LENGTH, "bfloat16")
    token = setup.tokens * setup.element
    a_step(large, inputs)
    for level in (*LEVELS, None):
        levels = ("layer",) * 2 + ("mlp",) * 2 + ("keep",) * 2 if level is None else level
        if level == "spill":  # never the last one: on its way when the loss comes
            levels = ("spill",) * (LAYERS - 1) + ("mlp",)
        at(large, levels)  # type: ignore[arg-type]
        given = [levels] * LAYERS if isinstance(levels, str) else levels
        predicted = memory(policy.shape, setup, given)  # type: ignore[arg-type]
        large.zero_grad(set_to_none=True)
        a_step(large, inputs)
        large.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = large(**inputs).loss
        # Between forward and backward the loss holds the gradient of its input.
        kept = torch.cuda.memory_allocated() - before - token * policy.shape.hidden
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        moments = predicted.moments
        lasting = predicted.weights + predicted.adapters + predicted.optimizer
        most = max(moments["the loss"], moments["a block's backward"]) - lasting
        print(
            f"{level or 'mixed'}: kept {kept / MIB:.1f} MiB, predicted "
            f"{predicted.activations / MIB:.1f}; peak {peak / MIB:.1f}, predicted {most / MIB:.1f}"
        )
        record_property(f"peak of {level}", peak / most)
        off = abs(kept - predicted.activations)
        assert off <= NEAR * predicted.activations + token * policy.shape.hidden
        assert 0.85 <= peak / most <= 1.05
    at(large, "keep")


def test_a_size_is_kept(large: Any) -> None:
    """Sizes from all that a step takes to the least: its peak stays below each."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs = ids()
    trained = [parameter for parameter in large.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    report = ferrotune.patch(large, strict=True, fused_loss=True, memory=LARGE)

    def steps() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            a_step(large, inputs)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated()

    whole = steps()
    assert report.memory is not None
    assert report.memory.peak is not None
    assert abs(whole / report.memory.peak - 1) <= NEAR
    seen = set()
    for part in (1.1, 0.9, 0.75, 0.6, 0.5, 0.42):
        size = int(whole * part)
        report = ferrotune.patch(large, strict=True, memory=size)
        try:
            peak = steps()
        except ferrotune.PatchError as error:
            print(error)
            continue
        found = report.memory
        assert found is not None
        assert found.levels is not None
        assert found.peak is not None
        print(f"{found}; measured {peak / MIB:.1f} MiB")
        assert peak <= size
        assert peak >= 0.8 * found.peak
        seen |= set(found.levels.values())
    assert len(seen) >= 4
    ferrotune.unpatch(large)


def test_auto_takes_what_is_free(large: Any) -> None:
    inputs = ids()
    report = ferrotune.patch(large, strict=True, fused_loss=True, memory="auto")
    a_step(large, inputs)
    assert report.memory is not None
    assert set((report.memory.levels or {}).values()) == {"keep"}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (1 << 29) + 700 * MIB
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        report = ferrotune.patch(large, strict=True, fused_loss=True, memory="auto")
        large.zero_grad(set_to_none=True)
        a_step(large, inputs)
        assert report.memory is not None
        print(report.memory)
        assert set((report.memory.levels or {}).values()) != {"keep"}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_transformers_own_switch(large: Any) -> None:
    """Reentrant and not, before and after: the same gradients, and inputs can be offloaded."""
    inputs = ids(2, 512)
    large.enable_input_require_grads()
    ferrotune.patch(large, strict=True, fused_loss=True)
    expected = {"loss": a_step(large, inputs), **gradients(large)}
    for reentrant in (False, True):
        large.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ferrotune.unpatch(large)
        for memory_size in (None, LARGE):
            ferrotune.patch(large, strict=True, fused_loss=True, memory=memory_size)
            for offloaded in (False, True) if memory_size else (False,):
                if offloaded:
                    at(large, "offload", asked=True)
                large.zero_grad(set_to_none=True)
                assert_equal({"loss": a_step(large, inputs), **gradients(large)}, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_graphs(large: Any, level: str) -> None:
    """A captured step replays with the gradients of an eager one, for other inputs too."""
    ferrotune.patch(large, strict=True, fused_loss=True, memory=LARGE)
    at(large, level)  # type: ignore[arg-type]
    inputs = ids(2, 256)

    def whole() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = large(**inputs, use_cache=False).loss
        loss.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            large.zero_grad(set_to_none=True)
            whole()
    torch.cuda.current_stream().wait_stream(side)
    large.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    inputs["input_ids"].copy_(ids(2, 256)["input_ids"])
    inputs["labels"].copy_(inputs["input_ids"])
    for parameter in large.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    replayed = gradients(large)
    del graph
    large.zero_grad(set_to_none=True)
    whole()
    # Captured products may run by other kernels than eager ones do, at every level.
    assert_agree(gradients(large), replayed, torch.bfloat16)


def test_compiled(large: Any) -> None:
    """torch.compile's own partitioner chooses; the policy stays out of its way."""
    inputs = ids(2, 256)
    ferrotune.patch(large, strict=True, memory=LARGE)
    expected = a_step(large, inputs)
    at(large, "layer")
    large.zero_grad(set_to_none=True)
    compiled = torch.compile(large)
    with torch.autocast("cuda", torch.bfloat16):
        loss = compiled(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-2, atol=0)
    assert all(torch.isfinite(grad).all() for grad in gradients(large).values())
