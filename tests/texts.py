"""A byte-level tokenizer and small texts for the tests that train."""

from __future__ import annotations

import random
from pathlib import Path

VOCABULARY = 300
BOS, EOS = 1, 2
_TEXT = """
and the of to a in that he shall unto for I his not they be is with them all which said day
house king people son man came land before went upon made great children Israel water fire
"""
WORDS = _TEXT.split()


def add_tokenizer(folder: Path) -> None:
    """tokenizer.json of a byte-level BPE, `<s>` 1 and `</s>` 2 as in Llama's default config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))


def lines(count: int, seed: int = 0, shortest: int = 3, longest: int = 14) -> list[str]:
    """Different lines of words, the later words drawn from the front of the list more often."""
    source = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        picked = [
            WORDS[int(len(WORDS) * source.random() ** 2)]
            for _ in range(source.randint(shortest, longest))
        ]
        found[" ".join(picked)] = None
    return list(found)


def write_lines(path: Path, count: int, seed: int = 0, **lengths: int) -> Path:
    """One record a line in .jsonl, one a paragraph in .txt."""
    import json

    texts = lines(count, seed, **lengths)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("\n\n".join(texts) + "\n")
    return path
