"""Few rows by a 4-bit weight, with LoRA and without, beside the peers and dequantise + GEMM.

``python benches/cuda_small.py --peers FOLDER`` writes results/cuda_small.{md,json} and exits with 1
if a bar is missed. ``--quick`` measures ferrotune alone and writes nothing; ``--tune`` prints, for
the shapes of some models, up to how many rows the kernel is the faster one, as
`ferrotune.ops.cuda_small.CROSSOVERS` has it; ``--divisions`` times the ways to divide the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import cuda_common as cuda
import torch
from cuda_peers import Layer, Peers, peft_layer
from torch import Tensor

import common
from ferrotune import ops
from ferrotune.ops import cuda as kernels
from ferrotune.ops import cuda_lora, cuda_small
from ferrotune.ops.types import Projection

BF16 = torch.bfloat16
SHAPES = [(4096, 4096), (4096, 14336)]  # k, n
ROWS = (1, 8, 32, 64)
RANK = 16
LEAST_BARE, LEAST_LORA, LEAST_SHARE = 1.2, 2.0, 70.0
TUNED = [
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (2048, 2048), (2048, 8192),
    (8192, 2048), (3584, 3584), (3584, 18944), (18944, 3584), (8192, 8192), (8192, 28672),
]  # fmt: skip
COLUMNS = [
    "ferrotune", "ferrotune LoRA", "kernel", "kernel LoRA", "dequantise + GEMM",
    "dequantise + GEMM, LoRA", "bitsandbytes", "gemm_4bit", "PEFT + bitsandbytes",
]  # fmt: skip
COPIED = 256 << 20
_BEYOND_L2 = 3  # sets of inputs, which rotate


@dataclasses.dataclass
class Case:
    """A 4-bit weight ``[n, k]`` with an adapter, and x of ``m`` rows."""

    k: int
    n: int
    m: int
    adapter: torch.dtype = BF16

    def __post_init__(self) -> None:
        draw = torch.Generator("cuda").manual_seed(0)

        def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
            return (torch.randn(*size, generator=draw, device="cuda") * scale).to(dtype)

        self.weight = normal(self.n, self.k, scale=self.k**-0.5)
        self.quant = ops.quantize_4bit(self.weight)
        self.lora_A = normal(RANK, self.k, scale=self.k**-0.5, dtype=self.adapter)
        self.lora_B = normal(self.n, RANK, scale=RANK**-0.5, dtype=self.adapter)
        self.xs = [normal(self.m, self.k) for _ in range(_BEYOND_L2)]

    def __str__(self) -> str:
        return f"{self.k}→{self.n}, {self.m} rows"

    @property
    def bytes(self) -> int:
        """What reading the weight takes."""
        parts = (self.quant.packed, self.quant.absmax, self.quant.nested_absmax)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def projection(self, lora: bool) -> Projection:
        if not lora:
            return Projection(None, self.quant)
        return Projection(None, self.quant, None, self.lora_A, self.lora_B, None, 2.0)

    def ours(self, use: str, lora: bool) -> cuda.Work:
        """ferrotune's as it chooses ("auto"), by the kernel of few rows, or by its other path."""
        one = self.projection(lora)

        def run(i: int) -> list[Tensor]:
            cuda_lora.small = use
            return ops.lora_linear_group(self.xs[i % len(self.xs)], [one])

        return run

    def peers(self, peers: Peers) -> dict[str, cuda.Work]:
        """bitsandbytes' layer and its product alone; PEFT's layer over it, and Unsloth's."""
        if peers.bnb is None:
            return {}
        layer = Layer(self.k, self.n, self.m, True, self.adapter, RANK)
        made = peft_layer(layer, self.weight, peers, 0.0, (self.lora_A, self.lora_B)).eval()
        state = made.base_layer.weight.quant_state
        packed = made.base_layer.weight.data

        def product(x: Tensor) -> Tensor:
            return torch.ops.bitsandbytes.gemm_4bit.default(  # type: ignore[no-any-return]
                x, packed, state.shape, state.state2.absmax, state.blocksize, state.quant_type,
                bias=None, absmax_8bit=state.absmax, absmax_code=state.state2.code,
                absmax_offset=state.offset,
            )  # fmt: skip

        forwards: dict[str, Callable[[Tensor], Tensor]] = {
            "bitsandbytes": made.base_layer,
            "gemm_4bit": product,
            "PEFT + bitsandbytes": made,
        }
        return {name: self._work(forward) for name, forward in forwards.items()}

    def _work(self, forward: Callable[[Tensor], Tensor]) -> cuda.Work:
        return lambda i: forward(self.xs[i % len(self.xs)])


