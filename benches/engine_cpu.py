"""Training speed of the embedded engine beside PyTorch: tokens a second and peak memory.

    PYTHONPATH=python python benches/engine_cpu.py

The demo's model in f32, its text, 16 rows of 128 tokens a step, AdamW, clipping, two threads:
`lora` beside PEFT, `qlora` (NF4, double quantisation) beside PEFT + bitsandbytes, `full` beside
plain PyTorch. Each run is a process of its own; the contenders take turns.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

METHODS = ("lora", "qlora", "full")
PEERS = {"lora": "PEFT", "qlora": "PEFT + bitsandbytes", "full": "PyTorch"}
DATA = Path(__file__).parent.parent / "python" / "ferrotune" / "data"
MODEL, TEXT = DATA / "demo-model", DATA / "kjv.parquet"
ROWS, COLUMNS, THREADS = 16, 128, 2
WARMUP = 5  # steps of a run that are not counted
LEAST = 0.8  # of PyTorch's tokens a second


def ferrotune_steps(method: str, steps: int) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    import ferrotune

    settings: dict[str, Any] = {"method": method}
    seconds: list[float] = []
    losses: list[float] = []
    last = 0.0

    def on_event(event: dict[str, Any]) -> bool:
        nonlocal last
        now = time.perf_counter()
        if event["event"] == "step":
            seconds.append(now - last)
            losses.append(event["loss"])
        last = now
        return True

    with tempfile.TemporaryDirectory() as folder:
        ferrotune.train(
            MODEL,
            TEXT,
            Path(folder) / "run",
            **settings,
            max_steps=steps,
            batch_size=ROWS,
            sequence_length=COLUMNS,
            learning_rate=1e-3,
            warmup_steps=0,
            schedule="constant",
            eval_every=10**6,
            eval_tokens=256,
            checkpoint_every=10**6,
            threads=THREADS,
            progress=False,
            on_event=on_event,
        )
    return seconds, losses


def torch_steps(method: str, steps: int) -> tuple[list[float], list[float]]:
    """The same with transformers, PEFT and bitsandbytes."""
    import pyarrow.parquet as pq
    import torch

    # Typed loosely: parts of these libraries' own annotations are missing.
    transformers: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    texts = pq.read_table(TEXT).column("text").to_pylist()[:400]
    stream = [token for text in texts for token in (0, *tokenizer.encode(text), 1)]
    needed = ROWS * COLUMNS
    batches = [
        torch.tensor(stream[i * needed : (i + 1) * needed]).reshape(ROWS, COLUMNS)
        for i in range(len(stream) // needed)
    ]
    options: dict[str, Any] = {"dtype": torch.float32}
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        options["device_map"] = "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, **options)
    if method != "full":
        config = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    seconds, losses = [], []
    for step in range(steps):
        batch = batches[step % len(batches)]
        begin = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return seconds, losses


def child(engine: str, method: str, steps: int) -> None:
    run = ferrotune_steps if engine == "ferrotune" else torch_steps
    seconds, losses = run(method, steps)
    counted = seconds[WARMUP:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"step": statistics.median(counted), "peak_mib": peak, "loss": losses[-1]}))


def measure(engine: str, method: str, steps: int) -> dict[str, float]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(THREADS),
        "RAYON_NUM_THREADS": str(THREADS),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--child", engine, method, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="of a run, five of them warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        engine, method = arguments.child
        child(engine, method, arguments.steps)
        return 0
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    record: dict[str, Any] = {"machine": common.machine(THREADS, packages)}
    rows, bars = [], []
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for method in arguments.methods:
        found: dict[str, list[dict[str, float]]] = {"ferrotune": [], "torch": []}
        for _ in range(arguments.rounds):
            for engine, results in found.items():
                results.append(measure(engine, method, arguments.steps))
        runs[method] = found
        speed = {
            engine: [ROWS * COLUMNS / run["step"] for run in results]
            for engine, results in found.items()
        }
        peak = {engine: max(run["peak_mib"] for run in runs) for engine, runs in found.items()}
        ours, theirs = (statistics.median(speed[engine]) for engine in ("ferrotune", "torch"))
        spread = {engine: f"{min(v):,.0f}-{max(v):,.0f}" for engine, v in speed.items()}
        rows.append(
            [
                method,
                f"{ours:,.0f} ({spread['ferrotune']})",
                PEERS[method],
                f"{theirs:,.0f} ({spread['torch']})",
                f"{ours / theirs:.2f}",
                f"{peak['ferrotune']:,.0f} MiB",
                f"{peak['torch']:,.0f} MiB",
            ]
        )
        bars.append(common.Bar(f"{method}: tokens/s over {PEERS[method]}", ours / theirs, LEAST))
        ratio = peak["ferrotune"] / peak["torch"]
        bars.append(
            common.Bar(f"{method}: peak memory over {PEERS[method]}", ratio, 0.75, at_least=False)
        )
    record["runs"] = runs
    header = ["method", "ferrotune tokens/s", "peer", "its tokens/s", "ratio", "peak", "its peak"]
    title = "Training on the CPU beside PyTorch"
    done = common.write("engine_cpu", title, record, common.table(header, rows), bars)
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
