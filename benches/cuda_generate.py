"""`generate` of a 4-bit model with an active adapter, beside PEFT + bitsandbytes and Unsloth.

``python benches/cuda_generate.py --peers FOLDER`` writes results/cuda_generate.{md,json} and exits
with 1 if a bar is missed. The model is Llama-3-8B's shape with random weights, written once; LoRA
r = 16 on all seven projections; a prompt of 32 tokens, 128 more, greedy, one sequence. Each
contender has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cuda_step

PROMPT, NEW = 32, 128
LEAST = 1.5  # of PEFT + bitsandbytes' tokens/s
CONTENDERS = ("ferrotune", "PEFT + bitsandbytes", "Unsloth")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--peers", help="a folder to put first on the path")
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--shape", default="llama-3-8b", choices=cuda_step.SHAPES)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which to run")
    parser.add_argument("--rounds", type=int, default=5, help="generations that are timed")
    parser.add_argument(
        "--models", default="/tmp/ferrotune-models", help="where models are written"
    )
    parser.add_argument("--profile", action="store_true", help="print where time goes; no results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker, options)), flush=True)
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    import cuda_common as cuda

    import common

    packages = ["torch", "transformers", "peft", "bitsandbytes", "unsloth"]
    found: dict[str, Any] = {}
    for name in options.contenders.split(","):
        one = run(name, options)
        if one is not None:
            found[name] = one
    if options.profile:
        return 0
    record: dict[str, Any] = {"machine": cuda.machine(packages), "results": found}
    rows = [
        [name, f"{one['tokens_per_second']:.1f}", f"{one['ms_a_token']:.2f}",
         f"{one['peak_gib']:.2f}"]
        for name, one in found.items()
    ]  # fmt: skip
    bars = []
    if {"ferrotune", "PEFT + bitsandbytes"} <= found.keys():
        ours, theirs = (
            found[name]["tokens_per_second"] for name in ("ferrotune", "PEFT + bitsandbytes")
        )
        bars.append(common.Bar("tokens/s over PEFT + bitsandbytes", ours / theirs, LEAST))
    where = record["machine"]
    body = (
        f"{where['device']}, driver for {where['driver']}. {options.shape}, {options.layers} "
        f"layers, NF4 (double-quantised) in bf16, LoRA r = 16 on seven projections, as PEFT makes "
        f"it; {NEW} greedy tokens after {PROMPT}, one sequence.\n\n"
    )
    body += common.table(["by", "tokens/s", "ms a token", "peak GiB"], rows)
    method = "Median of the generations after two; each contender in a process of its own."
    title = "Generation from a 4-bit model with an adapter"
    return 0 if common.write("cuda_generate", title, record, body, bars, method) else 1


def run(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """One contender's figures; None if its process failed."""
    arguments = [sys.executable, __file__, "--worker", name, "--models", options.models]
    arguments += ["--layers", str(options.layers), "--shape", options.shape]
    arguments += ["--rounds", str(options.rounds)]
    arguments += ["--peers", options.peers] if options.peers else []
    arguments += ["--profile"] if options.profile else []
    found = cuda_step.last_line(arguments, name)
    if found is not None:
        print(f"{name}: {found['tokens_per_second']:.1f} tokens/s", flush=True)
    return found


def worker(name: str, options: argparse.Namespace) -> dict[str, Any]:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    if options.peers:
        sys.path.insert(0, options.peers)
    if name == "Unsloth":
        import unsloth  # type: ignore[import-not-found]  # before transformers

        _ = unsloth
    import torch

    torch.manual_seed(0)
    case = cuda_step.Case(options.layers, 1, False, None, options.shape)
    folder = Path(options.models) / f"{case.shape}-{case.layers}"
    if not (folder / "config.json").is_file():
        cuda_step.make(case, folder)
    model = load(name, case, folder)
    torch.cuda.reset_peak_memory_stats()  # of making the model, too
    return measure(model, options)


def load(name: str, case: cuda_step.Case, folder: Path) -> Any:
    """In evaluation, with an adapter that changes what comes out."""
    import torch

    if name == "Unsloth":
        model = cuda_step.load(name, case, folder)
    else:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=16, lora_alpha=32, target_modules=cuda_step.TARGETS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(cuda_step.base_model(folder), config)
    draw = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=draw, device="cuda"))
    model.eval()
    if name == "Unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    if name == "ferrotune":
        import ferrotune

        print(str(ferrotune.patch(model)).splitlines()[0], flush=True)
    return model


def measure(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    ids = torch.randint(4, 1000, (1, PROMPT), device="cuda")

    def generate() -> Any:
        with torch.no_grad():
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=3,
            )  # fmt: skip

    times = []
    tokens: list[int] = []
    for i in range(2 + options.rounds):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        out = generate()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - begun)
        assert out.shape[1] == PROMPT + NEW
        tokens = out[0, PROMPT:].tolist()
    if options.profile:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            generate()
        for column in ("self_cuda_time_total", "self_cpu_time_total"):
            print(found.key_averages().table(sort_by=column, row_limit=24))
    seconds = statistics.median(times)
    return {
        "tokens_per_second": NEW / seconds,
        "ms_a_token": seconds / NEW * 1e3,
        "spread_s": [min(times), max(times)],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_tokens": tokens[:16],
    }


if __name__ == "__main__":
    sys.exit(main())
