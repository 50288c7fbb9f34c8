"""Training beside torch's AdamW and PEFT; accumulation, seeds, resuming, early stopping, the demo."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
from ferrotune.config import read_toml
from llamas import IGNORE, Batch, computing_in, llama, load, save
from python_face import environment
from texts import BOS, EOS, VOCABULARY, add_tokenizer, lines, write_lines

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
# Fields of metrics.jsonl that say how long something took.
TIMES = {"tokens_per_second", "elapsed_seconds", "remaining_seconds"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer; train.jsonl (32 lines) and heldout.jsonl (10) beside it."""
    folder = tmp_path_factory.mktemp("base")
    made = save(llama(**SIZES), folder / "base")
    add_tokenizer(made)
    write_lines(folder / "train.jsonl", 32)
    write_lines(folder / "heldout.jsonl", 10, seed=1)
    return made


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": base, "data": base.parent / "train.jsonl", "heldout_data": base.parent / "heldout.jsonl",
        "method": "lora", "r": 4, "sequence_length": 64, "packing": False, "batch_size": 8, "max_steps": 6,
        "learning_rate": 1e-3, "warmup_steps": 2, "eval_every": 2, "threads": 2, "progress": False,
        **changes,
    }  # fmt: skip


def metrics(folder: Path, times: bool = False) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found if times else [{k: x for k, x in line.items() if k not in TIMES} for line in found]


def column(folder: Path, event: str, name: str) -> list[Any]:
    return [line[name] for line in metrics(folder) if line["event"] == event]


