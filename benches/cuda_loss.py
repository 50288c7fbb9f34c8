"""Linear cross-entropy beside its two products, PyTorch's own operations and Liger's.

``python benches/cuda_loss.py`` writes results/cuda_loss.{md,json} and exits with 1 if a bar is
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
from ferrotune import ops
from ferrotune.ops import cuda as device
from ferrotune.ops import cuda_cross_entropy
from ferrotune.ops.cross_entropy_types import Settings

TOKENS = 8192
CLASSES = [32_000, 128_256, 151_936, 256_000]
WIDTHS = [4096, 2048]
SWEEP = [(128_256, 4096), (128_256, 2048), (32_000, 4096)]
SWEPT_ROWS = [512, 1024, 2048, 4096]
KERNEL_ROWS = 1024
_BYTES_OF_A_LOGIT = 64  # in PyTorch's operations, and in two captured graphs of them
SETS = 2  # of hidden states and labels, rotated
GRAPHS = {"pairs": 4, "rounds": 7}


def liger() -> Any:
    try:
        return importlib.import_module("liger_kernel.transformers")
    except Exception as error:
        print(f"without Liger: {error}", file=sys.stderr)
        return None


def inputs(classes: int, d: int) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    hidden = [torch.randn(TOKENS, d, device="cuda").bfloat16() for _ in range(SETS)]
    weight = torch.randn(classes, d, device="cuda").mul_(d**-0.5).bfloat16()
    labels = [torch.randint(0, classes, (TOKENS,), device="cuda") for _ in range(SETS)]
    return hidden, weight, labels


def contenders(classes: int, d: int, peers: Any) -> dict[str, Callable[[int], list[torch.Tensor]]]:
    """Each returns the gradient of the hidden states, of a frozen head."""
    hidden, weight, labels = inputs(classes, d)
    logits = torch.empty(TOKENS, classes, device="cuda", dtype=torch.bfloat16)
    gradient = torch.empty(TOKENS, d, device="cuda", dtype=torch.bfloat16)

    def products(i: int) -> list[torch.Tensor]:
        with torch.no_grad():
            torch.mm(hidden[i % SETS], weight.t(), out=logits)
            torch.mm(logits, weight, out=gradient)
        return []

    def step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], i: int) -> Any:
        x = hidden[i % SETS].detach().requires_grad_()  # a graph takes no leaf made before it
        return list(torch.autograd.grad(loss(x, labels[i % SETS]), x))

    def by_pytorch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((x @ weight.t()).float(), y)

    found: dict[str, Callable[[int], list[torch.Tensor]]] = {
        "products": products,
        "ferrotune": lambda i: step(lambda x, y: ops.linear_cross_entropy(x, weight, y), i),
    }
    if torch.cuda.mem_get_info()[0] > _BYTES_OF_A_LOGIT * logits.numel():
        found["PyTorch"] = lambda i: step(by_pytorch, i)
    if peers is not None:
        fused = peers.LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda i: step(lambda x, y: fused(weight, x, y), i)
    return found


def steps(
    classes: int, d: int, peers: Any
) -> tuple[dict[str, cuda.DeviceTiming], dict[str, float], list[str]]:
    """Times, MiB beyond what was there and is returned, and who was timed outside of graphs."""
    works = contenders(classes, d, peers)
    times, refused = cuda.graph_or_eager_times(works, **GRAPHS)
    memory = {name: cuda.extra_bytes(lambda w=work: w(0)) / 2**20 for name, work in works.items()}  # type: ignore[misc]
    return times, memory, refused


def sweep(classes: int, d: int) -> dict[str, cuda.DeviceTiming]:
    """By the rows of a chunk."""
    hidden, weight, labels = inputs(classes, d)
    found: dict[str, cuda.DeviceTiming] = {}
    chosen = cuda_cross_entropy.chunk_rows
    own = chosen(hidden[0], classes, False)

    def run(i: int) -> Any:
        x = hidden[i % SETS].detach().requires_grad_()
        return torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels[i % SETS]), x)

    for rows in SWEPT_ROWS:
        cuda_cross_entropy.chunk_rows = lambda *_, rows=rows: rows
        name = f"{rows}{' (chosen)' if rows == own else ''}"
        found |= cuda.graph_times({name: run}, **GRAPHS)
    cuda_cross_entropy.chunk_rows = chosen
    return found


def kernel(classes: int, softcap: float, peers: Any) -> dict[str, cuda.DeviceTiming]:
    """The loss and gradient of a chunk's logits, in their place, alone."""
    logits = torch.randn(KERNEL_ROWS, classes, device="cuda").bfloat16()
    labels = torch.randint(0, classes, (KERNEL_ROWS,), device="cuda")
    losses = torch.empty(KERNEL_ROWS, device="cuda")
    one = torch.ones((), device="cuda")
    settings = Settings(-100, 0.0, softcap, "mean")
    works: dict[str, cuda.Work] = {
        "ferrotune": lambda _: cuda_cross_entropy.rows(logits, labels, losses, one, settings)
    }
    if peers is not None:
        theirs = peers.LigerCrossEntropyLoss(softcap=softcap or None)
        kept = logits.clone()
        works["Liger"] = lambda _: theirs(kept.detach().requires_grad_(), labels)
    return cuda.graph_or_eager_times(works, pairs=10, rounds=9)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="folder with the peers' packages")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="vocabularies")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="hidden sizes")
    options = parser.parse_args()
    if options.peers:
        sys.path.insert(0, options.peers)
    record: dict[str, Any] = {"machine": cuda.machine(["torch", "liger-kernel"])}
    peers = liger()
    torch.manual_seed(0)
    device.prepare()
    ceiling = cuda.copy_bandwidth(1 << 30)
    results: dict[str, Any] = {"copy": ceiling}
    bars: list[common.Bar] = []

    rows = []
    for d in options.widths:
        for classes in options.classes:
            times, memory, refused = steps(classes, d, peers)
            results[f"V={classes} d={d}"] = {
                name: {"microseconds": times[name], "mebibytes": memory[name]} for name in times
            }
            floor = times["products"].median
            own = times["ferrotune"].median / floor
            if d == WIDTHS[0]:
                bars += [
                    common.Bar(f"V={classes}, of the products' time", own, 1.2, False),
                    common.Bar("… workspace", memory["ferrotune"], 512, False, "MiB"),
                ]
            cells = [f"{classes}", f"{d}", f"{floor / 1e3:.2f} ms"]
            for name in ("ferrotune", "Liger", "PyTorch"):
                if name not in times:
                    cells += ["", ""]
                    continue
                star = " (eager)" if name in refused else ""
                cells += [
                    f"{times[name].median / 1e3:.2f} ms, {times[name].median / floor:.2f} x{star}",
                    f"{memory[name]:.0f} MiB",
                ]
            rows.append(cells)
            torch.cuda.empty_cache()
    intro = (
        f"{record['machine']['device']}, driver for {record['machine']['driver']}. Loss and "
        f"gradient of {TOKENS} hidden states, bfloat16, frozen head. The products are the two bare "
        "ones, unchunked. Device time by CUDA-graph replay, the L2 flushed and inputs rotated; "
        "memory is the peak beyond what was there and the returned gradient.\n"
    )
    body = [
        intro,
        common.table(
            ["V", "d", "products", "ferrotune", "", "Liger", "", "PyTorch", ""],
            rows,
        ),
        "\n## Rows of a chunk\n",
    ]

    rows = []
    for classes, d in SWEEP:
        if classes not in options.classes or d not in options.widths:
            continue
        found = sweep(classes, d)
        results[f"rows, V={classes} d={d}"] = {
            name: {"microseconds": timing} for name, timing in found.items()
        }
        rows.append(
            [f"{classes}", f"{d}"] + [f"{n}: {t.median / 1e3:.2f} ms" for n, t in found.items()]
        )
        torch.cuda.empty_cache()
    body += [
        common.table(["V", "d", *[""] * len(SWEPT_ROWS)], rows),
        f"\n## The kernel alone, {KERNEL_ROWS} rows\n",
    ]

    rows = []
    for classes in options.classes:
        for softcap in (0.0, 30.0):
            times = kernel(classes, softcap, peers)
            moved = 2 * 2 * KERNEL_ROWS * classes
            results[f"kernel, V={classes} softcap={softcap:g}"] = {
                name: {"microseconds": timing, "bytes": moved} for name, timing in times.items()
            }
            shares = {n: 100 * moved / t.median * 1e6 / ceiling for n, t in times.items()}
            if softcap == 0:
                name = f"kernel, V={classes}, of a copy's speed"
                bars.append(common.Bar(name, shares["ferrotune"], 80, unit="%"))
                if "Liger" in times:
                    speed = times["Liger"].median / times["ferrotune"].median
                    bars.append(common.Bar("… of Liger's speed", speed, 1))
            rows.append(
                [f"{classes}", f"{softcap:g}", f"{moved / ceiling * 1e6:.0f}"]
                + [
                    f"{times[name]}, {shares[name]:.0f} %" if name in times else ""
                    for name in ("ferrotune", "Liger")
                ]
            )
        torch.cuda.empty_cache()
    body.append(common.table(["V", "softcap", "floor, µs", "ferrotune, µs", "Liger, µs"], rows))

    record["results"] = results
    title = "Linear cross-entropy on CUDA"
    return 0 if common.write("cuda_loss", title, record, "\n".join(body), bars) else 1


if __name__ == "__main__":
    sys.exit(main())
