"""Training beside torch's AdamW and PEFT, evaluation beside torch; accumulation and seeds."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ferrotune
from llamas import IGNORE, computing_in, load
from runs import base, column, mean_loss, metrics, settings, tokenised
from texts import BOS, EOS, lines, write_lines

__all__ = ["base"]

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

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
        found["loss"].append(float(loss.detach()))
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
        "learning_rate": 3e-3 if method == "full" else 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 2.0 if method == "full" else 4.0,
    }
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
    # AdamW divides by the root of the squares: rounding near zero grows with the steps.
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
                base,
                base.parent / "train.jsonl",
                sequence_length=64,
                packing=packing,
                batch_size=batch_size,
                threads=2,
                progress=False,
            )
            assert found.tokens == tokens
            assert found.loss == pytest.approx(expected, rel=1e-6)
            assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
            bits = found.loss * tokens / math.log(2) / sum(len(text.encode()) for text in texts)
            assert found.bits_per_byte == pytest.approx(bits, rel=1e-9)


def test_intervals_of_an_evaluation_are_numpys_bootstrap(base: Path) -> None:
    """Of loss, perplexity and bits per byte, over records as they were drawn again and again."""
    import torch

    data = tokenised(base, "train.jsonl")
    ids, targets = (torch.from_numpy(x.astype(np.int64)) for x in (data.ids, data.targets))
    with torch.no_grad():
        logits = load(base)(ids, use_cache=False).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    rows, counts = losses.reshape(targets.shape).sum(1).numpy(), (targets != IGNORE).sum(1).numpy()
    drawn = np.random.default_rng(1).integers(len(rows), size=(20_000, len(rows)))
    low, high = np.quantile(rows[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    found = ferrotune.evaluate(
        base, base.parent / "train.jsonl", sequence_length=64, packing=False, threads=2,
        progress=False,
    )  # fmt: skip
    assert found.generation is not None
    loss, per_byte = found.generation.loss, found.generation.bits_per_byte
    assert loss.value == pytest.approx(found.loss)
    assert [loss.low, loss.high] == pytest.approx([low, high], abs=0.15 * (high - low))
    perplexity = found.generation.perplexity
    ends = [math.exp(loss.low), math.exp(loss.high)]
    assert [perplexity.low, perplexity.high] == pytest.approx(ends)
    assert per_byte is not None
    assert per_byte.value == found.bits_per_byte
    ratio = per_byte.value / loss.value
    assert [per_byte.low, per_byte.high] == pytest.approx([loss.low * ratio, loss.high * ratio])


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
                base,
                data=data,
                method=method,
                packing=packing,
                sequence_length=40,
                batch_size=rows,
                gradient_accumulation=accumulation,
                max_steps=3,
                warmup_steps=0,
                output=output,
                target_modules="all-linear",
            )
        )
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


def test_folders_and_files_are_read_and_fingerprinted(base: Path, tmp_path: Path) -> None:
    texts = lines(20, seed=8)
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    first, second = tmp_path / "data" / "a.txt", tmp_path / "data" / "deeper" / "b.txt"
    first.write_text("\n".join(texts[:10]))
    second.write_text("\n".join(texts[10:]))
    heldout = base.parent / "heldout.jsonl"
    given = settings(base, data=tmp_path / "data", output=tmp_path / "run")
    result = ferrotune.train(**given)
    assert result.data["train_records"] == 20
    found = json.loads((tmp_path / "run" / "results.json").read_text())["files"]
    assert [file["path"] for file in found] == [str(first), str(second), str(heldout)]
    assert [file["bytes"] for file in found] == [x.stat().st_size for x in (first, second, heldout)]
    assert "| `b.txt` |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_of_a_run_have_the_modes_of_any_file(umask: int, base: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        ferrotune.train(**settings(base, output=tmp_path / "run"))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 9
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_threads_do_not_change_the_losses_beyond_rounding(base: Path, tmp_path: Path) -> None:
    cores = os.cpu_count() or 1
    for threads in (1, max(2, cores)):
        ferrotune.train(
            **settings(base, packing=True, threads=threads, output=tmp_path / str(threads))
        )
    one, many = (column(tmp_path / str(n), "step", "loss") for n in (1, max(2, cores)))
    assert one == pytest.approx(many, rel=1e-5)
