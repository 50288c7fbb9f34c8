"""Timing on a CUDA device, for every benchmark of kernels and layers.

Device time is that of CUDA-graph replays: a graph of many pairs "flush, work" less a graph of the
flushes alone, by the number of pairs; so neither launches nor event latencies count. The flush
reads a buffer larger than the L2: nothing of the work's data is there when it starts, and what it
left to be written back counts as its own. The work's inputs are rotated.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import common

_FLUSH_BYTES = 192 << 20  # over three times an H100's L2
_WARMUP = 3

Work = Callable[[int], object]
"""One unit of work on the inputs of that number, which the caller reduces to its sets."""


@dataclasses.dataclass(frozen=True)
class DeviceTiming:
    """Microseconds on the device: the median of the replays, first and third quartile."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


def _summary(values: Sequence[float]) -> DeviceTiming:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return DeviceTiming(statistics.median(values), low, high, len(values))


class Flusher:
    """Reads a buffer that is larger than the L2."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.result = torch.zeros((), dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        torch.amax(self.buffer, dim=0, out=self.result)


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of ``work``, warmed up on a side stream first."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def graph_times(
    contenders: Mapping[str, Work], *, pairs: int = 20, rounds: int = 15
) -> dict[str, DeviceTiming]:
    """Device time of each contender; they take turns, round after round."""
    flush = Flusher()

    def flushed(work: Work | None) -> Callable[[], None]:
        def run() -> None:
            for i in range(pairs):
                flush()
                if work is not None:
                    work(i)

        return run

    bare = capture(flushed(None))
    graphs = {name: capture(flushed(work)) for name, work in contenders.items()}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_WARMUP):
        bare.replay()
        for graph in graphs.values():
            graph.replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            with_work, without = _replay(graph), _replay(bare)
            found[name].append((with_work - without) / pairs)
    return {name: _summary(values) for name, values in found.items()}


def event() -> torch.cuda.Event:
    """That a time is read from."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds between events around a replay."""
    start, end = event(), event()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def eager_times(
    contenders: Mapping[str, Work], *, calls: int = 20, rounds: int = 15
) -> dict[str, DeviceTiming]:
    """Time of a call between events around each, host time included where it is the longer."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    flush = Flusher()
    for work in contenders.values():
        for i in range(_WARMUP):
            work(i)
    for _ in range(rounds):
        for name, work in contenders.items():
            events = []
            torch.cuda.synchronize()
            for i in range(calls):
                flush()
                start, end = event(), event()
                start.record()
                work(i)
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
            times = [start.elapsed_time(end) * 1e3 for start, end in events]
            found[name].append(statistics.median(times))
    return {name: _summary(values) for name, values in found.items()}


def call_times(
    contenders: Mapping[str, Work], *, calls: int = 20, rounds: int = 9
) -> dict[str, DeviceTiming]:
    """Time of a call on an idle device, from its first launch to its end: host time shows."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    flush = Flusher()
    for work in contenders.values():
        for i in range(_WARMUP):
            work(i)
    for _ in range(rounds):
        for name, work in contenders.items():
            times = []
            for i in range(calls):
                flush()
                torch.cuda.synchronize()
                start, end = event(), event()
                start.record()
                work(i)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3)
            found[name].append(statistics.median(times))
    return {name: _summary(values) for name, values in found.items()}


def graph_or_eager_times(
    contenders: Mapping[str, Work], *, pairs: int, rounds: int
) -> tuple[dict[str, DeviceTiming], list[str]]:
    """``graph_times``, and ``eager_times`` of those that no graph takes, whose names come too."""
    refused = []
    for name, work in contenders.items():
        try:
            capture(lambda work=work: work(0))  # type: ignore[misc]
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"no graph takes {name}: {str(error).splitlines()[0]}")
            refused.append(name)
    taken = {name: work for name, work in contenders.items() if name not in refused}
    times = graph_times(taken, pairs=pairs, rounds=rounds)
    if refused:
        times |= eager_times({name: contenders[name] for name in refused}, rounds=rounds)
    return {name: times[name] for name in contenders}, refused


def extra_bytes(work: Callable[[], Sequence[torch.Tensor]]) -> int:
    """Peak of a call beyond what was allocated before it and what it returns."""
    for _ in range(_WARMUP):
        work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = sum(tensor.numel() * tensor.element_size() for tensor in work())
    return torch.cuda.max_memory_allocated() - before - returned


def kernel_times(work: Work, *, calls: int = 5) -> dict[str, tuple[float, float]]:
    """Of each kernel, copy and fill of a call: microseconds and launches, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    for i in range(_WARMUP):
        work(i)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for i in range(calls):
            work(i)
        torch.cuda.synchronize()
    events = [event for event in found.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {
        event.key: (event.self_device_time_total / calls, event.count / calls) for event in events
    }


def host_times(
    contenders: Mapping[str, Work], *, calls: int = 200, rounds: int = 7
) -> dict[str, DeviceTiming]:
    """Host time of a call, of work small enough that the device keeps up: microseconds."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            for i in range(_WARMUP):
                work(i)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(calls):
                work(i)
            found[name].append((time.perf_counter() - start) / calls * 1e6)
            torch.cuda.synchronize()
    return {name: _summary(values) for name, values in found.items()}


def copy_bandwidth(copied: int) -> float:
    """Bytes read and written a second by PyTorch's copy of ``copied`` bytes: the ceiling."""
    source = torch.empty(copied, dtype=torch.uint8, device="cuda").random_()
    targets = [torch.empty_like(source) for _ in range(2)]
    found = graph_times({"copy": lambda i: targets[i % 2].copy_(source)}, pairs=8)
    return 2 * copied / found["copy"].median * 1e6


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Where and with what a result was measured, the device too."""
    import importlib.metadata

    present = []
    for name in packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        present.append(name)
    record = common.machine(torch.get_num_threads(), present)
    record["device"] = torch.cuda.get_device_name(0)
    record["driver"] = _driver()
    return record


def _driver() -> str:
    from ferrotune import _native

    version, _ = _native.cuda_driver()
    return "" if version is None else f"CUDA {version // 1000}.{version % 1000 // 10}"
