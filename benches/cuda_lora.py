"""LoRA and QLoRA linears, forward + backward, beside the frozen layer and the peers.

``python benches/cuda_lora.py --peers FOLDER`` writes results/cuda_lora.{md,json} and exits with 1
if a bar is missed. Peers that cannot be imported are left out. ``--quick`` measures ferrotune and
the frozen layer alone, ``--match`` only cases of 8192 tokens whose name has its text, and
``--profile`` prints the kernels of one call; none of them writes results.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import cuda_common as cuda
import torch
from cuda_peers import Contenders, Layer, Peers

import common
from ferrotune.ops import cuda as kernels

BF16, F32 = torch.bfloat16, torch.float32
DROPOUT = 0.05
# k, n, and the most that QLoRA and LoRA may take of the frozen layer's time.
SHAPES = [
    (4096, 4096, 1.20, 1.20),
    (4096, 14336, 1.13, 1.12),
    (14336, 4096, 1.13, 1.12),
    (4096, 1024, 1.9, 1.9),
]
SHORT = [(4096, 4096, 1.4), (4096, 14336, None), (4096, 1024, None)]  # 2048 tokens
MOST_DROPOUT, MOST_RANK, MOST_HOST = 0.08, 1.05, 60.0
PEERS = {True: ("PEFT + bitsandbytes", "Unsloth"), False: ("PEFT", "Unsloth")}
Rows = list[list[object]]


def kind(layer: Layer) -> str:
    types = f"{'QLoRA' if layer.quant else 'LoRA'}, adapters in {str(layer.adapter)[6:]}"
    return f"{types}, {layer.tokens} tokens"


class Report:
    """Numbers for the JSON, tables for people, and the bars."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.body: list[str] = []
        self.bars: list[common.Bar] = []

    def keep(self, case: str, times: dict[str, cuda.DeviceTiming], how: str) -> None:
        found = self.results.setdefault(case, {})
        found[how] = {name: {"microseconds": timing} for name, timing in times.items()}

    def table(self, title: str, header: list[str], rows: Rows) -> None:
        text = f"\n## {title}\n\n{common.table(header, rows)}"
        print(text, flush=True)
        self.body.append(text)

    def most(self, name: str, value: float, limit: float, unit: str = "x") -> None:
        self.bars.append(common.Bar(name, value, limit, at_least=False, unit=unit))


def cell(times: dict[str, cuda.DeviceTiming], name: str, refused: list[str]) -> str:
    """As a multiple of the frozen layer's time; with a star where no graph took it."""
    if name not in times:
        return ""
    return f"{times[name].median / times['frozen'].median:.3f}{'*' if name in refused else ''}"


def long(
    report: Report, peers: Peers, quant: bool, adapter: torch.dtype, quick: bool, match: str = ""
) -> None:
    """8192 tokens, by graphs: the shapes, with dropout, with r = 64."""
    rows: Rows = []
    columns = ["ferrotune"] + ([] if quick else list(PEERS[quant]))
    for k, n, most_quant, most_dense in SHAPES:
        layer = Layer(k, n, 8192, quant, adapter)
        if match not in f"{layer} {kind(layer)}":
            continue
        made = Contenders(layer, peers, DROPOUT, torch.device("cuda"))
        forwards = made.forwards(alone=quick)
        made.check(forwards)
        forwards["ferrotune r=64"] = made.with_rank_64()
        work = {name: made.work(*pair) for name, pair in forwards.items()}
        times, refused = cuda.graph_or_eager_times(work, pairs=8, rounds=5 if quick else 9)
        report.keep(f"{layer} {kind(layer)}", times, "graph")
        frozen, ours = times["frozen"].median, times["ferrotune"].median
        name = f"{layer}, {kind(layer)}"
        report.most(
            f"{name}: of the frozen layer", ours / frozen, most_quant if quant else most_dense
        )
        more = (times["ferrotune dropout"].median - ours) / frozen
        report.most(f"{name}: more with dropout {DROPOUT}", more, MOST_DROPOUT)
        rank = times["ferrotune r=64"].median / ours
        report.most(f"{name}: r = 64 over r = 16", rank, MOST_RANK)
        rows.append(
            [layer, times["frozen"], f"{ours - frozen:.0f}"]
            + [cell(times, f"{column}{p}", refused) for column in columns for p in ("", " dropout")]
            + [f"{rank:.3f}"]
        )
        del made, forwards, work
        torch.cuda.empty_cache()
    if not rows:
        return
    header = ["layer", "frozen µs", "more µs"]
    header += [text for column in columns for text in (column, "… dropout")] + ["r = 64 / r = 16"]
    report.table(f"{kind(layer)}: multiples of the frozen layer's time, by graphs", header, rows)


