"""`patch(model, memory=...)`: what layers keep and recompute; the same results at every level."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ferrotune
from ferrotune import ops
from ferrotune.ops.backend import choose as choose_backend
from ferrotune.patching import memory as memory_module
from ferrotune.patching import recompute
from ferrotune.patching.masks import index_dropout
from ferrotune.patching.memory import policy_of
from ferrotune.planning.memory import LEVELS, Level, memory
from ferrotune.planning.policy import size_of
from side_by_side import assert_agree, step
from tiny_models import base_4bit_model, base_model, batch, with_lora

NAMES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "bert",
    "roberta",
)  # fmt: skip
LARGE = "1 TiB"


def made(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return with_lora(base_model(name, dtype).train(), name, **options)


def at(model: Any, level: Level | tuple[Level, ...], asked: bool = False) -> Any:
    """The model's policy, with every layer at a level."""
    (policy,) = policy_of(list(model.modules()))
    levels = (level,) * len(policy.layers) if isinstance(level, str) else level
    policy.tokens = 1 << 40  # settled
    policy._look()
    policy._apply(levels, asked)
    return policy


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_every_level_is_exact(name: str) -> None:
    """Loss and all gradients to the bit, with LoRA dropout and the model's own."""
    model = made(name, lora_dropout=0.2)
    ferrotune.patch(model, strict=True)
    expected = step(model, batch(name))
    ferrotune.patch(model, memory=LARGE)
    for level in LEVELS:
        at(model, level)
        assert_equal(step(model, batch(name)), expected)
    for levels in (("offload", "mlp"), ("spill", "layer")):
        at(model, levels)  # type: ignore[arg-type]
        assert_equal(step(model, batch(name)), expected)
    ferrotune.unpatch(model)
    assert not any(
        attribute in module.__dict__
        for module in model.modules()
        for attribute in (
            "_gradient_checkpointing_func",
            "_ferrotune_switch",
            recompute.MLP_AGAIN,
            "_ferrotune_memory",
        )
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3"])
def test_four_bit_models_under_autocast(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = with_lora(base_4bit_model(name, torch.bfloat16, tmp_path), name)
    ferrotune.patch(model, strict=True, fused_loss=True, memory=LARGE)
    found = []
    for level in LEVELS:
        at(model, level)
        with torch.autocast("cpu", torch.bfloat16):
            model.zero_grad(set_to_none=True)
            loss = model(**batch(name)).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(grads | {"loss": loss.detach()})
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take the way that they take on CUDA, through the operations in plain PyTorch."""

    def rms_norm_and_x(x: Any, weight: Any, eps: float, offset: float) -> Any:
        return ops.rms_norm(x, weight, eps, offset=offset), x

    monkeypatch.setattr("ferrotune.patching.blocks.takes", lambda x: True)
    monkeypatch.setattr("ferrotune.patching.blocks.rms_norm_and_x", rms_norm_and_x)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "gemma3"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_blocks_of_cuda_are_exact_too(name: str, dropout: float) -> None:
    model = made(name, lora_dropout=dropout)
    ferrotune.patch(model, strict=True, memory=LARGE)
    found = []
    for level in LEVELS:
        at(model, level)
        found.append(step(model, batch(name)))
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.mark.usefixtures("kernels")
def test_what_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms at their level; of the MLP all but its last product; transformers' own switch too."""
    counts: Counter[str] = Counter()

    def counting(where: Any, name: str, label: str) -> None:
        right = getattr(where, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[label] += 1
            return right(*args, **kwargs)

        monkeypatch.setattr(where, name, call)

    model = made()
    backend = choose_backend(torch.zeros(1))
    counting(backend, "forward", "products")
    counting(backend, "ranks", "ranks alone")
    counting(ops, "rms_norm", "norms")
    ferrotune.patch(model, memory=LARGE)
    # Two layers of 4 groups of products; two norms of each, and the last.
    expected: dict[Level, dict[str, int]] = {
        "keep": {"products": 8, "norms": 5},
        "elementwise": {"products": 8, "norms": 9},
        "mlp": {"products": 10, "ranks alone": 2, "norms": 9},
        "spill": {"products": 10, "ranks alone": 2, "norms": 9},
        "layer": {"products": 14, "ranks alone": 2, "norms": 9},
        "offload": {"products": 14, "ranks alone": 2, "norms": 9},
    }
    for level, wanted in expected.items():
        at(model, level)
        counts.clear()
        step(model, batch("llama"))
        assert counts == wanted, level
    ferrotune.unpatch(model)
    ferrotune.patch(model)
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        counts.clear()
        step(model, batch("llama"))
        assert counts == expected["layer"]


@pytest.mark.parametrize(
    "text", ["", "much", "24 GiBs", "-1", "nan", "1.2.3 GB", ".", 0, True, "0"]
)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="memory must be 'auto' or a size"):
        size_of(text)
    model = made()
    with pytest.raises(ValueError, match="memory must be"):
        ferrotune.patch(model, memory=text)
    assert ferrotune.unpatch(model) == 0


def predicted(model: Any, level: Level, rows: int) -> int:
    """A size in which layers at a level fit, and none at the one before."""
    (policy,) = policy_of(list(model.modules()))
    setup = memory_module._setup(model, rows, 12, "float32")
    lasting, _ = memory_module._lasting(model, torch.device("cpu"))
    found = memory(policy.shape, setup, (level,) * 2)
    return int((found.peak + lasting - found.weights - found.adapters - found.optimizer) * 1.0301)


def unmasked(rows: int) -> dict[str, torch.Tensor]:
    found = batch("llama", rows=rows)
    del found["attention_mask"]
    return found


def test_it_is_settled_by_the_first_and_by_larger_steps() -> None:
    model = made()
    report = ferrotune.patch(model, memory=LARGE)
    assert report.memory is not None
    assert "settled at the first forward" in str(report)
    assert report.memory.peak is None
    size = predicted(model, "mlp", 16)
    report = ferrotune.patch(model, memory=size)
    found = report.memory
    assert found is not None
    model.eval()
    model(**unmasked(64))
    with torch.no_grad():
        model.train()(**unmasked(64))
    assert found.levels is None
    before = 0
    for rows in (2, 16, 4, 18):
        model(**unmasked(rows)).loss.backward()
        assert found.levels is not None
        assert found.peak is not None
        assert found.peak <= size
        most = max(LEVELS.index(level) for level in found.levels.values())
        assert (most > before) if rows == 16 else (most >= before)
        before = most
    assert (found.batch_size, found.sequence_length) == (18, 12)
    assert [*found.levels] == [f"base_model.model.model.layers.{i}" for i in range(2)]
    assert "18 x 12 tokens" in str(report)
    assert found.kept is not None
    assert found.kept.keys() == found.levels.keys()
    assert "recomputes" in report._repr_html_()
    assert report.as_dict()["memory"]["levels"] == found.levels
    again = ferrotune.patch(model)  # keeps the policy
    assert again.memory is found
    with pytest.raises(ferrotune.PatchError, match=r"200 x 12 tokens takes .* of .*; try .*batch"):
        model(**unmasked(200))
    with pytest.raises(ferrotune.PatchError, match="200 x 12"):
        model(**unmasked(200))
    model(**unmasked(2)).loss.backward()


def test_auto_is_for_devices() -> None:
    model = made()
    report = ferrotune.patch(model, memory="auto")
    step(model, batch("llama"))
    assert "'auto' is what a CUDA device has free" in str(report)


def test_models_that_are_not_known() -> None:
    model = made("t5")
    with pytest.raises(ferrotune.PatchError, match="model_type 't5'"):
        ferrotune.patch(model, memory="8 GiB")
    assert ferrotune.unpatch(model) == 0
    bare = with_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), task_type=None)
    with pytest.raises(ferrotune.PatchError, match="no model of transformers"):
        ferrotune.patch(bare, memory="8 GiB")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_transformers_own_switch(when: str, reentrant: bool) -> None:
    """Every layer then recomputes, and may be offloaded; what the switch was comes back."""
    model = made(lora_dropout=0.2)
    expected = step(model, batch("llama"))
    model.enable_input_require_grads()
    kwargs = {"use_reentrant": reentrant}
    if when == "before":
        model.gradient_checkpointing_enable(kwargs)
    report = ferrotune.patch(model, memory=LARGE)
    found = report.memory
    assert found is not None
    if when == "between":
        step(model, batch("llama"))
        assert found.levels is not None
        assert set(found.levels.values()) == {"keep"}
    if when != "before":
        model.gradient_checkpointing_enable(kwargs)
    with index_dropout(model):
        patched = step(model, batch("llama"))
    assert found.levels is not None
    assert set(found.levels.values()) == {"layer"}
    at(model, ("offload", "layer"), asked=True)
    with index_dropout(model):
        assert_equal(step(model, batch("llama")), patched)
        layers = model.base_model.model.model.layers
        assert all(one.gradient_checkpointing for one in layers)
        ferrotune.unpatch(model)
        assert all(one.gradient_checkpointing for one in layers)
        function = layers[0]._gradient_checkpointing_func
        assert function.func is checkpoint
        assert function.keywords == kwargs
        model.gradient_checkpointing_disable()
        stock = step(model, batch("llama"))
    for name, tensor in stock.items():
        torch.testing.assert_close(patched[name], tensor, rtol=1e-4, atol=1e-6)
    assert expected.keys() == stock.keys()


