"""What a memory policy chose, for the report of `patch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..planning.memory import Level
    from ..planning.policy import Policy

_GIB = 1 << 30


@dataclass(slots=True)
class MemoryReport:
    """What each layer keeps and recomputes; filled in at the first forward of a training step."""

    asked: str
    """The size that was given to `patch`, or "auto"."""
    batch_size: int = 0
    sequence_length: int = 0
    """Of the largest step so far: what the policy is for."""
    levels: dict[str, Level] | None = None
    """By the layers' names: "keep", "elementwise", "mlp", "layer" or "offload"; None before."""
    policy: Policy | None = None
    available: int = 0
    """Bytes that the model and its step may take."""
    note: str | None = None
    """Why nothing was chosen."""
    left_out: str | None = None
    """What the step takes besides what was predicted."""

    @property
    def peak(self) -> int | None:
        """Predicted bytes on the device, at most at one time."""
        return None if self.policy is None else self.policy.peak

    def settled(self, policy: Policy, names: list[str], available: float) -> None:
        self.policy, self.available = policy, int(available)
        self.levels = dict(zip(names, policy.levels, strict=True))
        self.note = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("asked", "batch_size", "sequence_length", "levels", "available", "peak", "note")
        host = 0 if self.policy is None else self.policy.memory.host
        return {name: getattr(self, name) for name in names} | {"host": host}

    def __str__(self) -> str:
        text = f"memory {self.asked}"
        if self.note is not None:
            return f"{text}: {self.note}"
        if self.policy is None:
            when = "settled at the first forward of a training step"
            return f"{text}: {when}; torch.compile chooses by itself"
        step = f"{self.batch_size} x {self.sequence_length} tokens"
        text += f", {step}: {self.policy}; peak {gib(self.policy.peak)} of {gib(self.available)}"
        host = self.policy.memory.host
        text += f", {gib(host)} on the host" if host else ""
        return f"{text} ({self.left_out})" if self.left_out else text


def gib(number: float) -> str:
    if number < _GIB / 4:
        return f"{number / (1 << 20):.2f} MiB"
    return f"{number / _GIB:.2f} GiB"
