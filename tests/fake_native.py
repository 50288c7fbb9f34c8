"""Stands in for `ferrotune._native`: a simulated trainer that writes files and calls back.

The base name of the model's folder chooses what happens; see `_fail`.
"""

import errno
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__version__ = "0.0.0"
has_cuda = True
BASE_LOSS, FLOOR = 5.58, 3.6
calls: list[tuple[str, dict[str, Any]]] = []


def cuda_driver() -> tuple[int | None, int]:
    return None, 13_000


class FormatError(ValueError):
    pass


def _fail(config: dict[str, Any]) -> None:
    model = config["model"]
    failures: dict[str, Callable[[], Exception]] = {
        "missing": lambda: FileNotFoundError(errno.ENOENT, "No such file (os error 2)", model),
        "directory": lambda: IsADirectoryError(errno.EISDIR, "", model),
        "file": lambda: NotADirectoryError(errno.ENOTDIR, "", model),
        "forbidden": lambda: PermissionError(errno.EACCES, "", model),
        "broken": lambda: FormatError(f"{model}/model.safetensors: truncated\nat byte 12"),
        "value": lambda: ValueError("r is 0; it must be at least 1"),
        "unsupported": lambda: NotImplementedError("architecture GPT2LMHeadModel: no code for it"),
        "diverged": lambda: RuntimeError("the loss is not finite at step 7"),
        "full-disk": lambda: OSError(errno.ENOSPC, "", f"{config['output']}/checkpoint"),
        "bug": lambda: KeyError("somewhere"),
    }
    make = failures.get(Path(model).name)
    if make is not None:
        raise make()


def train(
    config: str,
    on_event: Callable[[str], bool],
    frames: dict[str, Any] | None = None,
    *,
    why: str | None = None,
    learners: Any = None,
) -> str:
    settings = json.loads(config)
    calls.append(("train", settings))
    _fail(settings)
    output, kind = Path(settings["output"]), Path(settings["model"]).name
    total, noise = settings["max_steps"] or 120, random.Random(settings["seed"])
    output.mkdir(parents=True, exist_ok=True)
    resumed = settings["resume"]
    first = int((output / "checkpoint" / "step").read_text()) + 1 if resumed else 1
    data = {
        "records": 1000, "train_records": 950, "heldout_records": 50, "train_tokens": 190_000,
        "heldout_tokens": 10_000, "truncated": 2, "skipped_total": 1,
        "skipped": [{"file": "a.jsonl", "record": 17, "reason": "empty text"}],
        "files": [*settings["data"], *settings["heldout_data"]],
    }  # fmt: skip
    model = {
        "architecture": "LlamaForCausalLM", "parameters": 1_070_000, "trainable": 70_656,
        "quantized_bytes": 500_000, "engine": {"name": settings["engine"], "why": why},
    }  # fmt: skip
    losses: list[tuple[float, int]] = []
    with (output / "metrics.jsonl").open("a" if resumed else "w") as metrics:

        def emit(event: str, **fields: Any) -> bool:
            line = json.dumps({"event": event, **fields})
            if event in ("step", "eval"):
                metrics.write(line + "\n")
            return on_event(line)

        def evaluate_at(step: int) -> None:
            loss = FLOOR + (BASE_LOSS - FLOOR) * math.exp(-step / 40) + (0.3 if step > 100 else 0)
            loss += 0.01 * settings["seed"] if step else 0.0
            best = not losses or loss < min(losses)[0]
            losses.append((loss, step))
            emit("eval", step=step, loss=loss, perplexity=math.exp(loss), tokens=10_000, best=best)

        def checkpoint(step: int) -> None:
            (output / "checkpoint").mkdir(exist_ok=True)
            (output / "checkpoint" / "step").write_text(str(step))
            emit("checkpoint", step=step, path=str(output / "checkpoint"))

        emit("data", **data)
        emit("model", **model)
        if not resumed:
            evaluate_at(0)
        reason, step = "finished", first - 1
        for step in range(first, total + 1):
            if kind == "slow":
                time.sleep(0.01)
            elapsed = step * 0.1
            go_on = emit(
                "step", step=step, total_steps=total, tokens=2048 * step, elapsed_seconds=elapsed,
                loss=FLOOR + 2 * math.exp(-step / 40) + noise.gauss(0, 0.1), grad_norm=1.0,
                learning_rate=settings["learning_rate"], tokens_per_second=20480.0,
                remaining_seconds=(total - step) * 0.1,
            )  # fmt: skip
            if step % settings["eval_every"] == 0 or step == total:
                evaluate_at(step)
            if step % settings["checkpoint_every"] == 0:
                checkpoint(step)
            if kind == "late-full-disk" and step == 60:
                raise OSError(errno.ENOSPC, "", str(output / "checkpoint"))
            if not go_on:
                reason = "interrupted"
                checkpoint(step)
                break
        best = min(losses)
        emit("stop", reason=reason, step=step, best_step=best[1])
    weights = output / ("model" if settings["method"] == "full" else "adapter")
    weights.mkdir(exist_ok=True)
    (weights / "adapter_config.json").write_text("{}")
    result = {
        "steps": step, "best_step": best[1], "heldout_loss_before": losses[0][0],
        "heldout_loss_best": best[0], "heldout_loss_last": losses[-1][0], "train_loss_last": 3.7,
        "tokens": 2048 * step, "seconds": step * 0.1, "tokens_per_second": 20480.0,
        "stop_reason": reason, "output": str(output), "model": model, "data": data,
        "adapter": None if settings["method"] == "full" else str(weights),
    }  # fmt: skip
    return json.dumps(result)


def evaluate(
    config: str, on_event: Callable[[str], bool], frames: dict[str, Any] | None = None
) -> str:
    settings = json.loads(config)
    calls.append(("evaluate", settings))
    _fail(settings)
    on_event(json.dumps({"event": "data", "train_records": 0, "heldout_records": 10}))
    found = {"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": 1.25, "tokens": 4096}
    found["skipped"] = 0
    return json.dumps({**found, "seconds": 0.5, "tokens_per_second": 8192.0})


def generate(config: str, on_text: Callable[[str], bool] | None) -> str:
    settings = json.loads(config)
    calls.append(("generate", settings))
    _fail(settings)
    words = [" and" if settings["adapter"] else " def", " so\non", " →"]
    said = []
    for word in words[: settings["max_tokens"]]:
        said.append(word)
        if on_text is not None and not on_text(word):
            break
    found: dict[str, Any] = {
        "text": "".join(said),
        "tokens": len(said),
        "seconds": 0.1,
        "tokens_per_second": 30.0,
    }
    found["warnings"] = []
    return json.dumps(found)


def merge(config: str) -> str:
    settings = json.loads(config)
    calls.append(("merge", settings))
    _fail(settings)
    os.makedirs(settings["output"])
    files = ["config.json", "model.safetensors"]
    found = {"output": settings["output"], "files": files, "merged_modules": 28, "warnings": []}
    return json.dumps(found)
