"""Where a training step's time on the device goes, kernel by kernel, beside floors.

Kernels that start before the one before them ends overlap, and their durations count time twice.
Here the device's time line is divided: a kernel has what lies between the end of all before it, or
its own start, and its own end; what lies before its start is idle. Copies to and from the host run
beside kernels: theirs is what they take, and no part of the time line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

COPIES = "copies to and from the host, beside"
FAMILIES = {
    "products of ours, with their LoRA terms": r"^gemm_n",
    "cuBLAS's products": r"nvjet|cublas|cutlass|gemm",
    "attention": r"cudnn|flash|fmha|fwd_kernel",
    "dequantisation": r"^dequantize",
    "LoRA's passes": r"^lora_(down|outer|up)",
    "LoRA's sums and panels": r"^lora_(reduce|pack)",
    "SwiGLU": r"^glu",
    "RMSNorm": r"^rms_norm",
    "rotary positions": r"^rope",
    "cross-entropy": r"^(cross_entropy|scale_gradient)",
    COPIES: r"HtoD|DtoH",
    "PyTorch's own: casts, sums, AdamW": r"",
}


class Share(NamedTuple):
    milliseconds: float
    kernels: int


class Kernel(NamedTuple):
    start: float
    end: float
    name: str


def recorded(step: Callable[[], object]) -> list[Kernel]:
    """The kernels and copies of one step, after another one, in nanoseconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    events: Any = found.profiler.kineto_results.events()
    on_device = [event for event in events if str(event.device_type()).endswith("CUDA")]
    return [
        Kernel(event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in on_device
    ]


def shares(kernels: Sequence[Kernel]) -> dict[str, Share]:
    """The time line by family, and "idle"."""
    found = dict.fromkeys([*FAMILIES, "idle"], Share(0.0, 0))

    def add(family: str, nanoseconds: float, count: int) -> None:
        before = found[family]
        found[family] = Share(before.milliseconds + nanoseconds / 1e6, before.kernels + count)

    end = min(kernel.start for kernel in kernels)
    for kernel in sorted(kernels, key=lambda kernel: kernel.end):
        family = next(name for name, like in FAMILIES.items() if re.search(like, kernel.name))
        if family == COPIES:
            add(family, kernel.end - kernel.start, 1)
            continue
        add("idle", max(0.0, kernel.start - end), 0)
        add(family, max(0.0, kernel.end - max(kernel.start, end)), 1)
        end = max(end, kernel.end)
    return found


def floors(sizes: dict[str, int], layers: int, tokens: int, length: int) -> dict[str, float]:
    """Operations of products and attention, negative, and bytes of the rest, in a QLoRA step that
    recomputes nothing and drops nothing; each tensor read or written once."""
    h, inner = sizes["hidden_size"], sizes["intermediate_size"]
    heads, vocabulary = sizes["num_attention_heads"], sizes["vocab_size"]
    head = sizes.get("head_dim", h // heads)
    kv = head * sizes["num_key_value_heads"]
    weights = 2 * h * heads * head + 2 * h * kv + 3 * h * inner
    xs, ys = 3 * h + inner, heads * head + 2 * kv + 2 * h + 2 * inner
    token = 2 * tokens  # bytes of an element of each
    return {
        "products": -4.0 * tokens * (layers * weights + h * vocabulary),
        "attention": -7.0 * layers * tokens * length * heads * head,  # causal, 5 products backward
        "dequantisation": layers * 2 * 2.5 * weights,
        "LoRA's passes": layers * token * (2 * xs + ys),
        "SwiGLU": layers * token * 9 * inner,
        "RMSNorm": layers * token * 14 * h,
        "rotary positions": layers * token * 4 * (heads * head + kv),
        "cross-entropy": token * 2 * vocabulary,
    }


def rates() -> tuple[float, float]:
    """Operations and bytes a millisecond that the device sustains: cuBLAS, and a copy."""
    import cuda_common as cuda
    import torch

    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x, w = torch.randn(8192, 4096, **kind), torch.randn(14336, 4096, **kind)
    times = []
    for _ in range(5):
        start, end = cuda.event(), cuda.event()
        start.record()
        for _ in range(40):
            torch.nn.functional.linear(x, w)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 40)
    return 2 * 8192 * 4096 * 14336 / sorted(times)[2], cuda.copy_bandwidth(256 << 20) / 1e3
