"""The audit's time and memory on a million records, and what it finds of planted faults.

    PYTHONPATH=python python benches/audit_cpu.py

A million short JSON records (a sentence of seven to twenty words and one of eight labels), among
them known numbers of exact and near duplicates, leaks into held-out records, flipped labels and
e-mail addresses. Audited in a process of its own on two threads, without the cross-validated label
check; that one is made on a hundred thousand such records.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

LABELS, WORDS, OWN = 8, 20_000, 40
TITLES = {
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "leakage": "leaks into the held-out records",
    "doubted_labels": "flipped labels",
    "secrets": "e-mail addresses",
}


def make(folder: Path, records: int) -> dict[str, set[str]]:
    """Writes data.jsonl and heldout.jsonl; gives the planted records, by check, as `file:line`.

    Two of a record's words are of its label's own 40, which is what its label can be told by.
    """
    chance = random.Random(0)
    words = [
        "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(chance.randrange(3, 9)))
        for _ in range(WORDS)
    ]

    def sentence(label: int) -> list[str]:
        first = OWN * LABELS
        picked = [
            words[first + int((WORDS - first) * chance.random() ** 2)]
            for _ in range(chance.randrange(5, 19))
        ]
        return [*picked, *(words[OWN * label + chance.randrange(OWN)] for _ in range(2))]

    rows: list[tuple[list[str], int]] = []
    for _ in range(records):
        label = chance.randrange(LABELS)
        rows.append((sentence(label), label))
    places = chance.sample(range(records // 2, records), records // 25)
    sources = iter(chance.sample(range(records // 2), records // 4))
    share = len(places) // 4
    planted: dict[str, set[str]] = {name: set() for name in TITLES}
    kinds = ("exact_duplicates", "near_duplicates", "doubted_labels", "secrets")
    for number, place in enumerate(places[: 4 * share]):
        kind = kinds[number // share]
        text, label = rows[place]
        if kind in ("exact_duplicates", "near_duplicates"):
            text, label = rows[next(sources)]
            while len(text) < 12 and kind == "near_duplicates":
                text, label = rows[next(sources)]
            if kind == "near_duplicates":  # a letter in the middle is another one
                middle = len(text) // 2
                letter = "z" if text[middle].startswith("q") else "q"
                text = [*text[:middle], letter + text[middle][1:], *text[middle + 1 :]]
        elif kind == "doubted_labels":
            label = (label + chance.randrange(1, LABELS)) % LABELS
        else:
            text = [*text, f"{words[chance.randrange(WORDS)]}@example.org"]
        rows[place] = (text, label)
        planted[kind].add(f"data.jsonl:{place + 1}")
    held = []
    for number in range(records // 100):
        label = chance.randrange(LABELS)
        text = sentence(label)
        if number % 10 == 0:
            text, label = rows[chance.randrange(records // 2)]
            planted["leakage"].add(f"heldout.jsonl:{number + 1}")
        held.append((text, label))
    for name, part in (("data.jsonl", rows), ("heldout.jsonl", held)):
        with (folder / name).open("w", encoding="utf-8") as file:
            for text, label in part:
                file.write(json.dumps({"text": " ".join(text), "label": f"class {label}"}) + "\n")
    return planted


def child(folder: Path, threads: int, predict: bool) -> None:
    import ferrotune

    start = time.perf_counter()
    result = ferrotune.audit(
        folder / "data.jsonl",
        heldout_data=folder / "heldout.jsonl",
        predict_labels=predict,
        examples=10**9,
        threads=threads,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        one.check: sorted({example.place for example in one.examples}) for one in result.findings
    }
    counts = {one.check: one.count for one in result.findings}
    (folder / "found.json").write_text(
        json.dumps({"seconds": seconds, "peak": peak, "found": found, "counts": counts,
                    "parts": dict(result.seconds)})
    )  # fmt: skip


def run(folder: Path, threads: int, predict: bool) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", str(folder), "--threads", str(threads)]
    subprocess.run(words + ["--predict"] * predict, check=True)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="(default 1000000)")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--predict", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.threads, options.predict)
        return 0

    audits: dict[bool, tuple[dict[str, set[str]], dict[str, Any]]] = {}
    for predict, records in ((False, options.records), (True, options.records // 10)):
        with tempfile.TemporaryDirectory() as name:
            planted = make(Path(name), records)
            audits[predict] = (planted, run(Path(name), options.threads, predict))
    without, predicting = audits[False][1], audits[True][1]
    rows = []
    for check, title in TITLES.items():
        planted, audited = audits[check == "doubted_labels"]
        wanted, found = planted[check], set(audited["found"][check])
        count = audited["counts"][check]
        # Of exact duplicates the examples are the first ones of a text, not its copies.
        hits = min(count, len(wanted)) if check == "exact_duplicates" else len(found & wanted)
        rows.append(
            [title, f"{len(wanted):,}", f"{count:,}", f"{hits / len(wanted):.3f}",
             f"{hits / max(count, 1):.3f}"]
        )  # fmt: skip
    bars = [
        common.Bar("time without predicted labels", without["seconds"], 60, False, "s"),
        common.Bar("peak memory", without["peak"] / 1e9, 1.5, False, "GB"),
    ]
    parts = [[part, f"{seconds:.1f} s"] for part, seconds in without["parts"].items()]
    body = "\n\n".join(
        [
            common.table(["fault", "planted", "found", "recall", "precision"], rows),
            common.table(["part", f"{options.records:,} records"], parts),
            (
                f"Predicting labels, five-fold on {options.records // 10:,} records, takes "
                f"{predicting['parts']['predicted labels']:.1f} s more."
            ),
        ]
    )
    if options.no_write:
        print(body)
        print(common.bar_table(bars))
        return 0 if all(bar.passed for bar in bars) else 1
    record = {
        "machine": common.machine(options.threads, ["ferrotune"]),
        "results": {
            "seconds": without["seconds"],
            "peak_bytes": without["peak"],
            "parts": without["parts"],
            "parts with predicted labels": predicting["parts"],
            "faults": rows,
        },
    }
    passed = common.write("audit_cpu", "The audit", record, body, bars)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
