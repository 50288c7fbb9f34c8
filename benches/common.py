"""What every benchmark shares: interleaved timing, the record of the machine, result files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender: the median of its rounds, and the first and third quartile."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms ({self.low * 1e3:.2f}-{self.high * 1e3:.2f})"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One promise: ``value`` is to be at least (or at most) ``limit``."""

    name: str
    value: float
    limit: float
    at_least: bool = True
    unit: str = "x"

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 8,
    warmup: int = 2,
    pause: float = 0.02,
) -> dict[str, Timing]:
    """Times the contenders in turns, so that a slow spell of the machine hits all alike.

    A turn starts after ``pause`` seconds, in which the threads of the one before stop spinning for
    more work (OpenMP's do so for some milliseconds, on the cores that the next one needs), and is
    ``calls`` calls in a row, of which the first ``warmup`` are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(pause)
            for i in range(calls):
                start = time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
                if i >= warmup:
                    seconds[name].append(elapsed)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: Sequence[float]) -> Timing:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(statistics.median(seconds), low, high, len(seconds))


def machine(threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        # Where what runs was built elsewhere, FERROTUNE_COMMIT says from what.
        "commit": os.environ.get("FERROTUNE_COMMIT")
        or _git("rev-parse", "--short=12", "HEAD")
        + ("-dirty" if _git("status", "--porcelain", "src", "kernels") else ""),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent.parent
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    name = _field(lines, "model name") or platform.processor()
    flags = _field(lines, "flags").split()
    vector = next((flag for flag in ("avx512bw", "avx2") if flag in flags), "no AVX2")
    return f"{name}, family {_field(lines, 'cpu family')} model {_field(lines, 'model')}, {vector}"


def _field(lines: Sequence[str], name: str) -> str:
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0].strip() == name), ""
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def interval(found: Mapping[str, float], sign: str = "") -> str:
    """A value with the ends of its interval, as results have them in JSON."""
    value, low, high = (format(found[name], f"{sign}.3f") for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def bar_table(bars: Sequence[Bar]) -> str:
    def row(bar: Bar) -> list[str]:
        sign = "≥" if bar.at_least else "≤"
        verdict = "pass" if bar.passed else "**fail**"
        return [
            bar.name,
            f"{bar.value:.2f} {bar.unit}",
            f"{sign} {bar.limit:g} {bar.unit}",
            verdict,
        ]

    return table(["bar", "measured", "asked", ""], [row(bar) for bar in bars])


TURNS = "Median of the rounds with the first and third quartile; the contenders took turns."


def write(
    name: str,
    title: str,
    record: Mapping[str, Any],
    body: str,
    bars: Sequence[Bar],
    method: str = TURNS,
) -> bool:
    """Writes ``results/<name>.json`` (``record`` and the bars) and ``.md`` (for people).

    ``method`` says how the figures came about. Prints the latter file, and returns whether every
    bar was met.
    """
    where = record["machine"]
    versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    head = (
        f"# {title}\n\n"
        f"{where['date']}, commit {where['commit']}; {where['cpu']}, {where['threads']} threads of "
        f"{where['cores']} cores, load {where['load_before']} before; Python {where['python']}, "
        f"{versions}.\n"
        f"{method}\n"
    )
    markdown = "\n".join([head, body, *([f"\n{bar_table(bars)}"] if bars else []), ""])
    verdicts = [{**dataclasses.asdict(bar), "passed": bar.passed} for bar in bars]
    data = {"name": name, **record, "bars": verdicts}
    RESULTS.mkdir(exist_ok=True)
    write_atomic(
        RESULTS / f"{name}.json", json.dumps(data, indent=2, default=dataclasses.asdict) + "\n"
    )
    write_atomic(RESULTS / f"{name}.md", markdown)
    print(markdown)
    return all(bar.passed for bar in bars)


def write_atomic(path: Path, text: str) -> None:
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=".bench-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
