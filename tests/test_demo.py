"""The demo, and the model that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ferrotune
from ferrotune.config import read_toml
from llamas import computing_in
from runs import base, column

__all__ = ["base"]

pytest.importorskip("torch")
pytest.importorskip("transformers")

STEPS = 12  # of the demo's 350


def test_the_demo(tmp_path: Path) -> None:
    """A few steps of it: the held-out loss falls and every promised file is there."""
    folder = tmp_path / "demo"
    result = ferrotune.demo(folder, steps=STEPS, threads=2, progress=False)
    trained = result.train
    assert trained.stop_reason in ("max_seconds", "finished")
    assert trained.heldout_loss_before is not None
    assert trained.heldout_loss_best is not None
    assert trained.heldout_loss_best < trained.heldout_loss_before - 1.0
    assert trained.forgetting is not None
    before, after = trained.forgetting.before.loss.value, trained.forgetting.after.loss.value
    assert f"loss on Python's docs  {before:.3f} → {after:.3f} nats per token (+" in str(result)
    assert after > before  # the adapter forgets what it came from
    assert "own domain" not in str(result)  # said once
    assert trained.model["quantized_bytes"] > 0
    assert len(result.samples) == 2
    assert all(
        sample.before and sample.after and sample.before != sample.after
        for sample in result.samples
    )
    names = {
        "config.toml",
        "metrics.jsonl",
        "curves.png",
        "results.json",
        "report.html",
        "README.md",
        "checkpoint/state.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
    }
    assert {name for name in names if not (folder / name).is_file()} == set()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_toml(folder / "config.toml")["method"] == "qlora"
    saved = json.loads((folder / "results.json").read_text())
    assert json.dumps(trained.heldout_loss_best) in json.dumps(saved)
    assert column(folder, "eval", "loss")[0] == trained.heldout_loss_before
    assert min(column(folder, "eval", "loss")) == trained.heldout_loss_best
    assert f"{trained.heldout_loss_best:.3f}" in str(result)


def test_the_demo_model_is_transformers_model() -> None:
    """The weights that come with the package, beside transformers on the package's own text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ferrotune.commands.demo import locate
    from llamas import batch, engine, largest, reference

    folder = locate("demo-model")
    model = computing_in(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"), "float64"
    )
    assert type(model).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(folder).decode(
        AutoTokenizer.from_pretrained(folder)("the king")["input_ids"]
    )
    data = batch(model.config.vocab_size, 2, 130, documents=[[70]])
    found, truth = engine(folder, data), reference(model, data)
    assert largest(found.logits, truth.logits) <= 1e-4
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
