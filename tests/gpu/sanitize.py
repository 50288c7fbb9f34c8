"""Runs the operations' kernels under compute-sanitizer; prints a verdict a tool.

``python tests/gpu/sanitize.py`` exits with 1 if memcheck, racecheck, initcheck or synccheck reports
anything of a kernel of ferrotune's. It needs a CUDA device, compute-sanitizer and cuobjdump; what
the tools printed goes to the folder of ``--output``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DONE = "every operation ran"
# Out of bounds of an allocation is out of it only where allocations are not parts of larger ones,
# and stays so where the next one does not follow at once.
TOOLS: dict[str, list[str]] = {
    "memcheck": ["--padding=256"],
    "racecheck": [],
    "synccheck": [],
    # Other kernels' writes count too, so all are watched; their reads are not ferrotune's.
    "initcheck": ["--print-limit=0"],
}
COMMON = ["--report-api-errors=no", "--check-exit-code=no"]
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def resources() -> Any:
    """kernels/resources.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("resources", ROOT / "kernels/resources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module
    spec.loader.exec_module(module)
    return module


def kernel_names() -> list[str]:
    """Of all kernels that are embedded in the extension."""
    module = resources()
    program = module.cuobjdump()
    if program is None:
        raise SystemExit("no cuobjdump: pip install triton")
    return sorted({usage.kernel for usage in module.inspect(program)})


def lora_cases() -> Iterator[dict[str, Any]]:
    """Every two settings meet, as in the tests, on sizes of a few tiles at most."""
    import torch

    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from covering import pairwise

    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    types = [(f32, f32), (f16, f16), (f16, f32), (bf16, bf16), (bf16, f32)]
    settings: dict[str, Sequence[Any]] = {
        "size": [((3, 5), 7), ((33, 129), 65), ((2, 72, 256), 384), ((0, 16), 8)],
        "r": (3, 16, 32, 48, 64, 130),
        "weight": ("dense", "nf4 nested", "fp4, blocks of 256", "none"),
        "dropout_p": (0.0, 0.1),
        "bias": (False, True),
        "types": types,
    }
    for row in pairwise(settings):
        dtype, adapter = row.pop("types")
        yield row | {"dtype": dtype, "adapter_dtype": adapter, "lora_bias": row["bias"]}


def work() -> None:
    """Every operation once: quantisation, masks, linears, groups, losses, what is between them."""
    import torch

    from ferrotune.ops import cuda, cuda_lora

    device = torch.device("cuda")
    seed = torch.tensor([5], device=device)
    floats = (torch.float32, torch.float16, torch.bfloat16)
    for shape in [(5, 129), (48, 80), (64, 256)]:
        for dtype in floats:
            values = torch.randn(shape, device=device).to(dtype)
            cuda.dropout_mask(*shape, 0.3, seed, 1, dtype)
            for quant_type in ("nf4", "fp4"):
                for blocksize in (32, 64, 4096):
                    for double_quant in (False, True):
                        quant = cuda.quantize_4bit(values, blocksize, quant_type, double_quant)
                        for transpose in (False, True):
                            cuda.dequantize_4bit(quant, dtype, transpose)
    cases = list(lora_cases())
    import lora_cases as tools
    from test_lora_cuda import build
    from test_lora_groups_cuda import GROUPS, gathered, group, members

    for cuda_lora.hopper in ("never", "always"):  # kernels that the chip alone has, and the others
        for i, settings in enumerate(cases):
            tools.run(build(**settings, seed=i).to(device), tools.ours)
        mlps(device)
    cuda_lora.hopper = "auto"
    few_rows(device)
    for dtype in floats:
        between(dtype, device)
    for i, name in enumerate(GROUPS):
        settings = {"group": name, "shape": (2, 40, 72), "dropout_p": "some", "bias": i % 2 == 0}
        for dtype in floats:
            made = [case.to(device) for case in members(settings, dtype=dtype)]
            gathered(made, [True] * len(made), group)
    with torch.no_grad():
        tools.ours(tools.make((3, 40), 24).to(device), torch.randn(3, 40, device=device))
    import loss_cases as losses

    for dtype in floats:  # rows within shared memory, and beyond it
        for shape, classes in (((5,), 37), ((2, 3), 1001), ((3,), 130_001)):
            for softcap in (None, 5.0):
                settings = {"softcap": softcap, "label_smoothing": 0.1, "dtype": dtype}
                losses.run(losses.make(shape, classes, device="cuda", **settings), losses.ours)
    torch.cuda.synchronize()
    print(DONE, flush=True)


def mlps(device: Any) -> None:
    """Gate, up and what follows, by one product where that is used, and their gradients."""
    import torch

    import mlp_cases as tools
    from ferrotune import ops

    for i, dtype in enumerate((torch.float16, torch.bfloat16)):
        for adapter in (dtype, torch.float32):
            options = {"quant": True, "adapter": adapter, "r": 17}
            x, layers = tools.mlp((130, 72), 264, 48, dtype, device, options)
            y = ops.gated_mlp(x, *layers, ("silu", "gelu_tanh")[i])
            torch.autograd.grad(y.sum(), tools.leaves(x, layers))


def few_rows(device: Any) -> None:
    """Every variant of the kernel of few rows, with depths of one block and of several."""
    import torch

    import lora_cases as tools

    for i, (m, n, k, r) in enumerate(
        ((3, 65, 96, 16), (16, 7, 2080, 3), (31, 300, 544, 40), (64, 72, 4096, 64))
    ):
        for dtype in (torch.float16, torch.bfloat16):
            for nested in (False, True):
                adapter = torch.float32 if (i + nested) % 2 else dtype
                settings = {"dtype": dtype, "adapter_dtype": adapter, "double_quant": nested}
                case = tools.make(
                    (m, k), n, r, quant_type=("nf4", "fp4")[i % 2], bias=True, **settings
                )
                tools.run(case.to(device), tools.ours)


def between(dtype: Any, device: Any) -> None:
    """Norms, gated activations and rotary positions: in rows that fit vectors and that do not, and
    in more of them than blocks that stay, by what such a block keeps."""
    import torch

    from ferrotune import ops

    for rows, columns in ((3, 64), (5, 130), (2, 9000), (300, 1032), (290, 2056), (280, 4104)):
        x, other = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(columns, device=device).to(dtype).requires_grad_()
        x.requires_grad_()
        normed, total = ops.rms_norm(x, weight, residual=other)
        y = ops.rms_norm(total, weight) + normed
        for activation in ops.ACTIVATIONS:
            y = ops.glu(y, other, activation)
        half = ops.glu(y, None, "silu")
        torch.autograd.grad(half.sum() + y.sum(), (x, weight))
        torch.autograd.grad(ops.rms_norm(x, weight.detach()).sum(), x)
        heads = x.detach()[:, : columns // 4 * 4].reshape(1, rows, 2, -1).transpose(1, 2)
        angles = torch.randn(1, rows, heads.shape[-1] // 4 * 2, device=device).to(dtype)
        q = heads.requires_grad_()
        turned = ops.rope(q, q, angles.cos(), angles.sin())
        torch.autograd.grad(turned[0].sum() + turned[1].sum(), q)


def coverage(names: Sequence[str]) -> None:
    """Says which kernels the work ran; some are for other chips and run on none of one device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
    ran = {event.key for event in found.key_averages()}
    left = [name for name in names if name not in ran]
    print(f"{len(names) - len(left)} of {len(names)} kernels ran on {torch.cuda.get_device_name()}")
    if left:
        print(f"did not run here: {', '.join(left)}")


def reports(text: str) -> list[str]:
    """The blocks that a tool printed, but for its banners and summaries."""
    blocks = re.split(r"^=========\s*$", text, flags=re.MULTILINE)
    found = []
    for block in blocks:
        lines = [line for line in block.splitlines() if line.startswith("=========")]
        lines = [line for line in lines if "COMPUTE-SANITIZER" not in line]
        if lines and not any("SUMMARY" in line for line in lines[:1]):
            found.append("\n".join(lines))
    return found


def check(tool: str, names: Sequence[str], program: str, folder: Path) -> bool:
    """Runs the work under one tool, prints its verdict, and says whether it is clean."""
    command = [program, f"--tool={tool}", *COMMON, *TOOLS[tool]]
    if tool != "initcheck":
        command.append(f"--kernel-name=regex=^({'|'.join(names)})$")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [*command, sys.executable, __file__, "--work"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    took = time.perf_counter() - start
    text = done.stdout + done.stderr
    (folder / f"{tool}.log").write_text(text, encoding="utf-8")
    return verdict(tool, text, names, took)


def verdict(tool: str, text: str, names: Sequence[str], took: float) -> bool:
    summaries = [int(match[1] or match[2]) for match in SUMMARY.finditer(text)]
    whole = re.compile(rf"\b(?:{'|'.join(names)})\b")
    blocks = reports(text)
    ours = [block for block in blocks if whole.search(block)]
    # A filtered tool saw ferrotune's kernels alone: whatever it counts is theirs.
    counted = max(summaries, default=0) if tool != "initcheck" else 0
    if DONE not in text or not summaries:
        print(f"{tool}: FAILED to run ({took:.0f} s)\n{text[-3000:]}")
        return False
    if ours or counted:
        print(f"{tool}: {max(len(ours), counted)} reports ({took:.0f} s)")
        print("\n\n".join((ours or blocks)[:5]))
        return False
    others = f", {len(blocks)} of other libraries' kernels" if blocks else ""
    print(f"{tool}: clean{others} ({took:.0f} s)")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--output", type=Path, help="folder for the tools' whole output")
    parser.add_argument("--work", action="store_true", help="only the operations, without a tool")
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        print("no compute-sanitizer on the path: it is part of the CUDA toolkit", file=sys.stderr)
        return 1
    names = kernel_names()
    coverage(names)
    with tempfile.TemporaryDirectory() as aside:
        folder = options.output or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        clean = [check(tool, names, program, folder) for tool in options.tools]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
