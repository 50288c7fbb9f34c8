"""What stands between linear layers on a CUDA device, and whole blocks, beside floors and Liger.

``python benches/cuda_blocks.py --peers FOLDER`` writes results/cuda_blocks.{md,json} and exits with
1 if a bar is missed. Kernels are measured in bf16 against a device copy's bytes a second, the MLP
against its bare matrix products, q/k/v against the frozen bf16 layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import cuda_common as cuda
import torch
from torch import Tensor

import common
from ferrotune import ops
from ferrotune.ops import cuda as kernels

BF16 = torch.bfloat16
SETS = 2  # of inputs, taken in turn
Shape = tuple[int, ...]
Operation = Callable[..., Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--peers", help="a folder to put first on the path")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.peers:
        sys.path.insert(0, options.peers)
    kernels.prepare("cuda")
    record: dict[str, Any] = {"results": {}, "machine": cuda.machine(["torch", "liger_kernel"])}
    rate = cuda.copy_bandwidth(1 << 28) / 1e12
    bars: list[common.Bar] = []
    where = record["machine"]
    intro = (
        f"{where['device']}, driver for {where['driver']}; {options.tokens} tokens. A device copy "
        f"moves {rate:.2f} TB/s (bytes read and written).\n"
    )
    text = [intro]
    text.append(alone(options, rate, record["results"], bars))
    text.append(whole(options, record["results"], bars))
    body = "\n".join(text)
    print(body)
    title = "Between and around linear layers on CUDA"
    return 0 if common.write("cuda_blocks", title, record, body, bars) else 1


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(BF16)


def liger() -> dict[str, Operation]:
    """Liger's functions by the names of ours; none where it cannot be imported."""
    try:
        from liger_kernel.ops.rms_norm import (  # type: ignore[import-not-found]
            LigerRMSNormFunction,
        )
        from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]
    except ImportError as error:
        print(f"without Liger: {error}", file=sys.stderr)
        return {}

    def norm(x: Tensor, w: Tensor) -> Any:
        return LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False)

    return {
        "RMSNorm": norm,
        "RMSNorm, frozen": norm,
        "SwiGLU": LigerSiLUMulFunction.apply,
        "RoPE": lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos, sin),
    }