def short(report: Report, peers: Peers, adapter: torch.dtype, quick: bool) -> None:
    """2048 tokens of QLoRA: calls on an idle device, and by graphs."""
    rows: Rows = []
    columns = ["ferrotune"] + ([] if quick else list(PEERS[True]))
    for k, n, limit in SHORT:
        layer = Layer(k, n, 2048, True, adapter)
        made = Contenders(layer, peers, DROPOUT, torch.device("cuda"), sets=3)
        forwards = made.forwards(alone=quick)
        calls = cuda.call_times({name: made.eager(*pair) for name, pair in forwards.items()})
        work = {name: made.work(*pair) for name, pair in forwards.items()}
        graphs, refused = cuda.graph_or_eager_times(work, pairs=16, rounds=5 if quick else 9)
        report.keep(f"{layer} {kind(layer)}", calls, "eager")
        report.keep(f"{layer} {kind(layer)}", graphs, "graph")
        if limit is not None:
            ratio = calls["ferrotune"].median / calls["frozen"].median
            report.most(f"{layer}, {kind(layer)}, eager: of the frozen layer", ratio, limit)
        for how, times in (("eager", calls), ("graph", graphs)):
            stars = refused if how == "graph" else []
            found = [
                cell(times, f"{column}{p}", stars) for column in columns for p in ("", " dropout")
            ]
            rows.append([f"{layer}, {how}", times["frozen"], *found])
        del made, forwards, work
        torch.cuda.empty_cache()
    header = ["layer", "frozen µs"]
    header += [text for column in columns for text in (column, "… dropout")]
    report.table(f"{kind(layer)}: multiples of the frozen layer's time", header, rows)


def host(report: Report, peers: Peers, quick: bool) -> None:
    """One eager forward + backward of a layer so small that the device keeps up."""
    found: dict[str, list[object]] = {}
    cases = [(quant, adapter) for quant in (True, False) for adapter in (BF16, F32)]
    for quant, adapter in cases:
        layer = Layer(256, 256, 16, quant, adapter)
        made = Contenders(layer, peers, DROPOUT, torch.device("cuda"))
        forwards = made.forwards(alone=quick)
        times = cuda.host_times({name: made.eager(*pair) for name, pair in forwards.items()})
        report.keep(f"host time, {kind(layer)}", times, "host")
        name = kind(layer).removesuffix(f", {layer.tokens} tokens")
        report.most(f"host time, {name}", times["ferrotune"].median, MOST_HOST, "µs")
        for contender, timing in times.items():
            label = contender.replace("PEFT + bitsandbytes", "PEFT")
            found.setdefault(label, [""] * len(cases))[cases.index((quant, adapter))] = timing
    header = ["µs of host time"]
    header += [f"{'QLoRA' if quant else 'LoRA'}, {str(adapter)[6:]}" for quant, adapter in cases]
    report.table("Host time of one eager forward + backward, 16 tokens, 256→256", header, [
        [name, *timings] for name, timings in found.items()
    ])  # fmt: skip


