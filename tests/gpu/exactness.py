"""The criterion: no output or gradient is farther from the float64 truth than PEFT's.

Errors are relative, in the Frobenius norm, of the same rounded inputs. Where both round alike, two
errors are two samples of N roundings (of H's or G's m·r elements, or of the result's if fewer):
beyond 2 %, one case may exceed PEFT's by 6/√N, all cases of a test together by 3/√N of their sum.
What is below four epsilons of float32, or 4/N units of the type's last place (where PEFT may have
been lucky; 32/N for results of fewer than eight elements, which may cancel), counts as exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_cases import error

FLOOR = 4 * torch.finfo(torch.float32).eps
MARGIN = 1.02


class Exactness:
    """Collects what misses the criterion, for one assertion at the end."""

    def __init__(self) -> None:
        self.misses: list[str] = []
        self.count = 0
        self.sums: dict[str, list[float]] = {}

    def add(
        self,
        label: str,
        found: dict[str, Tensor],
        stock: dict[str, Tensor],
        true: dict[str, Tensor],
        roundings: int,
    ) -> None:
        """Results by name of ferrotune, PEFT and float64; ``roundings`` is m·r."""
        if set(found) != set(true):
            self.misses.append(f"{label}: has {sorted(found)}, not {sorted(true)}")
        for name, tensor in found.items():
            self.count += 1
            if tensor.shape != true[name].shape or tensor.dtype != stock[name].dtype:
                self.misses.append(f"{label}: {name} is {tensor.dtype} {list(tensor.shape)}")
            elif not tensor.isfinite().all():
                bad = int((~tensor.isfinite()).sum())
                self.misses.append(f"{label}: {name} has {bad} of {tensor.numel()} not finite")
            elif not true[name].any():
                if tensor.any():
                    self.misses.append(f"{label}: {name} is not zero")
            else:
                self._compare(f"{label}: {name}", name, tensor, stock[name], true[name], roundings)

    def _compare(
        self, label: str, name: str, found: Tensor, stock: Tensor, true: Tensor, roundings: int
    ) -> None:
        mine, theirs = error(found, true), error(stock, true)
        samples = max(1, min(found.numel(), roundings))
        limit = theirs * (MARGIN + 6 / samples**0.5)
        few = 8 if found.numel() < 8 else 1  # where terms of other signs cancel, chance decides
        lucky = 4 * few * torch.finfo(found.dtype).eps / 2 / samples
        if not mine <= max(limit, lucky, FLOOR):
            self.misses.append(f"{label} is off by {mine:.2e}, PEFT's by {theirs:.2e}")
        sums = self.sums.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        sums[0] += mine**2 * found.numel()
        sums[1] += theirs**2 * found.numel()
        sums[2] += found.numel()
        sums[3] += samples

    def check(self) -> None:
        for name, (mine, theirs, elements, samples) in self.sums.items():
            mine, theirs = ((square / elements) ** 0.5 for square in (mine, theirs))
            print(f"{name}: error over all cases {mine:.2e}, PEFT's {theirs:.2e}")
            if not mine <= max((MARGIN + 3 / samples**0.5) * theirs, FLOOR):
                self.misses.append(f"all: {name} is off by {mine:.3e}, PEFT's by {theirs:.3e}")
        shown = "\n".join(self.misses[:25])
        assert not self.misses, f"{len(self.misses)} of {self.count} results miss:\n{shown}"
