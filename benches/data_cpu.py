"""Tokenising and packing text for a PyTorch trainer, beside `datasets.map`.

    PYTHONPATH=python python benches/data_cpu.py

Texts of about two kilobytes, made from the package's own, as one Hugging Face data set, and the
demo model's fast tokenizer, on the same cores: `ferrotune.load_data` (tokenised and packed into
rows of 1,024) beside `Dataset.map` (batched, a process a core, its cache on disk) alone, and
followed by TRL's `pack_dataset` (best-fit decreasing). The contenders take turns.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # map has a process a core

import common

DATA = Path(__file__).parent.parent / "python" / "ferrotune" / "data"
ROW = 1024  # tokens


def texts(megabytes: int) -> list[str]:
    """Texts of 10 to 30 paragraphs, drawn from a fixed seed, of `megabytes` · 10⁶ bytes."""
    import pyarrow.parquet

    paragraphs: list[str] = []
    for name in ("kjv.parquet", "docs-heldout.parquet"):
        column = pyarrow.parquet.read_table(DATA / name, columns=["text"]).column("text")
        paragraphs += [line for text in column.to_pylist() for line in text.split("\n") if line]
    generator = random.Random(0)
    found: list[str] = []
    size = 0
    while size < megabytes * 1_000_000:
        count = generator.randrange(10, 31)
        found.append("\n".join(generator.choice(paragraphs) for _ in range(count)))
        size += len(found[-1].encode())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200, help="of text (default 200)")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()

    import datasets
    import transformers
    from trl.data_utils import pack_dataset

    from ferrotune import load_data

    datasets.disable_progress_bars()
    # That texts are longer than the model reads is no matter.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "demo-model")
    data = datasets.Dataset.from_dict({"text": texts(options.megabytes)})
    size = sum(len(text.encode()) for text in data["text"])
    turns = itertools.count()

    def ours() -> Any:
        # As for its peers: nobody looks at the data first.
        return load_data(tokenizer, data, sequence_length=ROW, audit="off", threads=options.threads)

    def mapped(folder: str) -> Any:
        def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
            ids = tokenizer(batch["text"])["input_ids"]
            return {"input_ids": [[*one, tokenizer.eos_token_id] for one in ids]}

        cache = str(Path(folder) / f"{next(turns)}.arrow")  # never one of an earlier turn
        return data.map(
            encode,
            batched=True,
            num_proc=options.threads,
            remove_columns=["text"],
            cache_file_name=cache,
        )

    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "ferrotune": ours,
            "datasets.map": lambda: mapped(folder),
            "datasets.map + trl.pack_dataset": lambda: pack_dataset(
                mapped(folder), ROW, strategy="bfd"
            ),
        }
        timings = common.interleave(contenders, rounds=options.rounds, calls=1, warmup=0)

    rates = {name: size / 1e6 / timing.median for name, timing in timings.items()}
    ratio = rates["ferrotune"] / rates["datasets.map"]
    bars = [common.Bar("ferrotune's speed, of datasets.map alone", ratio, 1.0, True, "×")]
    rows = [[name, f"{timings[name].median:.1f} s", f"{rates[name]:.1f}"] for name in contenders]
    body = common.table(["contender", f"{size / 1e6:.0f} MB of text", "MB/s"], rows)
    if options.no_write:
        print(body)
        print(common.bar_table(bars))
        return 0 if all(bar.passed for bar in bars) else 1
    record = {
        "machine": common.machine(
            options.threads, ["datasets", "tokenizers", "transformers", "trl"]
        ),
        "results": {"tokenise and pack": timings},
    }
    passed = common.write("data_cpu", "Tokenising and packing", record, body, bars)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