def alone(
    options: argparse.Namespace, rate: float, results: dict[str, Any], bars: list[common.Bar]
) -> str:
    """Each operation, forward and forward + backward: microseconds and share of a copy's rate."""
    m, theirs = options.tokens, liger()
    angles = torch.randn(1, 2048, 64, device="cuda").repeat(1, 1, 2)
    tables = (angles.cos().to(BF16), angles.sin().to(BF16))
    heads = (m // 2048, 2048)
    # Inputs that get gradients, those that do not, and bytes: forward, backward.
    cases: dict[str, tuple[Operation, list[Shape], list[Tensor], int, int]] = {
        "RMSNorm": (lambda x, w: ops.rms_norm(x, w, 1e-5), [(m, 4096), (4096,)], [],
                    4 * m * 4096, 6 * m * 4096),
        "RMSNorm, frozen": (lambda x, w: ops.rms_norm(x, w, 1e-5), [(m, 4096)], [draw(4096)],
                            4 * m * 4096, 6 * m * 4096),
        "SwiGLU": (ops.glu, [(m, 14336), (m, 14336)], [], 6 * m * 14336, 10 * m * 14336),
        "RoPE": (ops.rope, [(*heads, 32, 128), (*heads, 8, 128)], list(tables),
                 4 * m * 40 * 128, 4 * m * 40 * 128),
    }  # fmt: skip
    rows: list[list[object]] = []
    for name, (ours, shapes, fixed, forward, backward) in cases.items():
        sets = [[draw(*shape) for shape in shapes] for _ in range(SETS)]
        contenders = {"ferrotune": ours} | ({"Liger": theirs[name]} if name in theirs else {})
        works: dict[str, cuda.Work] = {}
        for label, function in contenders.items():
            works[f"{label} forward"] = timed(function, sets, fixed, name == "RoPE", False)
            works[f"{label} both"] = timed(function, sets, fixed, name == "RoPE", True)
        times = cuda.graph_times(works, pairs=8, rounds=options.rounds)
        results[name] = {label: {"microseconds": timing} for label, timing in times.items()}
        for part, size in (("forward", forward), ("both", forward + backward)):
            mine = times[f"ferrotune {part}"]
            share = size / mine.median / 1e6 / rate
            other = times.get(f"Liger {part}")
            rows.append([name, "forward" if part == "forward" else "forward + backward", mine,
                         f"{size / rate / 1e6:.1f}", f"{share:.0%}", other or ""])  # fmt: skip
            bars.append(common.Bar(f"{name}, {part}: of a copy's rate", share, 0.8))
            if other is not None:
                ratio = mine.median / other.median
                bars.append(common.Bar(f"{name}, {part}: of Liger's time", ratio, 1.0, False))
    header = ["operation", "direction", "ferrotune µs", "floor µs", "of a copy", "Liger µs"]
    return "## Alone\n\n" + common.table(header, rows)


def timed(
    function: Operation, sets: list[list[Tensor]], fixed: list[Tensor], turned: bool, both: bool
) -> cuda.Work:
    """The call on a set, its outputs' gradients drawn before; ``turned`` heads come first."""

    def call(leaves: list[Tensor]) -> list[Tensor]:
        given = [leaf.transpose(1, 2) for leaf in leaves] if turned else leaves
        found = function(*given, *fixed)
        return [found] if isinstance(found, Tensor) else list(found)

    grads = [torch.randn_like(output) for output in call(sets[0])]

    def work(i: int) -> object:
        leaves = [leaf.detach().requires_grad_() for leaf in sets[i % len(sets)]]
        if both:
            return torch.autograd.grad(call(leaves), leaves, grads)
        with torch.no_grad():
            return call(leaves)

    return work


def projection(n: int, k: int) -> ops.Projection:
    """QLoRA, r = 16, bf16 adapters."""
    quant = ops.quantize_4bit(draw(n, k, scale=k**-0.5))
    lora_A, lora_B = draw(16, k, scale=k**-0.5), draw(n, 16, scale=0.05)
    return ops.Projection(quant=quant, lora_A=lora_A, lora_B=lora_B)


def whole(options: argparse.Namespace, results: dict[str, Any], bars: list[common.Bar]) -> str:
    """The MLP and q/k/v of Llama-3-8B by QLoRA, forward + backward, over products alone."""
    rows: list[list[object]] = []
    kinds: dict[str, tuple[list[int], bool, str, float]] = {
        "MLP": ([14336, 14336, 4096], True, "its bare products", 1.15),
        "QKV": ([4096, 1024, 1024], False, "the frozen layers", 1.2),
    }
    for tokens in (options.tokens, 2048):
        for kind, (sizes, chained, over, limit) in kinds.items():
            inputs = [4096, 4096, 14336 if chained else 4096]
            layers = [projection(n, k) for n, k in zip(sizes, inputs, strict=True)]
            times = block(tokens, layers, chained, options)
            label = f"{kind}, {tokens} tokens"
            results[label] = {name: {"microseconds": one} for name, one in times.items()}
            ratio = times["ferrotune"].median / times["products"].median
            rows.append([label, times["ferrotune"], times["products"], f"{ratio:.2f}"])
            if tokens == options.tokens:
                bars.append(common.Bar(f"{kind} over {over}", ratio, limit, at_least=False))
    header = ["block, QLoRA r = 16, forward + backward", "ferrotune µs", "products µs", "over them"]
    return "## Whole\n\n" + common.table(header, rows)


def block(
    tokens: int, layers: list[ops.Projection], chained: bool, options: argparse.Namespace
) -> dict[str, cuda.DeviceTiming]:
    """An MLP, ``chained``, or a group, beside bf16 products of its sizes, dX summed in them."""

    def run(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and the leaves that they are of, new ones: a graph takes no others."""
        leaves = [x.detach().requires_grad_()]
        new = []
        for one in layers:
            assert one.lora_A is not None
            assert one.lora_B is not None
            leaves += [tensor.detach().requires_grad_() for tensor in (one.lora_A, one.lora_B)]
            new.append(one._replace(lora_A=leaves[-2], lora_B=leaves[-1]))
        if not chained:
            return ops.lora_linear_group(leaves[0], new), leaves
        gate, up, down = new
        return [ops.gated_mlp(leaves[0], gate, up, down)], leaves

    xs = [draw(tokens, 4096) for _ in range(SETS)]
    weights = [draw(*one.shape, scale=0.02) for one in layers]
    grads = [torch.randn_like(y) for y in run(xs[0])[0]]

    def ours(i: int) -> object:
        outputs, leaves = run(xs[i % SETS])
        return torch.autograd.grad(outputs, leaves, grads)

    hidden = draw(tokens, 14336) if chained else None

    def products(i: int) -> object:
        x = xs[i % SETS]
        if hidden is not None:
            gate, up, down = weights
            kept = [x @ gate.t(), x @ up.t(), hidden @ down.t()]
            back = grads[0] @ down
            return kept, (back @ gate).addmm_(back, up)
        kept = [x @ weight.t() for weight in weights]
        dx = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            dx.addmm_(grad, weight)
        return kept, dx

    return cuda.graph_times(
        {"ferrotune": ours, "products": products}, pairs=4, rounds=options.rounds
    )


if __name__ == "__main__":
    sys.exit(main())