def check(case: Case, works: dict[str, cuda.Work]) -> None:
    """All with an adapter compute the same, and all without; raises SystemExit if not."""
    found: dict[str, Any] = {name: work(0) for name, work in works.items()}
    found = {name: y[0] if isinstance(y, list) else y for name, y in found.items()}
    for lora in (False, True):
        of = {name: y.double() for name, y in found.items() if with_lora(name) == lora}
        first = next(iter(of))
        for name, y in of.items():
            off = float((y - of[first]).norm() / of[first].norm())
            if not off < 2e-2:
                raise SystemExit(f"{case}: {name} differs from {first} by {off:.1e}")


def with_lora(name: str) -> bool:
    return name.startswith("PEFT") or name.endswith("LoRA")


def contenders(case: Case, peers: Peers) -> dict[str, cuda.Work]:
    found = {
        "ferrotune": case.ours("auto", False),
        "ferrotune LoRA": case.ours("auto", True),
        "dequantise + GEMM": case.ours("never", False),
        "dequantise + GEMM, LoRA": case.ours("never", True),
    }
    for label, lora in (("", False), (" LoRA", True)):
        taken = cuda_small.division(case.xs[0], case.m, case.projection(lora), "auto")
        if taken is None:  # what the choice goes by is shown all the same
            found[f"kernel{label}"] = case.ours("always", lora)
    return found | case.peers(peers)


def compare(peers: Peers, record: dict[str, Any], rounds: int) -> tuple[str, list[common.Bar]]:
    rows: list[list[object]] = []
    bars: list[common.Bar] = []
    ceiling = cuda.copy_bandwidth(COPIED)
    record["copy_bytes_per_second"] = ceiling
    for (k, n), m in itertools.product(SHAPES, ROWS):
        case = Case(k, n, m)
        works = contenders(case, peers)
        check(case, works)
        times, _ = cuda.graph_or_eager_times(works, pairs=20, rounds=rounds)
        record["results"][str(case)] = {name: {"microseconds": one} for name, one in times.items()}
        floor = case.bytes / ceiling * 1e6
        ours, lora = times["ferrotune"].median, times["ferrotune LoRA"].median
        share = 100 * floor / ours
        shown = {name: times.get(name, "") for name in COLUMNS}
        rows.append([str(case), f"{floor:.1f}", f"{share:.0f} %", *shown.values()])
        if m == 1:
            name = f"{case}: of the copy's bandwidth"
            bars.append(common.Bar(name, share, LEAST_SHARE, unit="%"))
        for label, mine in (("", ours), (", LoRA", lora)):
            other = times[f"dequantise + GEMM{label}"].median
            if f"kernel{label.replace(',', '')}" in times:
                mine = other  # the same work
            bars.append(common.Bar(f"{case}{label}: over dequantise + GEMM", other / mine, 1.0))
        if "gemm_4bit" in times:
            least = min(times[name].median for name in ("gemm_4bit", "bitsandbytes"))
            bars.append(common.Bar(f"{case}: over bitsandbytes", least / ours, LEAST_BARE))
            theirs = times["PEFT + bitsandbytes"].median
            bars.append(common.Bar(f"{case}, LoRA: over PEFT", theirs / lora, LEAST_LORA))
        del case, works
        torch.cuda.empty_cache()
    body = common.table(["case", "floor µs", "floor / ferrotune", *COLUMNS], rows)
    intro = (
        f"{record['machine']['device']}, driver for {record['machine']['driver']}. Microseconds by "
        f"graphs, the L2 flushed before each call. bf16; NF4, double-quantised, blocks of 64; "
        f"r = {RANK}. The floor is the weight's bytes at the speed of a copy of "
        f"{COPIED >> 20} MiB ({ceiling / 1e12:.2f} TB/s read and written). The kernel has a "
        "column of its own where it is not what ferrotune chooses.\n\n"
    )
    return intro + body, bars


