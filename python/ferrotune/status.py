"""Where a job stands, gathered from its events, and the sentences that displays share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .history import Smoothed, number
from .tables import clock, compact, count, engine_text, size

SMOOTHING = 20.0  # steps


@dataclass(slots=True)
class Status:
    """The latest numbers; NaN or None where an event has not yet brought them."""

    step: int = 0
    total_steps: int | None = None
    learning_rate: float = math.nan
    tokens_per_second: float = math.nan
    elapsed: float = 0.0  # seconds
    remaining: float | None = None  # seconds
    heldout: float = math.nan  # nats per token, latest
    best: float = math.nan
    stopped: str | None = None  # the reason, once the run has ended
    _loss: Smoothed = field(default_factory=lambda: Smoothed(SMOOTHING))

    def add(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "step":
            self.step, self.total_steps = event["step"], event.get("total_steps")
            self._loss.add(number(event.get("loss")))
            self.learning_rate = number(event.get("learning_rate"))
            self.tokens_per_second = number(event.get("tokens_per_second"))
            self.elapsed = number(event.get("elapsed_seconds"))
            self.remaining = event.get("remaining_seconds")
        elif kind == "eval":
            self.heldout = number(event.get("loss"))
            if not self.best <= self.heldout:
                self.best = self.heldout
        elif kind == "stop":
            self.stopped = event["reason"]

    @property
    def loss(self) -> float:
        """The training loss, smoothed over about twenty steps, in nats per token."""
        return self._loss.value

    @property
    def fraction(self) -> float:
        """The part that is done, by steps or by time, whichever ends first."""
        if self.stopped not in (None, "interrupted"):
            return 1.0
        by_steps = self.step / self.total_steps if self.total_steps else 0.0
        whole = self.elapsed + (self.remaining or 0.0)
        by_time = self.elapsed / whole if self.remaining is not None and whole > 0 else 0.0
        return min(1.0, max(by_steps, by_time))

    def steps_text(self) -> str:
        total = f"/{count(self.total_steps)}" if self.total_steps else ""
        return f"step {count(self.step)}{total}"

    def numbers(self) -> list[tuple[str, str]]:
        """(name, value) of what is known: loss, held-out loss, learning rate, speed."""
        known = [
            ("loss", self.loss, "{:.3f}"),
            ("held-out", self.heldout, "{:.3f}"),
            ("lr", self.learning_rate, "{:.2e}"),
        ]
        found = [(name, form.format(value)) for name, value, form in known if math.isfinite(value)]
        if math.isfinite(self.tokens_per_second):
            found.append(("speed", f"{compact(self.tokens_per_second)} tokens/s"))
        return found

    def left_text(self) -> str:
        if self.stopped is not None:
            return f"took {clock(self.elapsed)}"
        return f"{clock(self.remaining)} left"


def sentence(event: Mapping[str, Any]) -> str | None:
    """What an event that happens once, or seldom, says in one line; None where it says nothing."""
    kind = event.get("event")
    if kind == "data":
        return _data(event)
    if kind == "model":
        return _model(event)
    if kind == "eval":
        loss = number(event.get("loss"))
        best = ", best so far" if event.get("best") else ""
        place = f"held-out loss at step {count(event.get('step', 0))}"
        if "accuracy" in event:
            accuracy = number(event["accuracy"].get("value"))
            return f"{place}: {loss:.3f} nats per label, accuracy {accuracy:.3f}{best}"
        return f"{place}: {loss:.3f} nats per token{best}"
    if kind == "warning":
        return f"warning: {event['message']}"
    if kind == "stop" and event.get("reason") == "early_stopping":
        return f"stopped early: the best held-out loss was at step {event.get('best_step')}"
    return None


def _data(event: Mapping[str, Any]) -> str:
    parts = [f"{count(event.get('train_records', 0))} records to train on"]
    if event.get("train_tokens") is not None:
        parts[0] += f" ({compact(event['train_tokens'])} tokens)"
    if event.get("heldout_records"):
        tokens = event.get("heldout_tokens")
        held = f" ({compact(tokens)} tokens)" if tokens is not None else ""
        parts.append(f"{count(event['heldout_records'])} held out{held}")
    if event.get("test_records"):
        parts.append(f"{count(event['test_records'])} kept for the test")
    if event.get("truncated"):
        parts.append(f"{count(event['truncated'])} truncated")
    skipped = event.get("skipped_total") or 0
    if skipped:
        first = (event.get("skipped") or [{}])[0]
        # Record 0 is the whole file.
        place = ":".join(str(first[x]) for x in ("file", "record") if first.get(x))
        why = f", first {place}: {first['reason']}" if first else ""
        parts.append(f"{count(skipped)} skipped{why}")
    return "data: " + "; ".join(parts)


def _model(event: Mapping[str, Any]) -> str:
    parts = [str(event.get("architecture", "model"))]
    if event.get("parameters"):
        parts.append(f"{compact(event['parameters'])} parameters")
    if event.get("trainable"):
        parts.append(f"{compact(event['trainable'])} trained")
    if event.get("quantized_bytes"):
        parts.append(f"frozen linear layers in {size(event['quantized_bytes'])} of 4-bit weights")
    engine = engine_text(event)
    if engine:
        parts.append(f"engine {engine}")
    return "model: " + ", ".join(parts)
