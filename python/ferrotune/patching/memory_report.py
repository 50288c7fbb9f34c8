"""What a memory policy chose, for the report of `patch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..planning.policy import size_text

if TYPE_CHECKING:
    from ..planning.memory import Level
    from ..planning.policy import Policy


@dataclass(slots=True)
class MemoryReport:
    """What each layer keeps and recomputes; filled in at the first forward of a training step."""

    asked: str
    """The size that was given to `patch`, or "auto"."""
    batch_size: int = 0
    sequence_length: int = 0
    """Of the largest step so far: what the policy is for."""
    levels: dict[str, Level] | None = None
    """By the layers' names: see `planning.memory.LEVELS`; None before."""
    kept: dict[str, int] | None = None
    """Predicted bytes that each keeps on the device for backward."""
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
        self.kept = dict(zip(names, policy.kept, strict=True))
        self.note = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = (
            "asked",
            "batch_size",
            "sequence_length",
            "levels",
            "kept",
            "available",
            "peak",
            "note",
        )
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
        peak, available = size_text(self.policy.peak), size_text(self.available)
        text += f", {step}: {self.policy}; peak {peak} of {available}"
        host = self.policy.memory.host
        text += f", {size_text(host)} on the host" if host else ""
        return f"{text} ({self.left_out})" if self.left_out else text