def test_the_switch_turned_off() -> None:
    model = made()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    report = ferrotune.patch(model, memory=LARGE)
    step(model, batch("llama"))
    assert report.memory is not None
    assert set((report.memory.levels or {}).values()) == {"layer"}
    model.gradient_checkpointing_disable()
    step(model, batch("llama"))
    assert set((report.memory.levels or {}).values()) == {"keep"}


def test_a_function_of_the_users_own_is_kept() -> None:
    """Checkpointing with other settings than ours runs as it was asked for."""
    ours = functools.partial(checkpoint, use_reentrant=False)
    assert recompute.faster(ours) is recompute.checkpointed
    older = functools.partial(checkpoint, use_reentrant=True)
    assert recompute.faster(older) is recompute.reentrant
    for other in (
        checkpoint,
        functools.partial(checkpoint, use_reentrant=None),
        functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
        functools.partial(torch.nn.functional.linear),
    ):
        assert recompute.faster(other) is other


def test_copies_and_verify() -> None:
    model = made(lora_dropout=0.1)
    ferrotune.patch(model, memory=LARGE)
    expected = step(model, batch("llama"))
    at(model, "mlp")
    copied = copy.deepcopy(model)
    assert policy_of(list(copied.modules()))[0] is not policy_of(list(model.modules()))[0]
    assert_equal(step(copied, batch("llama")), expected)
    ferrotune.unpatch(copied)
    assert policy_of(list(model.modules()))
    certificate = ferrotune.verify(model, batch("llama"))
    assert certificate.passed, str(certificate)
    assert certificate.float64 == "run"
    assert_equal(step(model, batch("llama")), expected)


