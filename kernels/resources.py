"""What the compiler made of the kernels: registers, shared memory, spills, by kernel and chip.

``python kernels/resources.py`` writes the table that is committed as benches/results/kernels.md. It
needs ferrotune built with its CUDA kernels, and cuobjdump: from triton's wheel or a CUDA toolkit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TABLE = Path(__file__).parent.parent / "benches/results/kernels.md"
_EXPLANATION = (
    "Registers a thread on each chip that machine code is embedded for; static shared memory a "
    "block (sm_100 and newer reserve 1 KiB more) and local memory a thread in bytes, the most of "
    "any chip. Local memory means spills or arrays in memory: there is none in a hot kernel. "
    "`python kernels/resources.py` writes this table."
)
_ARCH = re.compile(r"^arch = sm_(\w+)$")
_FUNCTION = re.compile(r"^ *Function (\w+):$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one kernel on one chip. ``local`` is bytes of memory a thread: arrays and spills."""

    file: str
    kernel: str
    chip: str
    registers: int
    shared: int
    local: int


def cuobjdump() -> Path | None:
    """The program, or None where there is none."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if found.is_file():
            return found
    on_path = shutil.which("cuobjdump")
    return Path(on_path) if on_path else None


def inspect(program: Path) -> list[Usage]:
    """Every kernel that is embedded in the extension, on every chip that has machine code."""
    from ferrotune import _native

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, image in sorted(_native.cuda_images().items()):
            path = Path(folder) / f"{name}.fatbin"
            path.write_bytes(image)
            done = subprocess.run(
                [program, "-res-usage", path], capture_output=True, text=True, check=True
            )
            found += _parse(name, done.stdout)
    return found


def _parse(file: str, text: str) -> list[Usage]:
    found = []
    chip = kernel = ""
    for line in text.splitlines():
        if match := _ARCH.match(line):
            chip = match[1]
        elif match := _FUNCTION.match(line):
            kernel = match[1]
        elif (match := _USAGE.search(line)) and kernel:
            registers, stack, shared, local = map(int, match.groups())
            found.append(Usage(file, kernel, chip, registers, shared, stack + local))
            kernel = ""
    return found


def instructions(program: Path, file: str, chip: str) -> dict[str, set[str]]:
    """The machine instructions of each kernel of a file on one chip, without their suffixes."""
    from ferrotune import _native

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{file}.fatbin"
        path.write_bytes(_native.cuda_images()[file])
        done = subprocess.run(
            [program, "-sass", "-arch", f"sm_{chip}", path],
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, set[str]] = {}
    kernel = ""
    for line in done.stdout.splitlines():
        if match := re.match(r"^\s*Function : (\w+)", line):
            kernel = match[1]
        elif match := re.match(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line):
            found.setdefault(kernel, set()).add(match[1])
    return found


def markdown(usages: Sequence[Usage]) -> str:
    """A row a kernel: registers a thread by chip, static shared memory, local memory."""
    chips = sorted(
        {usage.chip for usage in usages}, key=lambda chip: (int(chip.rstrip("a")), -len(chip))
    )
    kernels: dict[tuple[str, str], dict[str, Usage]] = {}
    for usage in usages:
        kernels.setdefault((usage.file, usage.kernel), {})[usage.chip] = usage
    heads = [f"sm_{chip}" for chip in chips]
    lines = [
        "# Kernels as compiled",
        "",
        _EXPLANATION,
        "",
        "| file | kernel | " + " | ".join(heads) + " | shared | local |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for (file, kernel), by_chip in sorted(kernels.items()):
        cells = [str(by_chip[chip].registers) if chip in by_chip else "" for chip in chips]
        shared = min(usage.shared for usage in by_chip.values())
        local = max(usage.local for usage in by_chip.values())
        lines.append(f"| {file} | {kernel} | {' | '.join(cells)} | {shared} | {local} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    program = cuobjdump()
    if program is None:
        print("no cuobjdump: pip install triton", file=sys.stderr)
        return 1
    usages = inspect(program)
    TABLE.write_text(markdown(usages), encoding="utf-8")
    print(f"{TABLE}: {len({usage.kernel for usage in usages})} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
