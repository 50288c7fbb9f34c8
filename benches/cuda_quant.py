"""4-bit kernels beside bitsandbytes, Unsloth and a device copy.

``python benches/cuda_quant.py`` writes results/cuda_quant.{md,json} and exits with 1 if a bar is
missed. Peers that cannot be imported are left out; ``--peers FOLDER`` is put on the path first.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

import cuda_common as cuda
import torch

import common
from ferrotune.ops import cuda as ours
from ferrotune.ops.types import Quant4bit

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)]
BAR_SHAPE = SHAPES[0]
SETS = 3  # of inputs and outputs, rotated


def payload(n: int, k: int, blocksize: int, nested: bool, size: int) -> int:
    """Bytes that have to be moved, for elements of ``size`` bytes."""
    blocks = -(-n * k // blocksize)
    absmax = blocks + 4 * -(-blocks // 256) if nested else 4 * blocks
    return n * k // 2 + absmax + size * n * k


def weights(n: int, k: int, quant_type: str, blocksize: int, nested: bool) -> list[Quant4bit]:
    found = []
    for _ in range(SETS):
        values = torch.randn(n, k, device="cuda").mul_(0.02).bfloat16()
        found.append(ours.quantize_4bit(values, blocksize, quant_type, nested))
    return found


def state_of(functional: Any, quant: Quant4bit) -> Any:
    """bitsandbytes' state on the same tensors."""
    code = functional.get_4bit_type(quant.quant_type, device="cuda")
    state2 = None
    if quant.nested_absmax is not None:
        state2 = functional.QuantState(
            absmax=quant.nested_absmax,
            code=quant.nested_code,
            blocksize=256,
            dtype=torch.float32,
        )
    return functional.QuantState(
        absmax=quant.absmax,
        shape=torch.Size(quant.shape),
        code=code,
        blocksize=quant.blocksize,
        quant_type=quant.quant_type,
        dtype=quant.dtype,
        offset=quant.nested_offset,
        state2=state2,
    )


def peers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        import bitsandbytes.functional as functional

        found["bitsandbytes"] = functional
    except Exception as error:
        print(f"without bitsandbytes: {error}", file=sys.stderr)
    try:
        importlib.import_module("unsloth")
        utils = importlib.import_module("unsloth.kernels.utils")
        found["Unsloth"] = utils.fast_dequantize
    except Exception as error:
        print(f"without Unsloth: {error}", file=sys.stderr)
    return found


def dequantisation(
    n: int, k: int, quant_type: str, nested: bool, dtype: torch.dtype, found: dict[str, Any]
) -> dict[str, cuda.DeviceTiming]:
    quants = weights(n, k, quant_type, 64, nested)
    contenders: dict[str, cuda.Work] = {
        "straight": lambda i: ours.dequantize_4bit(quants[i % SETS], dtype),
        "transposed": lambda i: ours.dequantize_4bit(quants[i % SETS], dtype, transpose=True),
    }
    if "bitsandbytes" in found:
        functional = found["bitsandbytes"]
        states = [state_of(functional, quant._replace(dtype=dtype)) for quant in quants]
        contenders["bitsandbytes"] = lambda i: functional.dequantize_4bit(
            quants[i % SETS].packed, states[i % SETS]
        )
        if "Unsloth" in found and nested and quant_type == "nf4" and dtype == torch.bfloat16:
            contenders["Unsloth"] = lambda i: found["Unsloth"](
                quants[i % SETS].packed, states[i % SETS]
            )
    return cuda.graph_times(contenders)


