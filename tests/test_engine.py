"""The engine's Llama beside transformers': logits, loss and every weight's gradient."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamas import (
    IGNORE,
    Batch,
    batch,
    check_gradients,
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

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "grouped by 3": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 3},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "all of it": {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 20,
        "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5,
    },
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "large eps": {"rms_norm_eps": 0.1},
    "odd sizes": {
        "vocab_size": 131, "hidden_size": 39, "intermediate_size": 53, "head_dim": 14,
        "num_attention_heads": 3, "num_key_value_heads": 1,
    },
    "one layer": {"num_hidden_layers": 1, "vocab_size": 2},
    "four layers": {"num_hidden_layers": 4},
}  # fmt: skip


def check(folder: Path, data: Batch) -> None:
    """Logits, loss and gradients are as near to float64 as torch's own float32 is, or to 1e-5."""
    found = engine(folder, data, full=True)
    truth, torchs = (reference(load(folder, dtype), data) for dtype in ("float64", "float32"))
    assert relative(found.logits, truth.logits) <= max(
        1e-5, 2 * relative(torchs.logits, truth.logits)
    )
    assert largest(found.logits, truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    assert found.gradients.keys() == truth.gradients.keys()
    check_gradients(found.gradients, truth.gradients, torchs.gradients)
    # Evaluation, with frozen weights in the form they are stored in, is the same function.
    frozen = engine(folder, data)
    assert frozen.gradients == {}
    assert largest(frozen.logits, truth.logits) <= 1e-4
    assert frozen.loss == pytest.approx(truth.loss, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, tmp_path: Path) -> None:
    model = llama(**SHAPES[shape])
    save(model, tmp_path)
    check(tmp_path, batch(model.config.vocab_size, 3, 37))


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("rows", [1, 3])
def test_lengths_around_the_attention_tile(rows: int, columns: int, tmp_path: Path) -> None:
    save(llama(num_attention_heads=6, num_key_value_heads=3), tmp_path)
    check(tmp_path, batch(97, rows, columns, seed=columns))


@pytest.mark.parametrize("shard", [None, "30KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tie", [False, True])
def test_stored_types_and_shards(dtype: str, shard: str | None, tie: bool, tmp_path: Path) -> None:
    save(llama(tie_word_embeddings=tie, attention_bias=True), tmp_path, dtype, shard)
    check(tmp_path, batch(97, 2, 33))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("columns", [1, 65, 130])
def test_matrix_of_shapes_types_and_lengths(
    shape: str, dtype: str, columns: int, tmp_path: Path
) -> None:
    model = llama(seed=columns, **SHAPES[shape])
    save(model, tmp_path, dtype)
    starts = [[columns // 3, columns // 2]] if columns > 1 else []
    check(tmp_path, batch(model.config.vocab_size, 2, columns, documents=starts))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 12_345.0},
        {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 3.0},
        LLAMA3,
    ],
    ids=["default", "linear", "llama3"],
)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_as_transformers_4_wrote_it(rope: dict[str, Any], key: str, tmp_path: Path) -> None:
    """`rope_theta` at the top, and `rope_scaling` with `rope_type`, or `type` before that."""
    model = llama(rope_parameters=rope)
    data = batch(97, 2, 130)
    save(model, tmp_path)
    before = engine(tmp_path, data)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    scaling[key] = scaling.pop("rope_type")
    edit_config(
        tmp_path, ["rope_parameters"], rope_theta=rope["rope_theta"],
        rope_scaling=None if rope["rope_type"] == "default" else scaling,
    )  # fmt: skip
    assert np.array_equal(engine(tmp_path, data).logits, before.logits)
    check(tmp_path, data)


def test_rope_scalings_differ(tmp_path: Path) -> None:
    """The parity above would not see a scaling that both sides leave out."""
    logits = []
    for shape in ("plain", "linear rope", "llama3 rope", "theta"):
        folder = save(llama(**SHAPES[shape]), tmp_path / shape)
        logits.append(engine(folder, batch(97, 1, 130)).logits)
    for at, one in enumerate(logits):
        assert all(largest(one, other) > 1e-3 for other in logits[at + 1 :])


def test_fields_that_a_config_may_leave_out(tmp_path: Path) -> None:
    """Absent fields have transformers' defaults."""
    save(llama(num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=2048), tmp_path)
    optional = [
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters",
        "attention_bias", "mlp_bias", "tie_word_embeddings", "max_position_embeddings", "dtype",
    ]  # fmt: skip
    edit_config(tmp_path, optional)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not set(optional) & set(config)
    check(tmp_path, batch(97, 2, 19))


# Packed documents and ignored targets

PACKED = [[5, 6, 64, 65, 100], [64], [1, 129], [], [33]]


def test_packed_documents_equal_separate_ones(tmp_path: Path) -> None:
    """Logits of every document, the sum of the losses, and the sums of the gradients."""
    save(llama(), tmp_path)
    packed = batch(97, len(PACKED), 130, documents=PACKED)
    together = engine(tmp_path, packed, full=True)
    loss, gradients = 0.0, {name: np.zeros(len(x)) for name, x in together.gradients.items()}
    for row, starts in enumerate(PACKED):
        edges = [0, *starts, 130]
        for begin, end in pairwise(edges):
            alone = engine(tmp_path, packed.row(row, begin, end), full=True)
            assert largest(together.logits[row : row + 1, begin:end], alone.logits) <= 2e-6
            loss += alone.loss
            for name, gradient in alone.gradients.items():
                gradients[name] += gradient
    assert together.loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in together.gradients.items():
        assert relative(gradient, gradients[name]) <= 1e-5, name
    check(tmp_path, packed)


def test_a_document_does_not_see_its_neighbours(tmp_path: Path) -> None:
    """Other tokens before and after change no bit of a document's logits."""
    save(llama(), tmp_path)
    packed = batch(97, 1, 130, documents=[[40, 90]])
    ids = packed.ids.copy()
    ids[0, :40], ids[0, 90:] = (ids[0, :40] + 1) % 97, (ids[0, 90:] + 7) % 97
    one, other = (
        engine(tmp_path, Batch(x, packed.targets, packed.positions)).logits
        for x in (packed.ids, ids)
    )
    assert np.array_equal(one[0, 40:90], other[0, 40:90])
    assert not np.array_equal(one[0, :40], other[0, :40])


def test_ignored_targets_count_for_nothing(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    data = batch(97, 3, 65)
    random = np.random.default_rng(1)
    targets = np.where(random.random(data.targets.shape) < 0.6, IGNORE, data.targets).astype(
        np.int32
    )
    targets[1] = IGNORE
    masked = Batch(data.ids, targets, data.positions)
    check(tmp_path, masked)
    kept, dropped = (
        np.where(condition, data.targets, IGNORE).astype(np.int32)
        for condition in (targets != IGNORE, targets == IGNORE)
    )
    parts = [engine(tmp_path, Batch(data.ids, x, data.positions)).loss for x in (kept, dropped)]
    assert sum(parts) == pytest.approx(engine(tmp_path, data).loss, rel=1e-6)


def test_no_target_at_all(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    data = batch(97, 2, 9)
    found = engine(
        tmp_path, Batch(data.ids, np.full_like(data.targets, IGNORE), data.positions), full=True
    )
    assert found.loss == 0.0
    assert all(not gradient.any() for gradient in found.gradients.values())


def test_the_same_batch_gives_the_same_bits(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    data = batch(97, 3, 130)
    one, other = (engine(tmp_path, data, full=True) for _ in range(2))
    assert np.array_equal(one.logits, other.logits)
    assert one.loss == other.loss
    assert all(np.array_equal(one.gradients[name], other.gradients[name]) for name in one.gradients)


def test_large_logits_stay_finite(tmp_path: Path) -> None:
    """A soft-max whose largest logit is in the thousands."""
    import torch

    model = llama(num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000.0)
    save(model, tmp_path)
    data = batch(97, 2, 65)
    found, truth = engine(tmp_path, data, full=True), reference(load(tmp_path), data)
    assert np.abs(found.logits).max() > 1000
    assert largest(found.logits, truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-5)
    for name, gradient in found.gradients.items():
        assert relative(gradient, truth.gradients[name]) <= 1e-3, name


# What a batch may not be


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids", 97, "token id 97 is outside the model's vocabulary of 97"),
        ("targets", 97, "target 97 is outside"),
        ("targets", -1, "target -1 is outside"),
        ("positions", 256, "position 256 is beyond"),
    ],
)
def test_bad_batches_are_refused(field: str, value: int, message: str, tmp_path: Path) -> None:
    save(llama(), tmp_path)
    data = batch(97, 2, 5)
    getattr(data, field)[1, 3] = value
    with pytest.raises(ValueError, match=message):
        engine(tmp_path, data)


def test_shapes_of_a_batch_must_agree(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    data = batch(97, 2, 5)
    with pytest.raises(ValueError, match="must have one shape"):
        engine(tmp_path, Batch(data.ids, data.targets[:1], data.positions))
