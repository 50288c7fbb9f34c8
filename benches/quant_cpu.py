"""4-bit quantisation on the CPU beside bitsandbytes and torch's copy_, in one run.

Needs the packages torch and bitsandbytes, and an optimised build of ferrotune. Writes results/quant_cpu.{json,md};
the exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads each contender may use")
    parser.add_argument("--rounds", type=int, default=31, help="times each contender runs")
    parser.add_argument("--rows", type=int, default=2048, help="rows of the matrix")
    parser.add_argument("--columns", type=int, default=5632, help="columns of the matrix")
    parser.add_argument("--quant-type", choices=["nf4", "fp4"], default="nf4", help="4-bit type")
    parser.add_argument("--blocksize", type=int, default=64, help="elements a block")
    parser.add_argument("--name", default="quant_cpu", help="name of the result files")
    options = parser.parse_args()
    # Both are read when the thread pools start, so before the imports.
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    import bitsandbytes.functional as bnb
    import common
    import numpy as np
    import torch

    from ferrotune.quant import dequantize_4bit, quantize_4bit

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = {"blocksize": options.blocksize, "quant_type": options.quant_type}
    record = {
        "machine": common.machine(options.threads, ["numpy", "torch", "bitsandbytes"]),
        "results": {},
    }
    rows, bars = [], []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        source = torch.randn(options.rows, options.columns).mul_(0.02).to(dtype)
        into, copied = torch.zeros_like(source), torch.zeros_like(source)
        # numpy has no bfloat16: its bits as uint16.
        view = (
            (lambda t: t.numpy())
            if dtype != torch.bfloat16
            else (lambda t: t.view(torch.uint16).numpy())
        )
        array, out = view(source), view(into)
        weight = quantize_4bit(array, **settings)
        codes, state = bnb.quantize_4bit(source, compress_statistics=True, **settings)

        times = common.interleave(
            {
                "quantize, bitsandbytes": lambda: bnb.quantize_4bit(
                    source, compress_statistics=True, **settings
                ),
                "quantize, ferrotune": lambda: quantize_4bit(array, **settings),
            },
            rounds=max(5, options.rounds // 3),
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
        assert np.array_equal(out.view(np.uint8), view(bnb.dequantize_4bit(codes, state)).view(np.uint8)), (
            "the values differ"
        )
        assert np.array_equal(weight.packed, codes.numpy().reshape(-1)), "the codes differ"

        size = source.numel() * source.element_size()
        moved = {"copy_": 2 * size}
        moved |= {key: weight.nbytes + size for key in times if key != "copy_"}
        rate = {key: moved[key] / timing.median / 1e9 for key, timing in times.items()}
        record["results"][name] = {
            key: {"seconds": timing, "bytes": moved[key]} for key, timing in times.items()
        }
        rows += [[name, key, timing, f"{rate[key]:.1f}"] for key, timing in times.items()]

        def ratio(slow: str, fast: str, times: dict[str, common.Timing] = times) -> float:
            return times[slow].median / times[fast].median

        bars += [
            common.Bar(
                f"{name}: quantise, speed over bitsandbytes",
                ratio("quantize, bitsandbytes", "quantize, ferrotune"),
                10,
            ),
            common.Bar(
                f"{name}: dequantise into a buffer, bytes/s over copy_",
                rate["dequantize into, ferrotune"] / rate["copy_"],
                0.7,
            ),
            common.Bar(
                f"{name}: dequantise allocating, speed over bitsandbytes",
                ratio("dequantize, bitsandbytes", "dequantize, ferrotune"),
                1,
            ),
        ]
    body = common.table(["type", "what", "time", "GB/s read + written"], rows)
    title = (
        f"4-bit quantisation of a {options.rows}x{options.columns} matrix "
        f"({options.quant_type}, blocks of {options.blocksize}, double-quantised)"
    )
    return 0 if common.write(options.name, title, record, body, bars) else 1


if __name__ == "__main__":
    sys.exit(main())
