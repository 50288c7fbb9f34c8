"""A QLoRA linear on the CPU, forward and backward, beside the frozen layer and PEFT + bitsandbytes.

Needs the packages torch, peft and bitsandbytes, and an optimised build of ferrotune.
Writes results/lora_cpu.{json,md}; the exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import common

SHAPES = ((256, 1024, 1024), (512, 2048, 5632))  # tokens, in features, out features
# Of the input and the frozen computation, and of the adapter: float32 is PEFT's default.
DTYPES = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads each contender may use")
    parser.add_argument("--rounds", type=int, default=9, help="turns of timed calls")
    parser.add_argument("--rank", type=int, default=16, help="r of the adapters")
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout")
    parser.add_argument("--name", default="lora_cpu", help="name of the result files")
    options = parser.parse_args()
    # Read when the thread pools start, so before the imports.
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    packages = ["torch", "peft", "bitsandbytes"]
    record: dict[str, Any] = {
        "machine": common.machine(options.threads, packages),
        "results": {},
    }
    rows: list[list[object]] = []
    bars: list[common.Bar] = []
    for shape in SHAPES:
        for dtype, adapter in DTYPES:
            label = f"{shape[0]}x{shape[1]}x{shape[2]} {dtype}, adapter {adapter}"
            times = common.interleave(
                contenders(shape, dtype, adapter, options),
                rounds=options.rounds,
                calls=6,
            )
            frozen = times["frozen F.linear"].median
            ours = times["ferrotune"].median
            record["results"][label] = {key: {"seconds": timing} for key, timing in times.items()}
            rows += [
                [label, key, timing, f"{timing.median / frozen:.2f}"]
                for key, timing in times.items()
            ]
            bars += [
                common.Bar(f"{label}: time over frozen", ours / frozen, 1.2, at_least=False),
                common.Bar(
                    f"{label}: speed over PEFT + bitsandbytes",
                    times["PEFT + bitsandbytes"].median / ours,
                    1.3,
                ),
            ]
    title = f"QLoRA linear, forward + backward, r = {options.rank}, dropout {options.dropout}, NF4"
    body = common.table(["tokens x in x out, types", "what", "time", "x frozen"], rows)
    return 0 if common.write(options.name, title, record, body, bars) else 1


def contenders(
    shape: tuple[int, int, int], dtype: str, adapter: str, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """Each a forward and a backward of one layer, to x and to the adapter."""
    import bitsandbytes.nn
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    from ferrotune import ops

    bnb: Any = bitsandbytes.nn
    lora_A: Any
    lora_B: Any
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens, k, n = shape
    kind = getattr(torch, dtype)
    weight = (torch.randn(n, k) * k**-0.5).to(kind)
    x = torch.randn(tokens, k).to(kind).requires_grad_()
    grad = torch.randn(tokens, n).to(kind)
    base = bnb.Linear4bit(
        k, n, bias=False, compute_dtype=kind, quant_type="nf4", compress_statistics=True
    )
    base.weight = bnb.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    base = base.to("cpu")
    settings = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout)
    layer = Linear4bit(
        base, "default", settings, r=options.rank, lora_alpha=2 * options.rank
    ).train()
    for part in (layer.lora_A, layer.lora_B):
        part.to(getattr(torch, adapter))
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(lora_B, std=options.rank**-0.5)
    quant = ops.Quant4bit.from_bitsandbytes(base.weight, base.weight.quant_state)
    values = ops.dequantize_4bit(quant, kind)

    def step(forward: Callable[[], Any]) -> Callable[[], object]:
        def call() -> None:
            x.grad = lora_A.grad = lora_B.grad = None
            forward().backward(grad)

        return call

    calls = {
        "frozen F.linear": step(lambda: torch.nn.functional.linear(x, values)),
        "ferrotune": step(
            lambda: ops.lora_linear(x, quant, lora_A, lora_B, 2.0, dropout_p=options.dropout)
        ),
        "PEFT + bitsandbytes": step(lambda: layer(x)),
    }
    if not options.dropout:
        check(calls, x, lora_A, lora_B)
    return calls


def check(calls: dict[str, Callable[[], object]], *tensors: Any) -> None:
    """The contenders must compute the same gradients."""
    found = {}
    for name in ("ferrotune", "PEFT + bitsandbytes"):
        calls[name]()
        found[name] = [tensor.grad.clone() for tensor in tensors]
    for ours, theirs in zip(*found.values(), strict=True):
        error = float((ours - theirs).float().norm() / theirs.float().norm())
        if not error < 2e-2:
            raise SystemExit(f"gradients differ by {error:.1e}")


if __name__ == "__main__":
    sys.exit(main())