def memory(report: Report, peers: Peers, adapter: torch.dtype, quick: bool) -> None:
    """Peak bytes beyond the inputs, y and the gradients, 8192 tokens of QLoRA."""
    rows: Rows = []
    columns = ["ferrotune"] + ([] if quick else list(PEERS[True]))
    for k, n, *_ in SHAPES[:3]:
        layer = Layer(k, n, 8192, True, adapter)
        made = Contenders(layer, peers, DROPOUT, torch.device("cuda"), sets=1)
        extra: dict[str, int] = {}
        for name, (forward, parameters) in made.forwards(alone=quick).items():
            work = made.work(forward, parameters)
            extra[name] = cuda.extra_bytes(lambda work=work: work(0))  # type: ignore[misc]
        report.results[f"extra memory, {layer} {kind(layer)}"] = extra
        for label in ("", " dropout"):
            beside = (extra[f"ferrotune{label}"] - layer.h) / layer.scratch
            name = f"extra memory beside H, {layer}, {kind(layer)}{label}"
            report.most(name, beside, 2, "weights")
        rows.append([layer, f"{layer.scratch / 2**20:.0f}", f"{layer.h / 2**20:.2f}"] + [
            f"{extra[name] / 2**20:.1f}" if name in extra else ""
            for column in columns for name in (column, f"{column} dropout")
        ])  # fmt: skip
        del made, forward, parameters, work
        torch.cuda.empty_cache()
    header = ["layer", "W in bf16", "H"]
    header += [text for column in columns for text in (column, "… dropout")]
    title = f"Extra memory in MiB beyond y and the gradients, {kind(layer)}"
    report.table(title, header, rows)


def profile(peers: Peers, adapter: torch.dtype, match: str) -> None:
    """Prints the kernels of one forward + backward of ferrotune and of the frozen layer."""
    for tokens in (8192, 2048):
        for quant in (True, False):
            for k, n, *_ in SHAPES:
                layer = Layer(k, n, tokens, quant, adapter)
                if match not in f"{layer} {kind(layer)}":
                    continue
                made = Contenders(layer, peers, DROPOUT, torch.device("cuda"))
                forwards = made.forwards(alone=True) | {"ferrotune r=64": made.with_rank_64()}
                for name, pair in forwards.items():
                    times = cuda.kernel_times(made.work(*pair))
                    total = sum(spent for spent, _ in times.values())
                    print(f"\n{layer}, {kind(layer)}, {name}: {total:.1f} µs in kernels")
                    for key, (spent, count) in times.items():
                        share = f"{100 * spent / total:5.1f} %"
                        print(f"{spent:9.1f} µs {share} {count:4.1f}x  {key[:110]}")
                del made, forwards, pair
                torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="folder with the peers' packages")
    parser.add_argument("--quick", action="store_true", help="ferrotune and the frozen layer alone")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one call")
    parser.add_argument("--match", default="", help="only cases whose name has this")
    parser.add_argument("--adapters", choices=["bfloat16", "float32"], help="one type alone")
    options = parser.parse_args()
    start = time.perf_counter()
    peers = Peers.load(options.peers)
    torch.manual_seed(0)
    kernels.prepare()
    adapters = [BF16, F32] if options.adapters is None else [getattr(torch, options.adapters)]
    if options.profile:
        for adapter in adapters:
            profile(peers, adapter, options.match)
        return 0
    record: dict[str, Any] = {"machine": cuda.machine(["torch", "peft", "bitsandbytes", "unsloth"])}
    report = Report()
    for adapter in adapters:
        for quant in (True, False):
            long(report, peers, quant, adapter, options.quick, options.match)
        if options.match:
            continue
        short(report, peers, adapter, options.quick)
        memory(report, peers, adapter, options.quick)
    if not options.match:
        host(report, peers, options.quick)
    took = time.perf_counter() - start
    if options.quick or options.match or options.adapters is not None:
        print(f"\n{common.bar_table(report.bars)}\n\n{took:.0f} s; results are not written")
        return 0 if all(bar.passed for bar in report.bars) else 1
    record["results"] = report.results
    intro = (
        f"{record['machine']['device']}, driver for {record['machine']['driver']}; measured in "
        f"{took:.0f} s. bf16 inputs; r = 16; dropout {DROPOUT}; 4 bits are NF4, double-quantised, "
        "in blocks of 64. Frozen is `F.linear` on bf16 weights and its backward to x. Graphs: "
        "replays of forward + backward, the L2 flushed before each and inputs rotated. Eager: one "
        "call at a time on an idle device, host time included. A star: no graph takes it, timed "
        "between events."
    )
    body = "\n".join([intro, *report.body])
    done = common.write("cuda_lora", "LoRA linears on CUDA", record, body, report.bars)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
