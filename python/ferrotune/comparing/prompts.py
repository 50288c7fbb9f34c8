"""Prompts: a text with examples in front of it, as a base language model is asked in context."""

import random
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
# What stands between an example and the next one.
GAP = "\n\n"


def question(record: Record) -> str:
    """What a record asks, without its answer."""
    return str(record["text"] if "text" in record else record["prompt"])


def answer(record: Record) -> str:
    return str(record["label"] if "label" in record else record["completion"])


def asked(record: Record) -> str:
    """The prompt whose completion is the record's answer."""
    if "label" in record:
        return f"Text: {record['text']}\nLabel: "
    return str(record["prompt"])


def in_context(record: Record, examples: Sequence[Record]) -> str:
    """The prompt behind examples with their answers, the last one nearest to it."""
    shown = "".join(f"{asked(one)}{answer(one)}{GAP}" for one in examples)
    return f"{shown}{asked(record)}"


def fixed_examples(train: Sequence[Record], count: int, seed: int) -> list[Record]:
    """`count` training records drawn from `seed`, of a classifier's labels in turn."""
    order = random.Random(seed).sample(train, len(train))
    if not order or "label" not in order[0]:
        return order[:count]
    labels = sorted({answer(one) for one in order})
    by_label = [[one for one in order if answer(one) == label] for label in labels]
    deepest = max(map(len, by_label))
    turns = (own[at] for at in range(deepest) for own in by_label if at < len(own))
    return [one for one, _ in zip(turns, range(count), strict=False)]
