"""Hopper's matrix product of ferrotune's own beside cuBLASLt, forward and input gradient.

``python benches/cuda_gemm.py`` writes results/cuda_gemm.{md,json}; ``--tune`` measures how many
tiles are best taken together for the products of common models' layers and writes what ferrotune
chooses by, ``src/cuda/lora/tuned_table.rs``, to the folder of ``--table``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cuda_common as cuda
import torch

import common
from ferrotune import _native
from ferrotune.ops.cuda import prepare, raw_stream

LAYERS = [(4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096)]
"""(n, k) of the bars."""
MODELS = [
    *LAYERS, (1024, 4096),
    (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192),  # Llama-3.2-1B
    (3584, 3584), (18944, 3584), (3584, 18944),  # Qwen2.5-7B
]  # fmt: skip
"""Those that the table is made for."""
LEAST = 0.97
TOGETHER = (2, 4, 8, 16, 32)


class Product(NamedTuple):
    """``[m, w]`` over ``depth``; ``down_rows``: W lies as ``[depth, w]``, as for dX."""

    m: int
    w: int
    depth: int
    down_rows: bool

    def __str__(self) -> str:
        what = "dX" if self.down_rows else "forward"
        n, k = (self.depth, self.w) if self.down_rows else (self.w, self.depth)
        return f"{n}×{k}, {self.m} tokens, {what}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.w * self.depth


def products(layers: list[tuple[int, int]], tokens: tuple[int, ...]) -> Iterator[Product]:
    for m in tokens:
        for n, k in layers:
            yield Product(m, n, k, False)
            yield Product(m, k, n, True)


class Inputs:
    """Rotated sets of random x and W, one output, and what is run on them."""

    def __init__(self, of: Product, sets: int = 2) -> None:
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        lies = (of.depth, of.w) if of.down_rows else (of.w, of.depth)
        self.of = of
        self.x = [torch.randn(of.m, of.depth, **kind) for _ in range(sets)]
        self.w = [torch.randn(*lies, **kind).mul_(of.depth**-0.5) for _ in range(sets)]
        self.out = torch.empty(of.m, of.w, **kind)

    def cublas(self, i: int) -> torch.Tensor:
        x, w = self.x[i % len(self.x)], self.w[i % len(self.w)]
        return torch.mm(x, w if self.of.down_rows else w.t(), out=self.out)

    def ours(self, i: int, together: int = 0) -> torch.Tensor:
        x, w = self.x[i % len(self.x)], self.w[i % len(self.w)]
        index = x.device.index
        _native.cuda_product(
            index, raw_stream(index), "bfloat16", x.data_ptr(), w.data_ptr(), self.out.data_ptr(),
            (self.of.m, self.of.w, self.of.depth), self.of.down_rows, together,
        )  # fmt: skip
        return self.out

    def check(self) -> None:
        """The same values as cuBLAS's to rounding."""
        expected = self.cublas(0).clone()
        self.out.fill_(float("nan"))
        torch.testing.assert_close(self.ours(0), expected, rtol=2e-2, atol=2e-2)


def compare() -> bool:
    record: dict[str, Any] = {"machine": cuda.machine(["torch"]), "results": {}}
    rows: list[list[object]] = []
    bars: list[common.Bar] = []
    start = time.perf_counter()
    for product in products(LAYERS, (4096, 8192)):
        inputs = Inputs(product)
        inputs.check()
        work = {"cuBLASLt": inputs.cublas, "ferrotune": inputs.ours}
        times = cuda.graph_times(work, pairs=6, rounds=9)
        record["results"][str(product)] = {name: vars(one) for name, one in times.items()}
        rates = [product.operations / one.median / 1e6 for one in times.values()]
        ratio = times["cuBLASLt"].median / times["ferrotune"].median
        rows.append([product, *times.values(), *(f"{rate:.0f}" for rate in rates), f"{ratio:.3f}"])
        bars.append(common.Bar(f"{product}: speed over cuBLASLt", ratio, LEAST))
        print(rows[-1][0], rows[-1][-1], flush=True)
        del inputs
    where = record["machine"]
    intro = (
        f"{where['device']}, driver for {where['driver']}; measured in "
        f"{time.perf_counter() - start:.0f} s. bf16, random values, no LoRA term. Graphs: the L2 "
        "flushed before each product and inputs rotated."
    )
    header = ["product", "cuBLASLt µs", "ferrotune µs", "TFLOP/s", "ferrotune TFLOP/s", "speed"]
    body = f"{intro}\n\n{common.table(header, rows)}"
    return common.write("cuda_gemm", "Hopper's product beside cuBLASLt", record, body, bars)


def tune(folder: Path) -> None:
    lines = []
    for product in products(MODELS, (2048, 8192)):
        inputs = Inputs(product)
        work = {"cuBLASLt": inputs.cublas} | {
            str(together): functools.partial(inputs.ours, together=together)
            for together in TOGETHER
        }
        times = cuda.graph_times(work, pairs=3, rounds=5)
        cublas = times.pop("cuBLASLt").median
        ours, best = min((one.median, name) for name, one in times.items())
        spread = " ".join(f"{name}:{one.median / ours:.3f}" for name, one in times.items())
        print(f"{product}: cuBLASLt {cublas / ours:.3f} of ours; {spread}", flush=True)
        down = str(product.down_rows).lower()
        lines.append(
            f"    Tuned {{ m: {product.m}, w: {product.w}, depth: {product.depth}, "
            f"down_rows: {down}, together: {best}, ours: {ours:.1f}, cublas: {cublas:.1f} }},"
        )
        del inputs, work
        torch.cuda.empty_cache()
    where = cuda.machine(["torch"])
    head = f"// {where['device']}, driver for {where['driver']}, {where['date'][:10]}."
    text = "\n".join([head, "&[", *lines, "]", ""])
    common.write_atomic(folder / "tuned_table.rs", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="make the table instead")
    parser.add_argument("--table", type=Path, default=Path(), help="folder that it is written to")
    options = parser.parse_args()
    torch.manual_seed(0)
    prepare()
    if options.tune:
        tune(options.table)
        return 0
    return 0 if compare() else 1


if __name__ == "__main__":
    sys.exit(main())
