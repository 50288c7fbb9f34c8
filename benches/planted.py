"""Faults planted in labelled records, in known numbers and from a fixed seed.

What a fault is found by is a key: the text of its record, or the spelling of its label.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from real_records import Rows

RARE = 10  # records, below which the audit calls a label rare

Planted = dict[str, dict[str, set[str]]]  # of each check: keys by the kind of fault


@dataclass
class Data:
    """Both sides of one data set, and what was planted in it."""

    train: Rows
    heldout: Rows
    planted: Planted = field(default_factory=dict)

    def note(self, check: str, kind: str, key: str) -> None:
        self.planted.setdefault(check, {}).setdefault(kind, set()).add(key)


def divide(rows: Rows, seed: int = 0) -> Data:
    """Every tenth record is held out, in an order from the seed."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    held = set(order[: len(rows) // 10])
    return Data(
        [row for index, row in enumerate(rows) if index not in held],
        [row for index, row in enumerate(rows) if index in held],
    )


def plant(data: Data, foreign: list[str], seed: int = 1) -> Data:
    """The same data with faults: in a record of its own, or in one of those that are there.

    One in twenty labels is flipped; of every other kind of fault there is one in two hundred
    records. No record gets two.
    """
    chance = random.Random(seed)
    rows, held = list(data.train), list(data.heldout)
    result = Data(rows, held)
    labels = sorted({label for _, label in rows})
    share = max(len(rows) // 200, 12)
    free = iter(chance.sample(range(len(rows)), len(rows)))

    def take(count: int) -> list[int]:
        return [next(free) for _ in range(count)]

    # In place.
    for place in take(10 * share):
        text, label = rows[place]
        rows[place] = (text, chance.choice([other for other in labels if other != label]))
        result.note("doubted_labels", "another label", text)
    for check, kinds in (("secrets", SECRETS), ("encoding", ENCODINGS)):
        for kind, make in kinds.items():
            for place in take(max(share // 4, 5)):
                text, label = rows[place]
                rows[place] = (make(text, chance), label)
                result.note(check, kind, rows[place][0])
    for kind, respell in SPELLINGS.items():
        for place in take(max(share // 4, 5)):
            text, label = rows[place]
            rows[place] = (text, respell(label))
            if rows[place][1] != label:
                result.note("label_variants", kind, rows[place][1])
    # Added.
    for place in take(share):
        rows.append(rows[place])
        result.note("exact_duplicates", "the same text", rows[place][0])
    for kind, edit in EDITS.items():
        for place in take(share):
            text, label = rows[place]
            rows.append((edit(text, chance), label))
            if rows[-1][0] != text:
                result.note("near_duplicates", kind, rows[-1][0])
    for place in take(share):
        text, label = rows[place]
        rows.append((text, chance.choice([other for other in labels if other != label])))
        for check in ("conflicting_labels", "exact_duplicates"):
            result.note(check, "the same text, another label", text)
    for text in chance.sample(foreign, min(share, len(foreign))):
        rows.append((text, chance.choice(labels)))
        long = sum(character.isalpha() for character in text) >= 60
        result.note("languages", f"German, {'60 letters or more' if long else 'shorter'}", text)
    for number in range(share):
        rows.append((" " * (number % 3), chance.choice(labels)))
        result.note("unusable", "an empty text", f"train.jsonl:{len(rows)}")
    for place in take(max(share // 4, 5)):
        parts = [rows[chance.randrange(len(data.train))][0] for _ in range(60)]
        rows.append((" ".join([rows[place][0], *parts]), rows[place][1]))
        result.note("lengths", "60 records in one", rows[-1][0])
    for number in range(3):
        rows.append((f"{rows[next(free)][0]} ({number})", "a rare label"))
        result.note("rare_labels", "a label of three records", "a rare label")
    counts = Counter(label for _, label in rows)
    for label in sorted(set.union(*result.planted["label_variants"].values())):
        if counts[label] < RARE:
            result.note("rare_labels", "a variant that few records have", label)
    # Leaks.
    for place in take(share):
        held.append(rows[place])
        result.note("leakage", "the same text", rows[place][0])
    for kind, edit in EDITS.items():
        for place in take(max(share // len(EDITS), 5)):
            text, label = rows[place]
            held.append((edit(text, chance), label))
            if held[-1][0] != text:
                result.note("leakage", kind, held[-1][0])
    return result


def _shouted(text: str, chance: random.Random) -> str:
    return text.upper() + "!"


def _one_word(text: str, chance: random.Random) -> str:
    words = text.split(" ")
    words[chance.randrange(len(words))] = chance.choice(("another", "other", "new", "quite"))
    return " ".join(words)


def _typing_error(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text))
    return text[:at] + chance.choice(string.ascii_lowercase) + text[at + 1 :]


def _cut(text: str, chance: random.Random) -> str:
    return text[: len(text) * 9 // 10]


def _longer(text: str, chance: random.Random) -> str:
    return f"{text} (see there)"


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "in capitals": _shouted,
    "one letter changed": _typing_error,
    "one word changed": _one_word,
    "the last tenth cut off": _cut,
    "two words added": _longer,
}

SPELLINGS: dict[str, Callable[[str], str]] = {
    "in capitals": str.upper,
    "with a space behind": lambda label: label + " ",
}


def _random(characters: str, count: int, chance: random.Random) -> str:
    return "".join(chance.choice(characters) for _ in range(count))


def _card(chance: random.Random) -> str:
    digits = [4, *(chance.randrange(10) for _ in range(14))]
    doubled = [digit * (1 + (place % 2 == 0)) for place, digit in enumerate(digits)]
    check = -sum(value - 9 * (value > 9) for value in doubled) % 10
    number = "".join(map(str, [*digits, check]))
    return " ".join(number[at : at + 4] for at in range(0, 16, 4))


def _iban(chance: random.Random) -> str:
    account = _random(string.digits, 18, chance)
    check = 98 - int(account + "131400") % 97  # DE and 00 behind it
    return f"DE{check:02d}{account}"


def _inside(make: Callable[[random.Random], str]) -> Callable[[str, random.Random], str]:
    def planted(text: str, chance: random.Random) -> str:
        words = text.split(" ")
        at = chance.randrange(len(words) + 1)
        return " ".join([*words[:at], make(chance), *words[at:]])

    return planted


_LETTERS = string.ascii_letters + string.digits
_NAMES = ("anna.kovacs", "j.smith", "lee", "maria_o", "tom+news")

SECRETS = {
    "an e-mail address": _inside(
        lambda chance: f"{chance.choice(_NAMES)}@{_random('abcdefgh', 6, chance)}.com"
    ),
    "an AWS access key": _inside(
        lambda chance: "AKIA" + _random("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16, chance)
    ),
    "a GitHub token": _inside(lambda chance: "ghp_" + _random(_LETTERS, 36, chance)),
    "an API key": _inside(lambda chance: "sk-" + _random(_LETTERS, 40, chance)),
    "a private key": _inside(
        lambda chance: f"-----BEGIN PRIVATE KEY----- {_random(_LETTERS, 60, chance)}"
    ),
    "a payment card": _inside(_card),
    "a bank account": _inside(_iban),
    "a password in a URL": _inside(
        lambda chance: f"ftp://root:{_random(_LETTERS, 9, chance)}@files.lan/x"
    ),
    "password = …": _inside(lambda chance: f"password = {_random(_LETTERS, 12, chance)}"),
    "a phone number": _inside(lambda chance: f"+49 30 {_random(string.digits, 8, chance)}"),
}


def _wrongly_decoded(text: str, chance: random.Random) -> str:
    words = text.split(" ")
    words.insert(chance.randrange(len(words) + 1), chance.choice(("café", "naïve", "“so”", "Zoë")))
    return " ".join(words).encode().decode("cp1252", "replace")


def _at_random(sign: str) -> Callable[[str, random.Random], str]:
    def planted(text: str, chance: random.Random) -> str:
        at = chance.randrange(len(text) + 1)
        return text[:at] + sign + text[at:]

    return planted


ENCODINGS = {
    "UTF-8 read as Windows-1252": _wrongly_decoded,
    "a replacement character": _at_random("\ufffd"),
    "a control character": _at_random("\x08"),
    "an HTML entity": _at_random("&quot;"),
}