def host(record: dict[str, Any]) -> str:
    """Host time of an eager call without gradients, of a layer so small that it alone counts."""
    case = Case(256, 256, 1)
    works = {"ferrotune": case.ours("always", False), "ferrotune LoRA": case.ours("always", True)}
    with torch.no_grad():
        times = cuda.host_times(works)
    record["host"] = {name: {"microseconds": one} for name, one in times.items()}
    rows = [[name, one] for name, one in times.items()]
    return "\n\nHost time of one eager call, one row, 256→256:\n\n" + common.table(["", "µs"], rows)


def tune() -> None:
    for k, n in TUNED:
        most = 0
        for m in (1, 8, 16, 24, 32, 40, 48, 56, 64):
            case = Case(k, n, m)
            works = {use: case.ours(use, True) for use in ("always", "never")}
            times = cuda.graph_times(works, pairs=10, rounds=7)
            faster = times["always"].median < times["never"].median
            print(f"{case}: {times['always']} and {times['never']}", flush=True)
            if not faster:
                break
            most = m
        print(f"    ({n}, {k}): {most},", flush=True)


def divided(case: Case, how: cuda_small.Division) -> cuda.Work:
    one = case.projection(True)
    y = torch.empty(case.m, case.n, dtype=BF16, device="cuda")
    return lambda i: cuda_small.run(case.xs[i % len(case.xs)], case.m, one, how, y)


def divisions(rounds: int) -> None:
    """Every way to divide the work that fits, the fastest first; the one that is taken, marked."""
    for (k, n), m in itertools.product(SHAPES, ROWS):
        case = Case(k, n, m)
        taken = cuda_small.division(case.xs[0], m, case.projection(True), "always")
        works: dict[str, cuda.Work] = {}
        for how in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), range(1, 9)):
            work = divided(case, how)
            try:
                work(0)
            except NotImplementedError:
                continue
            works[f"{how}{' *' if how == taken else ''}"] = work
        times = cuda.graph_times(works, pairs=5, rounds=rounds)
        best = sorted(times.items(), key=lambda item: item[1].median)
        print(f"\n{case}, of {len(best)}:")
        for name, timing in [*best[:10], *[pair for pair in best[10:] if pair[0].endswith("*")]]:
            print(f"  {name}: {timing}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="folder with the peers' packages")
    parser.add_argument("--quick", action="store_true", help="ferrotune alone; write no results")
    parser.add_argument("--tune", action="store_true", help="print crossovers")
    parser.add_argument("--divisions", action="store_true", help="print the fastest divisions")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement")
    options = parser.parse_args()
    start = time.perf_counter()
    peers = Peers(None, None) if options.quick else Peers.load(options.peers)
    torch.manual_seed(0)
    kernels.prepare()
    with torch.no_grad():
        if options.tune or options.divisions:
            tune() if options.tune else divisions(min(options.rounds, 5))
            return 0
        machine = cuda.machine(["torch", "peft", "bitsandbytes"])
        record: dict[str, Any] = {"machine": machine, "results": {}}
        body, bars = compare(peers, record, options.rounds)
    body += host(record)
    if options.quick:
        print(f"{body}\n\n{common.bar_table(bars)}")
        return 0 if all(bar.passed for bar in bars) else 1
    body += f"\n\nMeasured in {time.perf_counter() - start:.0f} s."
    title = "Few rows by a 4-bit weight"
    return 0 if common.write("cuda_small", title, record, body, bars) else 1


if __name__ == "__main__":
    sys.exit(main())