def tokenised(base: Path, name: str, length: int = 64) -> Batch:
    """A file's records as one batch, a record a row: `<s>` text `</s>`, padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in (base.parent / name).read_text().splitlines()]
    rows = [[BOS, *tokenizer.encode(text).ids, EOS] for text in texts]
    ids, targets = (
        np.zeros((len(rows), length), np.uint32),
        np.full((len(rows), length), IGNORE, np.int32),
    )
    for at, row in enumerate(rows):
        assert len(row) < length
        ids[at, : len(row)] = row
        targets[at, : len(row) - 1] = row[1:]
    return Batch(ids, targets, np.tile(np.arange(length, dtype=np.uint32), (len(rows), 1)))


def mean_loss(model: Any, data: Batch) -> Any:
    ids, targets = (torch.from_numpy(x.astype(np.int64)) for x in (data.ids, data.targets))
    return torch.nn.functional.cross_entropy(
        model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )


# Beside torch


def torch_training(model: Any, base: Path, steps: int, **options: Any) -> dict[str, list[float]]:
    """Full-batch AdamW with warm-up, cosine decay to a tenth, and clipping, in the model's type."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    named = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    groups = [
        {"params": [x for _, x in named if x.dim() > 1], "weight_decay": options["weight_decay"]},
        {"params": [x for _, x in named if x.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=options["learning_rate"])
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 2, steps, min_lr_rate=0.1)
    data, heldout = tokenised(base, "train.jsonl"), tokenised(base, "heldout.jsonl")
    found: dict[str, list[float]] = {
        "loss": [],
        "grad_norm": [],
        "learning_rate": [],
        "heldout": [],
    }
    for step in range(steps + 1):
        with torch.no_grad():
            found["heldout"].append(float(mean_loss(model, heldout)))
        if step == steps:
            break
        optimizer.zero_grad()
        loss = mean_loss(model, data)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([x for _, x in named], options["max_grad_norm"])
        found["loss"].append(float(loss))
        found["grad_norm"].append(float(norm))
        found["learning_rate"].append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_training_is_torchs_training(method: str, base: Path, tmp_path: Path) -> None:
    """Every step's loss, gradient norm and learning rate, and every held-out loss.

    All of the data is one batch, so that the order of the rows does not matter.
    """
    options: dict[str, Any] = {
        "learning_rate": 3e-3 if method == "full" else 1e-2, "weight_decay": 0.1,
        "max_grad_norm": 2.0 if method == "full" else 4.0,
    }  # fmt: skip
    steps = 12
    same = settings(
        base,
        method=method,
        batch_size=32,
        max_steps=steps,
        eval_every=1,
        seed=5,
        use_rslora=True,
        **options,
    )
    ferrotune.train(**same, output=tmp_path / "run")
    if method == "full":
        model = load(base)
    else:
        peft = pytest.importorskip("peft")
        # The first adapter, which depends on the seed alone: with no learning rate none is better.
        still = {**same, "learning_rate": 1e-30, "max_steps": 1, "weight_decay": 0.0}
        first = ferrotune.train(**still, output=tmp_path / "first")
        assert first.best_step == 0
        if method == "qlora":
            pytest.importorskip("bitsandbytes")
        from test_adapters_engine import bitsandbytes_base

        frozen = (
            load(base, "float32") if method == "lora" else bitsandbytes_base("nf4")(base, "float32")
        )
        model = computing_in(
            peft.PeftModel.from_pretrained(frozen, first.adapter, is_trainable=True), "float64"
        )
        a = [x for name, x in model.named_parameters() if "lora_A" in name]
        b = [x for name, x in model.named_parameters() if "lora_B" in name]
        assert not any(x.any() for x in b)
        # PEFT's first A: uniform in ±1/√k.
        for x in a:
            bound = x.shape[1] ** -0.5
            assert 0.9 * bound < float(x.detach().abs().max()) <= bound
            assert float(x.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    expected = torch_training(model, base, steps, **options)
    # AdamW divides by the root of the squares: rounding in gradients near zero grows with the steps.
    for name, early, late in (
        ("loss", 1e-6, 1e-4),
        ("grad_norm", 1e-5, 1e-3),
        ("learning_rate", 1e-9, 1e-9),
    ):
        found = column(tmp_path / "run", "step", name)
        assert found[:3] == pytest.approx(expected[name][:3], rel=early), name
        assert found == pytest.approx(expected[name], rel=late), name
    assert column(tmp_path / "run", "eval", "loss") == pytest.approx(expected["heldout"], rel=1e-4)
    assert expected["heldout"][-1] < expected["heldout"][0] - 0.5
    # Some steps were clipped and some not.
    assert max(expected["grad_norm"]) > options["max_grad_norm"] > min(expected["grad_norm"])


def test_evaluate_is_torchs_mean_loss(base: Path) -> None:
    """Packed or not, in batches of any size: nats a token, perplexity, bits a byte."""
    expected = float(mean_loss(load(base), tokenised(base, "train.jsonl")).detach())
    tokens = int((tokenised(base, "train.jsonl").targets != IGNORE).sum())
    texts = [
        json.loads(line)["text"] for line in (base.parent / "train.jsonl").read_text().splitlines()
    ]
    for packing in (False, True):
        for batch_size in (1, 7, 64):
            found = ferrotune.evaluate(
                base, base.parent / "train.jsonl", sequence_length=64, packing=packing,
                batch_size=batch_size, threads=2, progress=False,
            )  # fmt: skip
            assert found.tokens == tokens
            assert found.loss == pytest.approx(expected, rel=1e-6)
            assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
            bits = found.loss * tokens / math.log(2) / sum(len(text.encode()) for text in texts)
            assert found.bits_per_byte == pytest.approx(bits, rel=1e-9)


def test_greedy_text_is_transformers(base: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    model = load(base)
    for prompt in ("and the", "In the house", "w"):
        ids = torch.tensor([[BOS, *tokenizer.encode(prompt).ids]])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[
                0, ids.shape[1] :
            ].tolist()
        if EOS in out:
            out = out[: out.index(EOS)]
        found = ferrotune.generate(base, prompt, max_tokens=40, temperature=0.0, threads=2)
        assert found.text == tokenizer.decode(out)


# Accumulation, seeds


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("packing", [False, True])
def test_accumulated_batches_are_one_batch(
    method: str, packing: bool, base: Path, tmp_path: Path
) -> None:
    """8 rows at once, 4 batches of 2, 8 of 1: the rows differ in length, tokens weigh the same."""
    runs = []
    # So many lines that the steps stay in one epoch, at whose end a batch may be smaller.
    data = write_lines(tmp_path / "many.jsonl", 120, seed=8)
    for rows, accumulation in ((8, 1), (2, 4), (1, 8)):
        output = tmp_path / f"{rows}"
        ferrotune.train(
            **settings(
                base, data=data, method=method, packing=packing, sequence_length=40, batch_size=rows,
                gradient_accumulation=accumulation, max_steps=3, warmup_steps=0, output=output,
                target_modules="all-linear",
            )
        )  # fmt: skip
        runs.append(output)
    tokens = column(runs[0], "step", "tokens")
    assert len(set(column(runs[0], "step", "loss"))) == len(tokens) == 3
    for other in runs[1:]:
        assert column(other, "step", "tokens") == tokens
        for event, name in (("step", "loss"), ("step", "grad_norm"), ("eval", "loss")):
            assert column(other, event, name) == pytest.approx(
                column(runs[0], event, name), abs=1e-5
            ), name


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_one_seed_gives_the_same_numbers(method: str, base: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        ferrotune.train(
            **settings(
                base,
                method=method,
                packing=True,
                lora_dropout=0.2,
                seed=seed,
                output=tmp_path / name,
            )
        )
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    assert metrics(tmp_path / "one") != metrics(tmp_path / "other")
    kept = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / kept).read_bytes() == (tmp_path / "two" / kept).read_bytes()


# Interrupted runs


def command(base: Path, output: Path, **changes: Any) -> list[str]:
    words = [sys.executable, "-m", "ferrotune", "train"]
    every = settings(base, output=output, lora_dropout=0.1, packing=True, batch_size=2, **changes)
    for name, value in every.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, str(value)]
    return words


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def stop_after(words: list[str], folder: Path, steps: int, how: signal.Signals) -> tuple[int, str]:
    """Starts a run, sends it `how` after `steps` steps; its exit code and standard error."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not path.exists() or path.read_text().count('"event":"step"') < steps:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


STEPS = 250


@pytest.fixture(scope="module")
def unbroken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    found = run(command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7))
    assert found.returncode == 0, found.stderr
    assert len(column(folder, "step", "loss")) == STEPS
    return folder


def same_end(folder: Path, unbroken: Path) -> None:
    assert metrics(folder) == metrics(unbroken)
    kept = "adapter/adapter_model.safetensors"
    assert (folder / kept).read_bytes() == (unbroken / kept).read_bytes()


def test_ctrl_c_leaves_a_checkpoint_that_goes_on(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7)
    code, said = stop_after(words, folder, 15, signal.SIGINT)
    assert code == 130, said
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert line.startswith("interrupted: ")
    assert "--resume" in line
    done = len(column(folder, "step", "loss"))
    assert 15 <= done < STEPS
    assert column(folder, "step", "loss") == column(unbroken, "step", "loss")[:done]
    # The command that the message names.
    found = run([sys.executable, "-m", *line.split("go on with: ")[1].split()])
    assert found.returncode == 0, found.stderr
    same_end(folder, unbroken)


def test_a_killed_run_goes_on_from_its_checkpoint(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    """SIGKILL at any time, twice: nothing can be written then, and the numbers are the same."""
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7)
    assert stop_after(words, folder, 23, signal.SIGKILL)[0] == -signal.SIGKILL
    assert list(folder.glob("checkpoint*/state.json"))
    again = [
        sys.executable,
        "-m",
        "ferrotune",
        "train",
        "--config",
        str(folder / "config.toml"),
        "--resume",
    ]
    assert stop_after(again, folder, 60, signal.SIGKILL)[0] == -signal.SIGKILL
    found = run(again)
    assert found.returncode == 0, found.stderr
    same_end(folder, unbroken)
    assert not list(folder.glob("checkpoint.*"))
    assert not list(folder.glob(".lock"))


def test_a_checkpoint_that_a_crash_left_aside_is_found(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    """A crash between the two renames leaves `checkpoint.old` alone."""
    folder = tmp_path / "run"
    words = command(base, folder, max_steps=STEPS, eval_every=10, checkpoint_every=7)
    assert stop_after(words, folder, 10, signal.SIGKILL)[0] == -signal.SIGKILL
    if (folder / "checkpoint").exists():
        (folder / "checkpoint").rename(folder / "checkpoint.old")
    found = run(
        [
            sys.executable,
            "-m",
            "ferrotune",
            "train",
            "--config",
            str(folder / "config.toml"),
            "--resume",
        ]
    )
    assert found.returncode == 0, found.stderr
    same_end(folder, unbroken)


def test_a_longer_run_goes_on_from_a_finished_one(base: Path, tmp_path: Path) -> None:
    """With a constant learning rate, 4 steps and 4 more are 8."""
    same = settings(base, schedule="constant", warmup_steps=0, seed=2, lora_dropout=0.1)
    whole = ferrotune.train(**{**same, "max_steps": 8}, output=tmp_path / "whole")
    ferrotune.train(**{**same, "max_steps": 4}, output=tmp_path / "parts")
    parts = ferrotune.train(**{**same, "max_steps": 8}, output=tmp_path / "parts", resume=True)
    assert column(tmp_path / "parts", "step", "loss") == column(tmp_path / "whole", "step", "loss")
    assert parts.heldout_loss_best == whole.heldout_loss_best


@pytest.mark.parametrize(
    "change", [{"r": 5}, {"seed": 9}, {"learning_rate": 5e-3}, {"batch_size": 4}]
)
def test_a_run_does_not_go_on_with_other_settings(
    change: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    same = settings(base, schedule="constant", warmup_steps=0)
    ferrotune.train(**{**same, "max_steps": 2}, output=tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=next(iter(change))):
        ferrotune.train(**{**same, "max_steps": 4, **change}, output=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    ferrotune.train(**{**same, "max_steps": 4}, output=tmp_path / "run", resume=True)


# Early stopping


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_early_stopping_keeps_the_best_weights(method: str, base: Path, tmp_path: Path) -> None:
    """Few lines and a high rate: the held-out loss turns, the run stops, the best weights stay."""
    data = write_lines(tmp_path / "few.jsonl", 6, seed=3)
    result = ferrotune.train(
        **settings(
            base, data=data, method=method, max_steps=300, learning_rate=3e-2 if method != "full" else 3e-3,
            eval_every=2, patience=3, output=tmp_path / "run", target_modules="all-linear",
        )
    )  # fmt: skip
    evals = [line for line in metrics(tmp_path / "run") if line["event"] == "eval"]
    losses = {line["step"]: line["loss"] for line in evals}
    assert result.stop_reason == "early_stopping"
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.heldout_loss_best == min(losses.values())
    assert result.heldout_loss_last == evals[-1]["loss"] > min(losses.values())
    assert [line["step"] for line in evals][-4] == result.best_step
    assert 0 < (result.best_step or 0) < result.steps < 300
    model, adapter = (result.weights, None) if method == "full" else (base, result.adapter)
    found = ferrotune.evaluate(
        model, base.parent / "heldout.jsonl", adapter, sequence_length=64, packing=False, threads=2,
        quant_type="nf4" if method == "qlora" else None, batch_size=8, progress=False,
    )  # fmt: skip
    assert found.loss == pytest.approx(result.heldout_loss_best, rel=1e-6)


def test_prompts_are_read_and_not_trained(base: Path, tmp_path: Path) -> None:
    """The loss of prompt and completion counts the completion's tokens and the end alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    pairs = [(f"{text.split()[0]} ", " ".join(text.split()[1:])) for text in lines(12, seed=6)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    model, total, count = load(base), 0.0, 0
    for prompt, completion in pairs:
        before, both = tokenizer.encode(prompt).ids, tokenizer.encode(prompt + completion).ids
        ids = both if both[: len(before)] == before else before + tokenizer.encode(completion).ids
        row = torch.tensor([[BOS, *ids, EOS]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                model(row).logits[0, :-1], row[0, 1:], reduction="none"
            )
        total += float(losses[len(before) :].sum())
        count += len(losses) - len(before)
    found = ferrotune.evaluate(base, data, sequence_length=64, threads=2, progress=False)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-6)


# The demo


def test_the_demo(tmp_path: Path) -> None:
    """A few seconds of it: the held-out loss falls and every promised file is there."""
    for seconds in (8, 60):  # the longer one for an unoptimised build
        folder = tmp_path / f"demo-{seconds}"
        result = ferrotune.demo(folder, seconds=seconds, threads=2, progress=False)
        trained = result.train
        if trained.steps >= 10:
            break
    assert trained.stop_reason in ("max_seconds", "finished")
    assert trained.heldout_loss_before is not None
    assert trained.heldout_loss_best is not None
    assert trained.heldout_loss_best < trained.heldout_loss_before - 0.1
    assert trained.model["quantized_bytes"] > 0
    assert len(result.samples) == 2
    assert all(
        sample.before and sample.after and sample.before != sample.after
        for sample in result.samples
    )
    names = {
        "config.toml", "metrics.jsonl", "curves.png", "results.json", "README.md", "checkpoint/state.json",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md",
    }  # fmt: skip
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


def test_threads_do_not_change_the_losses_beyond_rounding(base: Path, tmp_path: Path) -> None:
    cores = os.cpu_count() or 1
    for threads in (1, max(2, cores)):
        ferrotune.train(
            **settings(base, packing=True, threads=threads, output=tmp_path / str(threads))
        )
    one, many = (column(tmp_path / str(n), "step", "loss") for n in (1, max(2, cores)))
    assert one == pytest.approx(many, rel=1e-5)
