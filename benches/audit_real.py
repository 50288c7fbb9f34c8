"""What the audit finds in real data, as it is and with faults planted in known numbers.

    apt-get update
    PYTHONPATH=python python benches/audit_real.py

Subjects of FOLDOC's entries, sections of Debian's packages, fortunes by topic: read on this machine
(`real_records.py`; `--packages FOLDER` takes the .deb files from there), audited as they are, and
again with faults planted (`planted.py`). Recall is the share of the planted faults that is found,
precision the planted share of what is found and was not found in the data as they are. Near
duplicates are held against a comparison of all pairs, too. There is no bar: what is missed is in
the table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import real_records
from planted import Data, divide, plant
from real_records import Rows

import common

SIMILARITY = 0.8
MOST_COMPARED = 5000  # texts that are compared with all others
TITLES = {
    "unusable": "empty records",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "leakage": "held-out leaks",
    "lengths": "outlying lengths",
    "encoding": "broken encodings",
    "languages": "mixed languages",
    "secrets": "secrets, personal data",
    "rare_labels": "rare labels",
    "label_variants": "label variants",
    "conflicting_labels": "conflicting labels",
    "doubted_labels": "doubted labels",
}
METHOD = (
    "Recall: the share of the planted faults that is found. Precision: the planted share of what "
    "is found and was not found in the data as they are."
)
_OTHER = re.compile(r"alike with record (\d+) of ([\w.]+):")


@dataclass
class Audited:
    """What an audit found: its findings by check, the keys of each as in `planted`, and seconds."""

    findings: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    alike: set[str] = field(default_factory=set)  # texts that have a near duplicate
    seconds: float = 0.0


def audit(train: Rows, heldout: Rows, threads: int, predict_labels: bool = True) -> Audited:
    import ferrotune

    sides = {"train.jsonl": train, "heldout.jsonl": heldout}
    with tempfile.TemporaryDirectory() as name:
        for file, rows in sides.items():
            lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
            (Path(name) / file).write_text("".join(lines), encoding="utf-8")
        start = time.perf_counter()
        result = ferrotune.audit(
            Path(name) / "train.jsonl",
            heldout_data=Path(name) / "heldout.jsonl" if heldout else (),
            label_column="label",
            near_duplicates=SIMILARITY,
            predict_labels=predict_labels,
            examples=10**9,
            threads=threads,
        )
        audited = Audited(seconds=time.perf_counter() - start)
    for finding in result.findings:
        audited.findings[finding.check] = finding
        keys: dict[str, None] = {}
        for example in finding.examples:
            text, label = sides[Path(example.file).name][example.record - 1]
            if finding.check == "unusable":
                keys[example.place] = None
            elif finding.check in ("label_variants", "rare_labels"):
                keys[label] = None
            else:
                keys[text] = None
            other = _OTHER.search(example.note)
            if finding.check == "near_duplicates" and other is not None:
                audited.alike |= {text, sides[other[2]][int(other[1]) - 1][0]}
        audited.keys[finding.check] = list(keys)
    return audited


def grams(text: str) -> set[str]:
    """The character 5-grams that near duplicates are told by."""
    words = "".join(sign.lower() if sign.isalnum() else " " for sign in text).split()
    plain = " ".join(words)
    return {plain[at : at + 5] for at in range(max(len(plain) - 4, 1))} if plain else set()


def alike(texts: list[str], step: int) -> set[str]:
    """Of every `step`th text, those that have a near duplicate, by comparing it with all others."""
    numbers: dict[str, int] = {}
    sets = [
        np.array([numbers.setdefault(gram, len(numbers)) for gram in grams(text)], dtype=np.int64)
        for text in texts
    ]
    sizes = np.array([len(one) for one in sets])
    owners = np.repeat(np.arange(len(texts)), sizes)
    flat = np.concatenate(sets)
    order = np.argsort(flat, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=len(numbers)))])
    postings = owners[order]
    found = set()
    for index in range(0, len(texts), step):
        own = sets[index]
        if not len(own):
            continue
        others = np.concatenate([postings[ends[gram] : ends[gram + 1]] for gram in own])
        common_grams = np.bincount(others, minlength=len(texts))
        common_grams[index] = 0
        similarity = common_grams / (sizes + len(own) - common_grams)
        if similarity.max() >= SIMILARITY:
            found.add(texts[index])
    return found


def share(part: int, of: int) -> str:
    return f"{part / of:.3f}" if of else ""


def compare(data: Data, before: Audited, after: Audited) -> list[list[str]]:
    """A row a check, and one a kind of its planted faults where there are several."""
    rows = []
    for check, title in TITLES.items():
        kinds = data.planted[check]
        planted = set.union(*kinds.values())
        found = after.keys.get(check, [])
        hits = planted & (set(found) | (after.alike if check == "near_duplicates" else set()))
        count = len(found)
        if check == "unusable":  # of which the first ones alone are examples
            count = after.findings[check].count
            hits = set(sorted(planted)[:count])
        known = set(before.keys.get(check, [])) - planted
        new = count - len(known & set(found))
        precision = share(min(len(hits), new), new)
        counts = [len(planted), len(hits), share(len(hits), len(planted)), count, new, precision]
        rows.append([f"**{title}**", *map(str, counts)])
        if len(kinds) > 1:
            for kind, keys in kinds.items():
                part = len(hits & keys)
                rows.append(
                    [kind, str(len(keys)), str(part), share(part, len(keys)), "", "", ""]
                )  # fmt: skip
    return rows


def doubts(data: Data, after: Audited) -> str:
    """How the likeliest label errors fare, which the audit puts first."""
    planted = data.planted["doubted_labels"]["another label"]
    first = after.keys["doubted_labels"][: len(planted)]
    finding = after.findings["doubted_labels"]
    hits = len(planted & set(first))
    return (
        f"Of the first {len(first):,} doubted labels, as many as were flipped, {hits:,} "
        f"({hits / max(len(first), 1):.0%}) were. Predictions are right in "
        f"{finding.details['accuracy']:.0%} of the records with the planted faults."
    )


def measure(name: str, rows: Rows, foreign: list[str], threads: int) -> tuple[str, dict[str, Any]]:
    """The section of one data set, and its record."""
    plain = divide(rows)
    before = audit(plain.train, plain.heldout, threads)
    data = plant(plain, foreign)
    after = audit(data.train, data.heldout, threads)
    table = compare(data, before, after)
    texts = list(dict.fromkeys(text.strip() for text, _ in data.train if text.strip()))
    step = -(-len(texts) // MOST_COMPARED)
    truth = alike(texts, step)
    compared = set(texts[::step])
    found = {text.strip() for text in audit(data.train, [], threads, False).alike} & compared
    near = (
        f"Compared with all {len(texts):,} different texts, {len(truth):,} of {len(compared):,} "
        f"have a near duplicate; the audit names {len(truth & found):,} of them (recall "
        f"{share(len(truth & found), len(truth))}) and {len(found - truth):,} others."
    )
    unplanted = [
        [TITLES.get(check, check.replace("_", " ")), finding.severity, f"{finding.count:,}",
         finding.message]
        for check, finding in before.findings.items()
    ]  # fmt: skip
    labels = Counter(label for _, label in rows)
    lengths = sorted(len(text) for text, _ in rows)
    label, most = labels.most_common(1)[0]
    facts = (
        f"{len(rows):,} records, median length {lengths[len(rows) // 2]} characters, "
        f"{len(labels)} labels, the most frequent one `{label}` ({most:,}). Audited in "
        f"{before.seconds:.1f} s."
    )
    head = ["fault", "planted", "found of them", "recall", "found", "not found before", "precision"]
    body = "\n\n".join(
        [
            f"## {name}",
            facts,
            "As they are:",
            common.table(["check", "severity", "records", ""], unplanted),
            "With planted faults:",
            common.table(head, table),
            near,
            doubts(data, after),
        ]
    )
    record = {
        "records": len(rows), "labels": len(labels), "seconds": before.seconds,
        "unplanted": unplanted, "planted": table, "near duplicates": near,
        "doubted labels": doubts(data, after),
    }  # fmt: skip
    return body, record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder of the .deb files (default: fetched)")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = real_records.packages(Path(name), options.packages)
        sets = {
            "FOLDOC's entries by subject": real_records.foldoc(files),
            "Debian's packages by section": real_records.descriptions(),
            "Fortunes by topic": real_records.fortunes(files),
        }
        foreign = real_records.german(files)
    sections, results = [], {}
    for title, rows in sets.items():
        section, results[title] = measure(title, rows, foreign, options.threads)
        sections.append(section)
    body = "\n\n".join(sections)
    if options.no_write:
        print(body)
        return 0
    record = {"machine": common.machine(options.threads, ["numpy"]), "results": results}
    common.write("audit_real", "The audit on real data", record, body, [], METHOD)
    return 0


if __name__ == "__main__":
    sys.exit(main())
