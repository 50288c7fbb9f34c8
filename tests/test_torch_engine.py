"""The same runs on both engines: losses, files, checkpoints; and which engine a run gets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ferrotune
import methods
from methods import Family
from runs import base, column, metrics, settings
from texts import VOCABULARY, add_tokenizer, write_lines

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from ferrotune.torch_engine.choice import choose

_ = base  # a fixture

LLAMA, GPT2 = methods.CAUSAL
LABELLED = {family: (family, kind) for family, kind in methods.LABELLED}
CASES: list[tuple[Family, dict[str, Any]]] = [
    (LLAMA, {"method": "lora", "r": 4, "packing": True}),
    (LLAMA, {"method": "qlora", "r": 4, "gradient_accumulation": 2}),
    (LLAMA, {"method": "full", "weight_decay": 0.1, "learning_rate": 1e-3}),
    (LLAMA, {"method": "freeze", "trained_layers": 1, "learning_rate": 1e-3}),
    (LLAMA, {"method": "ia3"}),
    (LLAMA, {"method": "prompt", "num_virtual_tokens": 4, "packing": True}),
    (LLAMA, {"method": "adapter", "reduction_factor": 4}),
    (GPT2, {"method": "qlora", "quant_type": "fp4", "blocksize": 128, "double_quant": False}),
    (GPT2, {"method": "adapter", "adapter_variant": "houlsby", "reduction_factor": 4}),
    (LABELLED["bert"], {"method": "lora", "r": 4, "weight_decay": 0.1}),
    (LABELLED["bert"], {"method": "qlora", "r": 4}),
    (LABELLED["bert"], {"method": "prompt", "num_virtual_tokens": 3}),
    (LABELLED["gpt2"], {"method": "prefix", "num_virtual_tokens": 3}),
    (LABELLED["llama"], {"method": "prompt", "num_virtual_tokens": 3, "test": 0.1}),
]
MORE: list[tuple[Family, dict[str, Any]]] = [
    (LLAMA, {"method": "prefix", "num_virtual_tokens": 4}),
    (GPT2, {"method": "full", "learning_rate": 1e-3, "packing": True}),
    (LABELLED["bert"], {"method": "full", "learning_rate": 1e-3}),
    (LABELLED["bert"], {"method": "adapter", "adapter_variant": "pfeiffer"}),
    (GPT2, {"method": "lora", "use_rslora": True, "target_modules": ["c_attn"]}),
    (GPT2, {"method": "ia3"}),
    (GPT2, {"method": "prefix", "packing": True}),
    (GPT2, {"method": "freeze", "trained_layers": 2}),
    (LLAMA, {"method": "adapter", "adapter_variant": "houlsby"}),
    (LABELLED["bert"], {"method": "prefix"}),
    (LABELLED["bert"], {"method": "ia3"}),
    (LABELLED["bert"], {"method": "freeze"}),
    (LABELLED["bert"], {"method": "adapter", "adapter_variant": "houlsby"}),
    (LABELLED["llama"], {"method": "qlora"}),
    (LABELLED["llama"], {"method": "full", "learning_rate": 1e-3}),
    (LABELLED["gpt2"], {"method": "lora"}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    families = (LLAMA, GPT2, *methods.LABELLED)
    return {one: methods.with_data(one, tmp_path_factory.mktemp("model")) for one in families}


def both(model: Path, output: Path, **changes: Any) -> tuple[Any, Any]:
    found = []
    for engine in ("embedded", "torch"):
        given = {"packing": False, "learning_rate": 1e-2, "threads": 1, **changes}
        given["engine"] = engine
        found.append(methods.train(model, output / engine, **given))
    return found[0], found[1]


def check(model: Path, output: Path, **changes: Any) -> None:
    ours, theirs = both(model, output, **changes)
    folders = output / "embedded", output / "torch"
    for event, name in (("step", "loss"), ("step", "grad_norm"), ("eval", "loss")):
        first, second = (column(folder, event, name) for folder in folders)
        assert len(first) >= 4
        assert second == pytest.approx(first, rel=1e-3), (event, name)
    first, second = (metrics(folder) for folder in folders)
    assert [line.keys() for line in first] == [line.keys() for line in second]
    assert [(one["step"], one.get("tokens")) for one in first] == [
        (one["step"], one.get("tokens")) for one in second
    ]
    assert files(folders[0]) == files(folders[1])
    assert ours.model["trainable"] == theirs.model["trainable"]
    assert ours.model["parameters"] == theirs.model["parameters"]
    held = [found.model["quantized_bytes"] for found in (ours, theirs)]
    # The embedded engine holds double-quantised absmax as float32.
    assert held[1] == held[0] if changes.get("double_quant") is False else held[1] <= held[0]
    assert (held[1] > 0) == (changes["method"] == "qlora")
    assert keys(ours.to_dict()) == keys(theirs.to_dict())


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def keys(found: Any) -> Any:
    """The names in results, without what the engine alone says of itself."""
    if isinstance(found, dict):
        return {name: keys(value) for name, value in found.items() if name != "engine"}
    return None


def name_of(case: Any) -> str:
    if isinstance(case, tuple):
        return "-".join(case)
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize(("family", "changes"), CASES, ids=name_of)
def test_both_engines_have_the_same_losses(
    family: Family, changes: dict[str, Any], models: dict[Family, Path], tmp_path: Path
) -> None:
    check(models[family], tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), MORE, ids=name_of)
def test_more_methods(
    family: Family, changes: dict[str, Any], models: dict[Family, Path], tmp_path: Path
) -> None:
    check(models[family], tmp_path, **changes)


def test_what_torch_leaves_is_read_by_the_embedded_engine(base: Path, tmp_path: Path) -> None:
    result = ferrotune.train(**settings(base, output=tmp_path / "run", engine="torch"))
    held_out = base.parent / "heldout.jsonl"
    found = ferrotune.evaluate(
        base, held_out, result.adapter, sequence_length=64, progress=False, threads=2
    )
    assert found.loss == pytest.approx(result.heldout_loss_best, rel=1e-5)
    said = "torch on CPU in float32 (the settings name it); 14 of 14 LoRA layers run through"
    for name in ("README.md", "report.html"):
        assert said in (tmp_path / "run" / name).read_text(), name
    assert 'engine = "torch"' in (tmp_path / "run" / "config.toml").read_text()


def test_a_folder_that_is_in_4_bits_already(tmp_path: Path) -> None:
    from test_four_bit_folder import save_4bit

    save_4bit(tmp_path / "base", "nf4", True, vocab_size=VOCABULARY)
    add_tokenizer(tmp_path / "base")
    write_lines(tmp_path / "train.jsonl", 60)
    write_lines(tmp_path / "heldout.jsonl", 20)
    check(tmp_path / "base", tmp_path, method="qlora", r=4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_ends_at_the_unbroken_runs_numbers(
    method: str, base: Path, tmp_path: Path
) -> None:
    changes = {"method": method, "engine": "torch", "lora_dropout": 0.2, "checkpoint_every": 2}
    changes["threads"] = 1
    ferrotune.train(**settings(base, output=tmp_path / "whole", **changes))

    def stop(event: dict[str, Any]) -> bool:
        return not (event["event"] == "step" and event["step"] == 3)

    broken = settings(base, output=tmp_path / "broken", **changes)
    with pytest.raises(ferrotune.TrainInterrupted):
        ferrotune.train(**broken, on_event=stop)
    assert len(column(tmp_path / "broken", "step", "loss")) == 3
    with pytest.raises(ValueError, match=r'engine was "torch" and is now "embedded"'):
        ferrotune.train(**{**broken, "engine": "embedded"}, resume=True)
    again = ferrotune.train(**{**broken, "engine": "auto"}, resume=True)
    assert again.model["engine"]["why"] == "the run began with it"
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    weights = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    parts = [(tmp_path / name / weights).read_bytes() for name in ("broken", "whole")]
    assert parts[0] == parts[1]


def test_which_engine_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ferrotune import _native
    from ferrotune.torch_engine import choice

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert choose("torch", "lora").why == choose("embedded", "lora").why == "the settings name it"
    monkeypatch.setattr(_native, "cuda_driver", lambda: (None, 13_000))
    monkeypatch.setattr(_native, "has_cuda", True)
    found = choose("auto", "lora")
    assert (found.name, found.why) == ("embedded", "no GPU was found (no NVIDIA driver)")
    monkeypatch.setattr(_native, "has_cuda", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto", "lora").why == "PyTorch found no GPU that it can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    found = choose("auto", "lora")
    assert (found.name, found.why) == ("torch", "PyTorch found a GPU, NVIDIA H100")
    there = choice.importlib.util.find_spec
    monkeypatch.setattr(
        choice.importlib.util, "find_spec", lambda name: None if name == "peft" else there(name)
    )
    assert choose("auto", "lora").why == "peft is not installed"
    with pytest.raises(ferrotune.SettingError, match="engine torch needs peft"):
        choose("torch", "lora")
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose("auto", "lora").why == "torchrun started 2 processes"
    with pytest.raises(ferrotune.SettingError, match="engine embedded runs in one process"):
        choose("embedded", "lora")


def test_bad_input_before_any_training(base: Path, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        given = settings(base, output=tmp_path / "run", engine="torch", **changes)
        with pytest.raises(ValueError, match=match):
            ferrotune.train(**given)
        assert not (tmp_path / "run").exists()

    refused("target_modules", target_modules=["q_prj"])
    refused("sequence_length 4096 is longer", sequence_length=4096)
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    refused("config.json makes it", model=broken)


def test_a_run_that_diverges_ends_in_order(base: Path, tmp_path: Path) -> None:
    changes = {"method": "full", "learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0}
    given = settings(base, output=tmp_path / "run", engine="torch", **changes)
    with pytest.raises(RuntimeError, match=r"step 2: the (held-out )?loss is"):
        ferrotune.train(**given)


RANKS = """
import json, sys
import ferrotune
result = ferrotune.train(**json.loads(sys.argv[1]))
# In one write: both processes have the same pipe.
sys.stdout.write(json.dumps([result.steps, result.heldout_loss_best]) + "\\n")
"""


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(base: Path, tmp_path: Path) -> None:
    given = settings(base, output=tmp_path / "two", engine="torch", batch_size=5, threads=1)
    given = {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    script = tmp_path / "run.py"
    script.write_text(RANKS)
    done = torchrun(script, json.dumps(given))
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    one = ferrotune.train(**{**given, "output": tmp_path / "one"})
    assert said == [said[0]] * 2
    assert said[0] == pytest.approx([one.steps, one.heldout_loss_best], rel=1e-5)
    for event, name in (("step", "loss"), ("step", "grad_norm"), ("eval", "loss")):
        single, shared = (column(tmp_path / run, event, name) for run in ("one", "two"))
        assert shared == pytest.approx(single, rel=1e-5), (event, name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    bad = torchrun(script, json.dumps({**given, "output": str(tmp_path / "bad"), "r": 0}))
    assert bad.returncode != 0
    assert "r must be at least 1, not 0" in bad.stderr


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
