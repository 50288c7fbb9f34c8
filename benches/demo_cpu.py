"""The demo's figures, and what its fine-tuning is worth beside prompts and retrieval.

    PYTHONPATH=python python benches/demo_cpu.py

The demo's training (the bundled model by QLoRA on the King James Bible) with a tenth of the books
kept for a test, and `ferrotune compare` on pairs of neighbouring short verses of these books. There
is no bar.
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
STEPS = 350  # the demo's
TEST = 0.1  # of the records, by book
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


def measure(folder: Path, threads: int) -> dict[str, Any]:
    """Trains with books apart for a test, and asks every contender of their verses."""
    import ferrotune
    from ferrotune.commands.demo import TRAINING, locate

    start, cpu = time.perf_counter(), time.process_time()
    model, parts = locate("demo-model"), folder / "parts"
    text = {name: TRAINING[name] for name in ("group", "near_duplicates", "text_column")}
    ferrotune.split(locate("kjv.parquet"), parts, test=TEST, **text)
    rest = {name: value for name, value in TRAINING.items() if name not in text}
    trained = ferrotune.train(
        model, parts / "train.jsonl", folder / "run", **rest, engine="embedded",
        heldout_data=parts / "heldout.jsonl", test_data=parts / "test.jsonl",
        forgetting=locate("docs-heldout.parquet"), max_steps=STEPS, threads=threads,
        progress=False,
    )  # fmt: skip
    times = {"wall": time.perf_counter() - start, "processor": time.process_time() - cpu}
    before = ferrotune.evaluate(
        model, parts / "test.jsonl", quant_type="nf4", threads=threads, progress=False
    )
    sides = {}
    for side, most in MOST.items():
        sides[side] = folder / f"{side}-pairs.jsonl"
        lines = [json.dumps(one) + "\n" for one in pairs(parts / f"{side}.jsonl", most)]
        sides[side].write_text("".join(lines), encoding="utf-8")
    result = ferrotune.compare(
        model, sides["train"], sides["test"], trained.weights, folder / "compare",
        quant_type="nf4", shots=SHOTS, sequence_length=256, threads=threads, progress=False,
    )  # fmt: skip
    found, run = result.to_dict(), trained.to_dict()
    names = (
        "steps", "tokens", "seconds", "tokens_per_second", "stop_reason", "heldout_loss_before",
        "heldout_loss_best", "forgetting", "test",
    )  # fmt: skip
    return {
        "run": {name: run[name] for name in names} | {"trainable": trained.model["trainable"]},
        "verdict": trained.verdict.text if trained.verdict else None,
        "test_before": before.to_dict()["generation"],
        "seconds": times,
        "compare": {name: found[name] for name in ("examples", "contenders", "left_out", "guide")},
    }


def body(found: dict[str, Any]) -> str:
    run, compared = found["run"], found["compare"]
    forgot, before, after = run["forgetting"], found["test_before"], run["test"]["generation"]
    own = f"{forgot['before']['loss']['value']:.3f} → {forgot['after']['loss']['value']:.3f}"
    texts = [
        f"{common.interval(before[name])} → {common.interval(after[name])}"
        for name in ("loss", "bits_per_byte")
    ]
    heldout = f"{run['heldout_loss_before']:.3f} → {run['heldout_loss_best']:.3f}"
    rows = [
        ["held-out loss, nats per token", heldout],
        ["test loss, nats per token", texts[0]],
        ["test bits per byte", texts[1]],
        ["loss on Python's documentation, nats per token", own],
        ["its change: what was forgotten", common.interval(forgot["change"], "+")],
        ["steps, training tokens", f"{run['steps']}, {run['tokens']:,}"],
        ["training", f"{run['seconds']:.0f} s ({run['tokens_per_second']:,.0f} tokens/s)"],
        ["with division, evaluations and test", f"{found['seconds']['wall']:.0f} s"],
        ["processor, all threads", f"{found['seconds']['processor']:.0f} s"],
        ["trained parameters", f"{run['trainable']:,}"],
    ]
    contenders = [
        [
            one["name"],
            common.interval(one["quality"]),
            common.interval(one["difference"], "+") if one["difference"] else "",
            f"{1000 * one['seconds_per_example']:.3g} ms",
            f"{one['bytes'] / 2**20:.1f} MiB",
        ]
        for one in compared["contenders"]
    ]
    head = ["", "loss, nats per token", "fine-tuned minus this", "an example", "size"]
    asked = (
        f"{compared['examples']} pairs of neighbouring short verses of the test's books: the loss "
        f"of the second one behind the first. Prompts hold {SHOTS} pairs of the training books."
    )
    missing = [f"- Not measured: {name}, for {why}." for name, why in compared["left_out"].items()]
    parts = ["## The run", common.table(["", ""], rows), found["verdict"] or ""]
    parts += ["## Beside prompts and retrieval", asked, common.table(head, contenders)]
    return "\n\n".join([*parts, "\n".join(missing), compared["guide"]])


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
        results = measure(Path(name), options.threads)
    record["results"] = results
    common.write(NAME, TITLE, record, body(results), [], METHOD)
    return 0


if __name__ == "__main__":
    sys.exit(main())
