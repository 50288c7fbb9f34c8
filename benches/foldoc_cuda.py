"""FOLDOC's subjects by every method on a GPU: `foldoc_cpu.py`, longer runs, by the torch engine.

    PYTHONPATH=python python benches/foldoc_cuda.py

The same records, division, model and searches for learning rates; batches of 16, sequences of 128
tokens, three epochs. Methods run beside each other (`--jobs`), so the seconds of the table are not
those of a run alone. There is no bar: the table says which way it fell.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import foldoc_cpu
from foldoc_methods import METHODS, RUN, SEARCH, SHARED

import common

NAME, TITLE = "foldoc_cuda", "Subjects of FOLDOC's entries: every method, on a GPU"
WORK = Path(__file__).parent.parent / "target" / NAME
SETTINGS: dict[str, Any] = {"engine": "torch", "sequence_length": 128, "batch_size": 16}
# By name: those of the processor's bench that are there to be short are left out.
ROWS = [
    replace(one, compared=False, run={**one.run, "epochs": 10.0} if one.run else {})
    for one in METHODS
    if "epoch" not in one.name
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=8, help="methods at a time (default 8)")
    options = parser.parse_args()
    import cuda_common as cuda

    SHARED.update(SETTINGS)
    SEARCH.update(max_steps=40, eval_every=40)
    RUN.update(epochs=3.0, eval_every=98)
    packages = ["torch", "transformers", "peft", "bitsandbytes", "scikit-learn"]
    record: dict[str, Any] = {"machine": cuda.machine(packages)}
    shutil.rmtree(WORK, ignore_errors=True)
    record["data"] = foldoc_cpu.splits(WORK)
    found: dict[str, Any] = {}
    for like in (False, True):  # those that search, then those that take what these found
        methods = [one for one in ROWS if bool(one.like) == like]
        with ThreadPoolExecutor(options.jobs) as pool:
            begun = [pool.submit(foldoc_cpu.measure, one, found, WORK, 2) for one in methods]
        found |= {one.name: made.result() for one, made in zip(methods, begun, strict=True)}
        record["results"] = {one.name: found[one.name] for one in ROWS if one.name in found}
        write(record)
    lora = next(one for one in ROWS if one.name == "lora")
    weights, cores = str(WORK / "lora" / "run" / "adapter"), os.cpu_count() or 1
    found["lora"]["compare"] = foldoc_cpu.compare(lora, weights, WORK, WORK / "lora", cores)
    write(record)
    return 0


def write(record: dict[str, Any]) -> None:
    where = record["machine"]
    told = foldoc_cpu.body(record, ROWS, "The few-shot run makes 10 epochs.")
    body = f"{where['device']}, driver for {where['driver']}.\n\n{told}"
    method = foldoc_cpu.METHOD.replace("foldoc_cpu", NAME)
    common.write(NAME, TITLE, record, body, [], method)


if __name__ == "__main__":
    sys.exit(main())