def quantisation(
    n: int, k: int, nested: bool, found: dict[str, Any]
) -> tuple[dict[str, cuda.DeviceTiming], dict[str, cuda.DeviceTiming]]:
    """By graphs, and between events (bitsandbytes' uses the default stream: no graph takes it)."""
    values = [torch.randn(n, k, device="cuda").mul_(0.02).bfloat16() for _ in range(SETS)]

    def run(i: int) -> object:
        return ours.quantize_4bit(values[i % SETS], 64, "nf4", nested)

    graphs = cuda.graph_times({"ferrotune": run})
    contenders: dict[str, Callable[[int], object]] = {"ferrotune": run}
    if "bitsandbytes" in found:
        functional = found["bitsandbytes"]
        contenders["bitsandbytes"] = lambda i: functional.quantize_4bit(
            values[i % SETS], blocksize=64, quant_type="nf4", compress_statistics=nested
        )
    return graphs, cuda.eager_times(contenders)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="folder with the peers' packages")
    options = parser.parse_args()
    if options.peers:
        sys.path.insert(0, options.peers)
    record: dict[str, Any] = {"machine": cuda.machine(["torch", "bitsandbytes", "unsloth"])}
    found = peers()
    torch.manual_seed(0)
    ours.prepare()

    large = cuda.copy_bandwidth(1 << 30)
    alike = cuda.copy_bandwidth(payload(*BAR_SHAPE, 64, True, 2) // 2)
    ceiling = max(large, alike)
    results: dict[str, Any] = {"copy": {"1 GiB": large, "as many bytes as the first row": alike}}
    bars: list[common.Bar] = []

    cases: list[tuple[tuple[int, int], str, bool, torch.dtype]] = [
        (shape, "nf4", True, torch.bfloat16) for shape in SHAPES
    ]
    cases += [
        (BAR_SHAPE, "nf4", False, torch.bfloat16),
        (BAR_SHAPE, "fp4", True, torch.bfloat16),
        (BAR_SHAPE, "nf4", True, torch.float16),
        (BAR_SHAPE, "nf4", True, torch.float32),
    ]
    rows = []
    for (n, k), quant_type, nested, dtype in cases:
        times = dequantisation(n, k, quant_type, nested, dtype, found)
        moved = payload(n, k, 64, nested, dtype.itemsize)
        name = f"{n}x{k} {quant_type}{' nested' if nested else ''} to {str(dtype)[6:]}"
        results[f"dequantise {name}"] = {
            contender: {"microseconds": timing, "bytes": moved}
            for contender, timing in times.items()
        }
        shares = {
            contender: moved / timing.median * 1e6 / ceiling for contender, timing in times.items()
        }
        if name == "14336x4096 nf4 nested to bfloat16":
            bars += [
                common.Bar("dequantise, of a copy's speed", 100 * shares["straight"], 85, unit="%"),
                common.Bar("… transposed", 100 * shares["transposed"], 75, unit="%"),
            ]
        rows.append(
            [name, f"{moved / ceiling * 1e6:.1f}"]
            + [
                f"{times[contender]}, {100 * shares[contender]:.0f} %" if contender in times else ""
                for contender in ("straight", "transposed", "bitsandbytes", "Unsloth")
            ]
        )
    intro = (
        f"{record['machine']['device']}, driver for {record['machine']['driver']}. A copy moves "
        f"{large / 1e12:.2f} TB/s (1 GiB; read and written bytes), {alike / 1e12:.2f} TB/s with as "
        "many bytes as the first row. The floor is the bytes of packed codes, absmax and values at "
        "the faster of these; shares are of the same. Microseconds by CUDA-graph replay, the L2 "
        "flushed and inputs rotated.\n"
    )
    body = [
        intro,
        "## Dequantisation, blocks of 64\n",
        common.table(["case", "floor", "straight", "transposed", "bitsandbytes", "Unsloth"], rows),
        "\n## Quantisation of bfloat16 to NF4, blocks of 64\n",
    ]

    rows = []
    for n, k in SHAPES:
        for nested in (True, False):
            graphs, eager = quantisation(n, k, nested, found)
            moved = payload(n, k, 64, nested, 2)
            name = f"{n}x{k}{' nested' if nested else ''}"
            results[f"quantise {name}"] = {
                "graph": {"ferrotune": {"microseconds": graphs["ferrotune"], "bytes": moved}},
                "eager": {key: {"microseconds": timing} for key, timing in eager.items()},
            }
            rows.append(
                [
                    name,
                    f"{moved / ceiling * 1e6:.1f}",
                    str(graphs["ferrotune"]),
                    str(eager["ferrotune"]),
                    str(eager.get("bitsandbytes", "")),
                ]
            )
            if (n, k) == BAR_SHAPE and nested:
                bars.append(
                    common.Bar("quantise", graphs["ferrotune"].median, 100, False, unit="µs")
                )
    body.append(common.table(["case", "floor", "graph", "eager", "bitsandbytes, eager"], rows))

    small = weights(256, 256, "nf4", 64, True)[0]
    host = cuda.host_times({"dequantise": lambda i: ours.dequantize_4bit(small, torch.bfloat16)})
    results["host"] = {name: {"microseconds": timing} for name, timing in host.items()}
    body.append(f"\nHost time of one call of dequantize_4bit: {host['dequantise']} µs.")

    record["results"] = results
    title = "4-bit kernels on CUDA"
    return 0 if common.write("cuda_quant", title, record, "\n".join(body), bars) else 1


if __name__ == "__main__":
    sys.exit(main())
