"""Build the demo's texts from two Debian packages.

    apt-get install python3.11-doc bible-kjv bible-kjv-text
    python -m demo_model.corpus --output build

Writes `docs-train.jsonl` and `docs-heldout.jsonl` (`text`, `file`: one reST source of Python's
documentation a record, PSF licence), which the base model is pre-trained on, and
`docs-heldout.parquet`, the same held-out part for the package; and `kjv.parquet` (columns `text`,
`book`: one chapter of the King James Bible a record, public domain), which the demo fine-tunes on.
A source belongs to the held-out part if the SHA-256 of its name says so, so the split never
depends on order or machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DOCS = Path("/usr/share/doc/python3.11/html/_sources")
HELDOUT_SHARE = 20  # one source in so many is held out
CHAPTER = re.compile(r"^(?P<book>\S.*?) (?P<chapter>\d+)$")
VERSE = re.compile(r"^ *\d+ (?P<text>.+)$")
LICENCE_FILES = {"license.rst.txt", "copyright.rst.txt"}


def documentation(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Train and held-out records of the documentation's reST sources, in order of their names."""
    train, heldout = [], []
    for path in sorted(folder.rglob("*.rst.txt")):
        name = path.relative_to(folder).as_posix()
        text = path.read_text(encoding="utf-8").strip()
        if not text or name in LICENCE_FILES:
            continue
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        (heldout if digest % HELDOUT_SHARE == 0 else train).append({"text": text, "file": name})
    return train, heldout


def king_james(command: str) -> list[dict[str, str]]:
    """One record a chapter: its heading, an empty line, one verse a line without its number."""
    printed = subprocess.run(
        [command, "-l4000", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    chapters: list[dict[str, str]] = []
    for line in printed.splitlines():
        if heading := CHAPTER.match(line):
            chapters.append({"text": f"{line}\n", "book": heading["book"]})
        elif verse := VERSE.match(line):
            chapters[-1]["text"] += f"\n{verse['text'].strip()}"
        elif line.strip():
            raise SystemExit(f"a line that is neither heading nor verse: {line!r}")
    return chapters


def write_lines(records: list[dict[str, str]], path: Path) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_parquet(records: list[dict[str, str]], path: Path) -> None:
    table = pa.Table.from_pylist(records)
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=["book"] if "book" in table.column_names else False,
        write_statistics=False,
    )
    print(f"{path}: {len(records)} records, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="the documentation's _sources")
    parser.add_argument("--bible", default="bible", help="the bible-kjv program")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    train, heldout = documentation(arguments.docs)
    write_lines(train, arguments.output / "docs-train.jsonl")
    write_lines(heldout, arguments.output / "docs-heldout.jsonl")
    write_parquet(heldout, arguments.output / "docs-heldout.parquet")
    write_parquet(king_james(arguments.bible), arguments.output / "kjv.parquet")


if __name__ == "__main__":
    main()
