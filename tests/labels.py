"""Labelled texts and the models that are trained on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from families import saved
from texts import BOS, EOS, VOCABULARY, WORDS, add_tokenizer

TOPICS = {"sea": ["water", "came"], "land": ["people", "king"], "sky": ["fire", "day"]}


def write_labelled(path: Path, count: int, seed: int = 0, topics: Any = None) -> Path:
    """Texts of common words, in which words of the label's own stand."""
    source = random.Random(seed)
    names = list(topics or TOPICS)
    with path.open("w") as file:
        for at in range(count):
            label = names[at % len(names)]
            words = source.choices(WORDS[:12], k=source.randint(2, 9))
            for own in TOPICS.get(label, ["son"]):
                words.insert(source.randint(0, len(words)), own)
            words.append(f"{at}")
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


def classifier(
    family: str, folder: Path, kind: str = "ForSequenceClassification", **changes: Any
) -> Path:
    """A model with a tokenizer whose post-processor puts `<s>` and `</s>` around a text."""
    from tokenizers import Tokenizer, processors

    saved(family, folder, kind, vocab_size=VOCABULARY, **changes)
    add_tokenizer(folder)
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.save(path)
    return folder


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "data": model.parent / "train.jsonl",
        "heldout_data": model.parent / "heldout.jsonl",
        "near_duplicates": 0.0,
        "method": "lora",
        "r": 4,
        "sequence_length": 48,
        "batch_size": 8,
        "max_steps": 40,
        "learning_rate": 5e-3,
        "warmup_steps": 4,
        "eval_every": 20,
        "threads": 2,
        "progress": False,
        **changes,
    }


def encoded(model: Path, path: Path, length: int = 48) -> tuple[list[list[int]], list[str]]:
    """Every text's ids as transformers' fast tokenizers give them, and its label."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [tokenizer.encode(one["text"]).ids for one in records], [one["label"] for one in records]


def logits_of(model: Any, ids: list[list[int]]) -> Any:
    """transformers' logits, the rows padded together."""
    import torch

    columns = max(map(len, ids))
    padded = torch.tensor([row + [0] * (columns - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (columns - len(row)) for row in ids])
    with torch.no_grad():
        return model(padded, attention_mask=mask).logits.double().numpy()
