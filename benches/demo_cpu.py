"""The demo's figures, and what its fine-tuning is worth beside prompts and retrieval.

    PYTHONPATH=python python benches/demo_cpu.py

First `ferrotune demo` as it comes: the bundled model by QLoRA on the King James Bible. Then the
same training with a tenth of the books kept for a test, and `ferrotune compare` on pairs of
neighbouring short verses of these books: the loss of the second behind the first. There is no bar.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

NAME, TITLE = "demo_cpu", "The demo, and generation beside prompts and retrieval"
LONGEST = 80  # characters of a verse: three pairs fit the model's 256 positions
MOST = {"train": 4000, "test": 400}  # pairs
SHOTS = 2


def pairs(file: Path, most: int) -> list[dict[str, str]]:
    """Every so many-th pair of neighbouring short verses of the chapters in a file."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        verses = json.loads(line)["text"].splitlines()[2:]  # below the chapter's title
        for first, second in itertools.pairwise(verses):
            if 0 < len(first) <= LONGEST and 0 < len(second) <= LONGEST:
                found.append({"prompt": f"{first}\n", "completion": second})
    return found[:: -(-len(found) // most)]


def demo(folder: Path, threads: int) -> dict[str, Any]:
    import ferrotune

    start, cpu = time.perf_counter(), time.process_time()
    found = ferrotune.demo(folder / "demo", threads=threads, progress=False).train.to_dict()
    names = (
        "steps", "tokens", "seconds", "tokens_per_second", "stop_reason", "heldout_loss_before",
        "heldout_loss_best", "generation", "forgetting",
    )  # fmt: skip
    return {
        **{name: found[name] for name in names},
        "trainable": found["model"]["trainable"],
        "all_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def compare(folder: Path, threads: int) -> dict[str, Any]:
    """Trains with books apart for a test, and asks every contender of their verses."""
    import ferrotune
    from ferrotune.commands.demo import TRAINING, locate

    model, parts = locate("demo-model"), folder / "parts"
    text = {name: TRAINING[name] for name in ("group", "near_duplicates", "text_column")}
    ferrotune.split(locate("kjv.parquet"), parts, test=0.1, **text)
    rest = {name: value for name, value in TRAINING.items() if name not in text}
    trained = ferrotune.train(
        model, parts / "train.jsonl", folder / "run", **rest,
        heldout_data=parts / "heldout.jsonl", test_data=parts / "test.jsonl", max_steps=350,
        threads=threads, progress=False,
    )  # fmt: skip
    sides = {}
    for side, most in MOST.items():
        sides[side] = folder / f"{side}-pairs.jsonl"
        lines = [json.dumps(one) + "\n" for one in pairs(parts / f"{side}.jsonl", most)]
        sides[side].write_text("".join(lines), encoding="utf-8")
    result = ferrotune.compare(
        model, sides["train"], sides["test"], trained.weights, folder / "compare",
        quant_type="nf4", shots=SHOTS, sequence_length=256, threads=threads, progress=False,
    )  # fmt: skip
    found = result.to_dict()
    return {
        "test": trained.to_dict()["test"],
        **{name: found[name] for name in ("examples", "contenders", "left_out", "guide")},
    }


def body(found: dict[str, Any]) -> str:
    one, other = found["demo"], found["compare"]
    forgot = one["forgetting"]
    loss = f"{one['heldout_loss_before']:.3f} → {common.interval(one['generation']['loss'])}"
    own = f"{forgot['before']['loss']['value']:.3f} → {forgot['after']['loss']['value']:.3f}"
    rows = [
        ["held-out loss, nats per token", loss],
        ["held-out bits per byte, after", common.interval(one["generation"]["bits_per_byte"])],
        ["loss on Python's documentation, nats per token", own],
        ["its change: what was forgotten", common.interval(forgot["change"], "+")],
        ["steps", f"{one['steps']} ({one['stop_reason']})"],
        ["training tokens", f"{one['tokens']:,}"],
        ["training", f"{one['seconds']:.0f} s ({one['tokens_per_second']:,.0f} tokens/s)"],
        ["everything", f"{one['all_seconds']:.0f} s, processor {one['cpu_seconds']:.0f} s"],
        ["trained parameters", f"{one['trainable']:,}"],
    ]
    test = other["test"]["generation"]
    contenders = [
        [
            each["name"],
            common.interval(each["quality"]),
            common.interval(each["difference"], "+") if each["difference"] else "",
            f"{1000 * each['seconds_per_example']:.3g} ms",
            f"{each['bytes'] / 2**20:.1f} MiB",
        ]
        for each in other["contenders"]
    ]
    tested = (
        "The same training with a tenth of the books kept for the test: loss "
        f"{common.interval(test['loss'])} nats per token, "
        f"{common.interval(test['bits_per_byte'])} bits per byte on all of their text. Then "
        f"{other['examples']} pairs of verses of these books:"
    )
    missing = [f"- Not measured: {name}, for {why}." for name, why in other["left_out"].items()]
    return "\n\n".join(
        [
            "## `ferrotune demo`",
            common.table(["", ""], rows),
            "## Beside prompts and retrieval",
            tested,
            common.table(
                ["", "loss, nats per token", "fine-tuned minus this", "an example", "size"],
                contenders,
            ),
            "\n".join(missing),
            other["guide"],
        ]
    )


METHOD = (
    "In brackets 95 % intervals of 1,000 bootstrap resamples, paired for differences. "
    "`python benches/demo_cpu.py` makes it."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": common.machine(options.threads, ["numpy", "bm25s"])}
    with tempfile.TemporaryDirectory() as name:
        results = {
            "demo": demo(Path(name), options.threads),
            "compare": compare(Path(name), options.threads),
        }
    record["results"] = results
    common.write(NAME, TITLE, record, body(results), [], METHOD)
    return 0


if __name__ == "__main__":
    sys.exit(main())