def test_gradients_twice_and_none() -> None:
    """A graph that is kept gives its gradients again; one that is dropped leaves nothing."""
    model = made()
    ferrotune.patch(model, memory=LARGE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seen: list[weakref.ref[torch.Tensor]] = []
    layer = model.base_model.model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    for level in LEVELS:
        at(model, level)
        loss = model(**batch("llama")).loss
        first = torch.autograd.grad(loss, trained, retain_graph=True)
        second = torch.autograd.grad(loss, trained)
        assert all(map(torch.equal, first, second))
        output = model(**batch("llama"))
        del output, loss
        gc.collect()
        assert [held() for held in seen] == [None] * len(seen), level


@pytest.mark.parametrize("level", LEVELS)
def test_data_parallel(level: Level) -> None:
    model = made()
    ferrotune.patch(model, memory=LARGE)
    expected = step(model, batch("llama"))
    at(model, level)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        found = step(parallel, batch("llama"))
    finally:
        torch.distributed.destroy_process_group()
    found = {name.replace(" module.", " "): tensor for name, tensor in found.items()}
    assert_equal(found, expected)


def compiled_step(
    model: Any, inputs: dict[str, Any], fullgraph: bool = True
) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    found = step(compiled, inputs)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}


@pytest.mark.slow
def test_compiled() -> None:
    """One graph, whatever was settled before: torch.compile chooses what it keeps by itself."""
    model = made(lora_dropout=0.1)
    report = ferrotune.patch(model, memory=LARGE)
    assert "torch.compile chooses by itself" in str(report)
    # transformers warns of a cache beside recomputation, which breaks the graph.
    inputs = {**batch("llama"), "use_cache": False}
    expected = step(model, inputs)
    for level in ("mlp", "layer"):
        at(model, level)  # type: ignore[arg-type]
        assert_agree(expected, compiled_step(model, inputs))


@pytest.mark.slow
def test_compiled_with_the_switch_on() -> None:
    model = made()
    inputs = {**batch("llama"), "use_cache": False}
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ferrotune.patch(model)
    # The switch makes the embeddings' output require gradients, which breaks the graph.
    assert_agree(expected, compiled_step(model, inputs, fullgraph=False))


def test_draws_are_seen() -> None:
    """A second forward in a captured graph cannot set generators back: only where nothing draws."""
    for p, draws in ((0.0, False), (0.1, True)):
        model = made(lora_dropout=p)
        ferrotune.patch(model)
        layer = model.base_model.model.model.layers[0]
        assert recompute._draws(functools.partial(type(layer).forward, layer)) is draws
        assert recompute._draws(layer.mlp._run) is draws
        assert recompute._draws(functools.partial(layer.forward)) is draws
        layer.self_attn.attention_dropout = 0.2
        assert recompute._draws(functools.partial(type(layer).forward, layer))


def test_a_mask_repeats_keys_and_values() -> None:
    """Without one grouped-query attention reads them as they are; eager attention is told of."""
    model = made()
    peaks = []
    for padded in (False, True):
        report = ferrotune.patch(model, memory=LARGE)
        inputs = batch("llama")
        if not padded:
            del inputs["attention_mask"]
        step(model, inputs)
        assert report.memory is not None
        peaks.append(report.memory.peak)
        assert "eager" not in str(report.memory)
    assert peaks[0] < peaks[1]
    model.base_model.model.set_attn_implementation("eager")
    report = ferrotune.patch(model, memory=LARGE)
    step(model, batch("llama"))
    assert "without the matrices that eager attention keeps" in str(report)


def test_the_trainers_callback() -> None:
    model: Any = made()
    callback = ferrotune.TrainerCallback(memory=LARGE, show=False)
    nothing: Any = None
    callback.on_train_begin(nothing, nothing, nothing, model=model)
    step(model, batch("llama"))
    assert callback.report is not None
    assert callback.report.memory is not None
    assert callback.report.memory.levels
    callback.on_train_end(nothing, nothing, nothing)
    assert not policy_of(list(model.modules()))
    assert ferrotune.unpatch(model) == 0
