"""What `foldoc_cpu.py` runs: every method's settings, and one run as a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of every run, the searches included.
SHARED: dict[str, Any] = {
    "engine": "embedded",
    "task": "classification",
    "sequence_length": 48,
    "sort_by_length": True,
    "batch_size": 8,
    "warmup_steps": 10,
    "audit": "off",  # the division is audited once
    "progress": False,
}
# Of the searches for a learning rate, and of the runs of the table.
SEARCH: dict[str, Any] = {"max_steps": 30, "eval_every": 30, "eval_tokens": 128}
RUN: dict[str, Any] = {"epochs": 0.5, "eval_every": 98, "eval_tokens": 1000}
SHOTS = 16


@dataclass(frozen=True)
class Method:
    """One row of the table: settings of `ferrotune.train`, and the learning rates to try.

    Without `rates` it takes the rate of the method `like`; `compared` asks for a comparison.
    """

    name: str
    settings: dict[str, Any]
    rates: tuple[float, ...] = ()
    like: str = ""
    run: dict[str, Any] = field(default_factory=dict)  # of the run, not of the search
    compared: bool = False


METHODS = (
    Method("lora", {"method": "lora"}, (1e-3, 2e-3)),
    Method(
        "lora, 1 epoch",
        {"method": "lora", "sequence_length": 64},
        like="lora",
        run={"epochs": 1.0, "eval_every": 196},
        compared=True,
    ),
    Method("full", {"method": "full"}, (1e-4, 3e-4)),
    Method("freeze, head alone", {"method": "freeze"}, (3e-3, 1e-2)),
    Method("ia3", {"method": "ia3"}, (5e-3, 2e-2)),
    Method("adapter, Houlsby", {"method": "adapter", "adapter_variant": "houlsby"}, (1e-3, 3e-3)),
    Method("prefix", {"method": "prefix"}, (5e-3, 2e-2)),
    Method("prompt", {"method": "prompt"}, (5e-3, 2e-2)),
    Method("qlora", {"method": "qlora"}, like="lora"),
    Method("adapter, Pfeiffer", {"method": "adapter"}, like="adapter, Houlsby"),
    Method("freeze, last 2 blocks", {"method": "freeze", "trained_layers": 2}, (5e-4, 2e-3)),
    Method(
        f"lora, {SHOTS} shots",
        {"method": "lora", "shots": SHOTS},
        like="lora",
        run={"epochs": 4.0, "eval_every": 32, "repeats": 3},
    ),
)


def in_a_process(output: Path, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """What a run of `settings` says in a process of its own, and what that took of the machine.

    Raises CalledProcessError.
    """
    environment = os.environ | {
        "RAYON_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }
    settings = {**SHARED, **settings, "output": str(output), "threads": threads}
    command = [sys.executable, __file__, json.dumps(settings)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains, and says what came of it: seconds by the wall and of the processor, MiB at most."""
    import ferrotune

    start, cpu = time.perf_counter(), time.process_time()
    result = ferrotune.train(**settings)
    found = result.to_dict()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "training_seconds": result.seconds,
        "peak_mib": peak_mib(),
        "trainable": result.model["trainable"],
        "weights": str(result.weights),
        **{name: found[name] for name in ("steps", "best_step", "heldout_loss_best", "test")},
        "verdict": None if result.verdict is None else result.verdict.kind,
        "repeats": [dict(one.measures) for one in result.repeats],
    }


def peak_mib() -> float:
    """Of a GPU's memory where PyTorch used one, else of the process's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
