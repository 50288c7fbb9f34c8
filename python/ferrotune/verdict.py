"""Whether a run learned its training text by heart: in words, with the numbers it rests on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .history import Evaluation, History, Step
from .tables import count

# The part of what training had won that the held-out loss must give back before a rise means
# something: evaluations of a run that stands still scatter by less.
GIVEN_BACK = 0.1
# Training losses of this part of the steps (at least of five) are averaged: single batches scatter.
WINDOW = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """`kind` is "overfitted", "healthy", "did not learn" or "unknown"; `text` says why."""

    kind: Literal["overfitted", "healthy", "did not learn", "unknown"]
    text: str


def judge(history: History) -> Verdict:
    """Overfitted: after its best evaluation the held-out loss rose while the training loss fell.

    The rise counts from a tenth of what training had won until then; where it had won nothing,
    from a tenth of what the training loss fell by.
    """
    best, base = history.best, history.base_loss
    later = [one for one in history.evaluations if one.step > 0 and math.isfinite(one.loss)]
    if best is None or base is None or not math.isfinite(base) or len(later) < 2:
        return Verdict("unknown", "Too few evaluations to tell whether the run overfitted.")
    last = later[-1]
    at_best, at_end = _train_loss(history.steps, best.step), _train_loss(history.steps, last.step)
    won, rise, fall = base - best.loss, last.loss - best.loss, at_best - at_end
    if fall > 0 and rise > GIVEN_BACK * (won if won > 0 else fall):
        return Verdict("overfitted", _overfitted(history, last, at_best, at_end))
    if best.step == 0:
        return Verdict(
            "did not learn",
            f"Did not learn: no evaluation was better than {base:.3f}, the held-out loss before "
            f"training; the last one, at step {count(last.step)}, was {last.loss:.3f}.",
        )
    end = "and was lowest at the last evaluation: more steps may help"
    if best.step != last.step:
        end = f"and ended at {last.loss:.3f}, close to it"
    return Verdict(
        "healthy",
        f"Not overfitted: the held-out loss fell from {base:.3f} to {best.loss:.3f} (step "
        f"{count(best.step)}) {end}. The training loss at the end was {at_end:.3f}.",
    )


def _overfitted(history: History, last: Evaluation, at_best: float, at_end: float) -> str:
    best, base = history.best, history.base_loss
    assert best is not None
    assert base is not None
    rise, won = last.loss - best.loss, base - best.loss
    back = f", {rise / won:.0%} of what training had won" if won > 0 else ""
    return (
        f"Overfitted from step {count(best.step)} on: until step {count(last.step)} the training "
        f"loss fell from {at_best:.3f} to {at_end:.3f} while the held-out loss rose from "
        f"{best.loss:.3f} to {last.loss:.3f} (+{rise:.3f}{back}). The weights of step "
        f"{count(best.step)} were kept."
    )


def _train_loss(steps: Sequence[Step], at: int) -> float:
    """The mean training loss of the steps around `at` that a window holds."""
    if not steps:
        return math.nan
    width = max(5, round(WINDOW * len(steps)))
    end = next((index + 1 for index, one in enumerate(steps) if one.step >= at), len(steps))
    begin = max(0, end - width)
    near = [one.loss for one in steps[begin : max(end, begin + width)] if math.isfinite(one.loss)]
    return sum(near) / len(near) if near else math.nan
