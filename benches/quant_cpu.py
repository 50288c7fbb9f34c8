"""4-bit quantisation on the CPU beside bitsandbytes and torch's copy_, in one run.

Needs the packages torch and bitsandbytes, and an optimised build of ferrotune.
Writes results/quant_cpu.{json,md}; the exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import common


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads each contender may use")
    parser.add_argument("--rounds", type=int, default=21, help="turns of six timed calls")
    parser.add_argument("--rows", type=int, default=2048, help="rows of the matrix")
    parser.add_argument("--columns", type=int, default=5632, help="columns of the matrix")
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4", help="4-bit type")
    parser.add_argument("--blocksize", type=int, default=64, help="elements a block")
    parser.add_argument("--name", default="quant_cpu", help="name of the result files")
    options = parser.parse_args()
    # Both are read when the thread pools start, so before the imports.
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    packages = ["numpy", "torch", "bitsandbytes"]
    record: dict[str, Any] = {
        "machine": common.machine(options.threads, packages),
        "results": {},
    }
    rows: list[list[object]] = []
    bars: list[common.Bar] = []
    for dtype in ("float32", "float16", "bfloat16"):
        times, moved = measure(dtype, options)
        rate = {key: moved[key] / timing.median / 1e9 for key, timing in times.items()}
        speed = {key: 1 / timing.median for key, timing in times.items()}
        record["results"][dtype] = {
            key: {"seconds": timing, "bytes": moved[key]} for key, timing in times.items()
        }
        rows += [[dtype, key, timing, f"{rate[key]:.1f}"] for key, timing in times.items()]
        bars += [
            common.Bar(
                f"{dtype}: quantise, speed over bitsandbytes",
                speed["quantize, ferrotune"] / speed["quantize, bitsandbytes"],
                10,
            ),
            common.Bar(
                f"{dtype}: dequantise into a buffer, bytes/s over copy_",
                rate["dequantize into, ferrotune"] / rate["copy_"],
                0.7,
            ),
            common.Bar(
                f"{dtype}: dequantise allocating, speed over bitsandbytes",
                speed["dequantize, ferrotune"] / speed["dequantize, bitsandbytes"],
                1,
            ),
        ]
    title = (
        f"4-bit quantisation of a {options.rows}x{options.columns} matrix "
        f"({options.quant_type}, blocks of {options.blocksize}, double-quantised)"
    )
    body = common.table(["type", "what", "time", "GB/s read + written"], rows)
    return 0 if common.write(options.name, title, record, body, bars) else 1


def measure(
    dtype: str, options: argparse.Namespace
) -> tuple[dict[str, common.Timing], dict[str, int]]:
    """Times of the contenders, and the bytes each reads and writes. Checks equal bits first."""
    import bitsandbytes.functional as bnb
    import torch

    from ferrotune.quant import dequantize_4bit, quantize_4bit

    def view(tensor: torch.Tensor) -> Any:
        """numpy has no bfloat16: its bits as uint16."""
        return (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy()

    def quantize_bnb() -> Any:
        return bnb.quantize_4bit(source, compress_statistics=True, **settings)

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = {"blocksize": options.blocksize, "quant_type": options.quant_type}
    source = torch.randn(options.rows, options.columns).mul_(0.02).to(getattr(torch, dtype))
    into, copied = torch.zeros_like(source), torch.zeros_like(source)
    array, out = view(source), view(into)
    weight = quantize_4bit(array, **settings)
    codes, state = quantize_bnb()
    same_codes = weight.packed.tobytes() == codes.numpy().tobytes()
    expected = view(bnb.dequantize_4bit(codes, state)).tobytes()
    if not same_codes or dequantize_4bit(weight, out=out).tobytes() != expected:
        raise SystemExit(f"{dtype}: codes or values differ from bitsandbytes'")

    times = common.interleave(
        {
            "quantize, bitsandbytes": quantize_bnb,
            "quantize, ferrotune": lambda: quantize_4bit(array, **settings),
        },
        rounds=max(5, options.rounds // 3),
        calls=4,
    )
    times |= common.interleave(
        {
            "copy_": lambda: copied.copy_(source),
            "dequantize into, ferrotune": lambda: dequantize_4bit(weight, out=out),
        },
        rounds=options.rounds,
    )
    times |= common.interleave(
        {
            "dequantize, bitsandbytes": lambda: bnb.dequantize_4bit(codes, state),
            "dequantize, ferrotune": lambda: dequantize_4bit(weight),
        },
        rounds=options.rounds,
    )
    size = source.numel() * source.element_size()
    moved = dict.fromkeys(times, weight.nbytes + size)
    moved["copy_"] = 2 * size
    return times, moved


if __name__ == "__main__":
    sys.exit(main())
