"""What the tests of training share: a small model with data, settings, and metrics read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamas import IGNORE, Batch, llama, save
from texts import BOS, EOS, VOCABULARY, add_tokenizer, write_lines

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
        "model": base,
        "data": base.parent / "train.jsonl",
        "heldout_data": base.parent / "heldout.jsonl",
        "method": "lora",
        "engine": "embedded",
        "r": 4,
        "sequence_length": 64,
        "packing": False,
        "batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "eval_every": 2,
        "threads": 2,
        "progress": False,
        **changes,
    }


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
    import torch

    ids, targets = (torch.from_numpy(x.astype(np.int64)) for x in (data.ids, data.targets))
    return torch.nn.functional.cross_entropy(
        model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )
