"""QLoRA of a LLaMA-65B-shaped model on one GPU held to 48 GiB, beside PEFT + bitsandbytes.

``python benches/cuda_65b.py --peers FOLDER`` writes results/cuda_65b.{md,json}. 80 layers, 8192
hidden, 22016 intermediate, 64 heads, vocabulary 32,000 (Touvron et al., 2023); random weights, the
same for both, quantised to NF4 layer by layer as they are drawn, so that nothing larger than one
matrix is ever dense; LoRA r = 16 on all linear layers, gradient checkpointing, bf16 autocast, AdamW
(Dettmers et al., 2023). Each contender has a process of its own, which may take 48 GiB; it trains
on 2048 tokens, then looks for the longest sequence that it can still take a step with.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from cuda_step import TARGETS, adapted

SIZES: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64,
    "num_key_value_heads": 64, "vocab_size": 32000,
}  # fmt: skip
CONTENDERS = ("ferrotune", "PEFT + bitsandbytes")
ROOM = 48  # GiB
LENGTH = 2048
SPEED, AIM = 1.45, 1.6  # of PEFT's tokens/s
GRAIN, STRIDE = 256, 1024  # tokens: to which the longest sequence is found, and how it is sought


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--peers", help="a folder to put first on the path")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--steps", type=int, default=8, help="of which three warm up")
    parser.add_argument("--tries", type=int, default=6, help="lengths tried for the longest")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which to run")
    parser.add_argument("--name", default="cuda_65b", help="name of the result files")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options)
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    import cuda_common as cuda

    import common

    packages = ["torch", "transformers", "peft", "bitsandbytes"]
    record: dict[str, Any] = {"results": {}, "machine": cuda.machine(packages)}
    planned = record["planned_gib"] = planned_gib(options.layers)
    for name in options.contenders.split(","):
        arguments = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.splitlines()
        print("\n".join(lines[:-1]), flush=True)
        if done.returncode:
            raise SystemExit(f"{name} ended with status {done.returncode}")
        record["results"][name] = json.loads(lines[-1])
    found = record["results"]
    rows: list[list[object]] = [
        [
            name, f"{one['step_ms'] / 1e3:.3f}", f"{one['tokens_per_second']:.0f}",
            f"{one['peak_gib']:.2f}", f"{one['losses'][0]:.3f} → {one['losses'][-1]:.3f}",
            f"{one['longest']:,}", f"{one['longest_seconds']:.2f}",
        ]
        for name, one in found.items()
    ]  # fmt: skip
    header = ["by", "s a step", "tokens/s", "peak GiB", "loss", "longest sequence", "s a step"]
    where = record["machine"]
    body = f"{where['device']}, driver for {where['driver']}.\n\n{common.table(header, rows)}"
    bars: list[common.Bar] = []
    ours, theirs = (found.get(name) for name in CONTENDERS)
    if ours:
        body += f"\n\n`ferrotune plan` gives a peak of {planned:.2f} GiB for ferrotune's run."
        off = 100 * abs(planned / ours["peak_gib"] - 1)
        falls = ours["losses"][0] - ours["losses"][-1]
        bars += [
            common.Bar("plan's error", off, 5, at_least=False, unit="%"),
            common.Bar("the loss falls by", falls, 0.01, unit="nats"),
        ]
    if ours and theirs:
        speed = theirs["step_ms"] / ours["step_ms"]
        more = ours["peak_gib"] / theirs["peak_gib"]
        bars += [
            common.Bar(f"tokens/s over PEFT + bitsandbytes (aim {AIM:g})", speed, SPEED),
            common.Bar("memory of PEFT + bitsandbytes'", more, 1.0, at_least=False),
        ]
    title = f"A 65B model on a GPU held to {ROOM} GiB"
    method = "Median of the steps after the warm-up; each contender in a process of its own."
    return 0 if common.write(options.name, title, record, body, bars, method) else 1


def planned_gib(layers: int) -> float:
    """The peak that `ferrotune plan` gives for ferrotune's run."""
    from ferrotune.planning.memory import Setup, memory
    from ferrotune.planning.shapes import shape_of

    config = {"model_type": "llama", "num_hidden_layers": layers, **SIZES}
    setup = Setup(sequence_length=LENGTH, checkpointing=True)
    return memory(shape_of(config, "LLaMA-65B"), setup).peak / 2**30


def worker(name: str, options: argparse.Namespace) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    if options.peers:
        sys.path.insert(0, options.peers)
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, ROOM * 2**30 / total))
    begun = time.perf_counter()
    settings = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}
    model = adapted(name, random_model(options.layers), settings, True)
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated() / 2**30
    print(f"{name}: {time.perf_counter() - begun:.0f} s to make, {weights:.2f} GiB", flush=True)
    print(json.dumps(measure(name, model, options)), flush=True)


def random_model(layers: int) -> Any:
    """A Llama whose linear layers are bitsandbytes' Linear4bit, with weights of deviation 0.02."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # Typed loosely: parts of their own annotations are missing.
    bnb: Any = importlib.import_module("bitsandbytes")
    accelerate: Any = importlib.import_module("accelerate")

    config = LlamaConfig(
        **SIZES, num_hidden_layers=layers, max_position_embeddings=32768, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    with accelerate.init_empty_weights():
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(shape: Any) -> torch.Tensor:
        weight = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        return weight.normal_(0, 0.02, generator=generator)

    for path, module in list(model.named_modules()):
        if not path.endswith(tuple(TARGETS)):
            for key, old in list(module.named_parameters(recurse=False)):
                made = drawn(old.shape)
                if old.dim() == 1:
                    made.fill_(1)  # of a norm
                setattr(module, key, torch.nn.Parameter(made, requires_grad=False))
            continue
        n, k = module.weight.shape
        packed, state = bnb.functional.quantize_4bit(
            drawn((n, k)), quant_type="nf4", compress_statistics=True
        )
        layer = bnb.nn.Linear4bit(
            k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=64,
            compress_statistics=True, quant_type="nf4", bnb_quantized=True, module=layer,
        )  # fmt: skip
        layer.quant_state = state
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    # Made from the config, not drawn: the rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to("cuda")
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def measure(name: str, model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step of 2048 tokens, its peak, the losses; the longest sequence."""
    import torch

    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> float:
        begun = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
        return time.perf_counter() - begun

    def fits(length: int) -> float | None:
        """Seconds of a step, or None where memory ran out."""
        ids = torch.randint(4, 1000, (1, length), device="cuda")
        try:
            return step(ids)
        except torch.OutOfMemoryError:
            return None
        finally:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    losses: list[float] = []
    torch.manual_seed(0)
    ids = torch.randint(4, 1000, (1, LENGTH), device="cuda")
    times = []
    for i in range(options.steps):
        times.append(step(ids))
        if i == 2:
            torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(times[3:])
    peak = torch.cuda.max_memory_allocated()
    found = {
        "step_ms": seconds * 1e3,
        "spread_ms": [min(times[3:]) * 1e3, max(times[3:]) * 1e3],
        "tokens_per_second": LENGTH / seconds,
        "peak_gib": peak / 2**30,
        "losses": losses[: options.steps],
        "trained": sum(parameter.numel() for parameter in trained),
    }
    print(f"{name}: {seconds:.3f} s a step, {found['peak_gib']:.2f} GiB", flush=True)
    # What is there whatever the length, and what a token adds.
    lasting = torch.cuda.memory_allocated()
    most = (ROOM * 2**30 - lasting) / ((peak - lasting) / LENGTH)
    longest, longest_seconds, too_long = LENGTH, seconds, None
    length = max(LENGTH + GRAIN, int(most * 0.95) // GRAIN * GRAIN)
    for _ in range(options.tries):
        took = fits(length)
        said = "out of memory" if took is None else f"{took:.2f} s"
        print(f"{name}: a step of {length} tokens: {said}", flush=True)
        if took is None:
            too_long = length
        else:
            longest, longest_seconds = length, took
        if too_long is None:
            length = longest + STRIDE
        elif too_long - longest <= GRAIN:
            break
        else:
            between = (longest + too_long) // 2 // GRAIN * GRAIN
            length = max(between, too_long - STRIDE) if longest == LENGTH else between
    found |= {"longest": longest, "longest_seconds": longest_seconds, "too_long": too_long}
    return found


if __name__ == "__main__":
    sys.exit(main())
