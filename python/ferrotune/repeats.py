"""A run repeated under other seeds: how far its numbers are luck."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import SettingError

FOLDER = "repeats"
# What is compared over the runs, and what it is called where people read it.
MEASURES = {"loss": "held-out loss", "accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC"}


@dataclass(frozen=True, slots=True)
class Repeat:
    """One of the runs: its seed, its folder, and its measures on the held-out part by name.

    `loss` is in nats per token, of a classifier per label.
    """

    seed: int
    output: Path
    measures: Mapping[str, float]

    @classmethod
    def of_results(cls, found: Mapping[str, Any]) -> "Repeat":
        """From the content of a run's results.json."""
        result = found["result"]
        classified = result.get("classification") or {}
        measures = {name: classified[name]["value"] for name in MEASURES if name in classified}
        measures["loss"] = result["heldout_loss_best"]
        known = {name: value for name, value in measures.items() if value is not None}
        return cls(found["settings"]["seed"], Path(result["output"]), known)


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over the runs: mean, sample standard deviation, lowest and highest."""

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two values."""
        deviation = statistics.stdev(values)
        return cls(statistics.fmean(values), deviation, min(values), max(values))

    def text(self, digits: int = 3) -> str:
        return (
            f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f} "
            f"({self.low:.{digits}f} to {self.high:.{digits}f})"
        )


def spreads(runs: Sequence[Repeat]) -> dict[str, Spread]:
    """Of every measure that at least two runs have."""
    found = {}
    for name in MEASURES:
        values = [one.measures[name] for one in runs if name in one.measures]
        if len(values) > 1:
            found[name] = Spread.of(values)
    return found


def check(settings: Mapping[str, Any]) -> None:
    """Raises SettingError for a number of repeats that makes no sense."""
    if settings["repeats"] < 1:
        raise SettingError(f"repeats is {settings['repeats']}; it must be at least 1")


def settings_of(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Of run `number`, from 1 (0 is the run itself): another seed, the same split."""
    split = settings["seed"] if settings["split_seed"] is None else settings["split_seed"]
    folder = Path(settings["output"]) / FOLDER / str(number + 1)
    return {
        **settings,
        "seed": settings["seed"] + number,
        "split_seed": split,
        "repeats": 1,
        "output": str(folder),
        "resume": resumable(folder),
    }


def resumable(folder: Path) -> bool:
    """Whether a run can go on in a folder: from a checkpoint, or anew where it was killed before.

    A crash while checkpoints change places leaves the older one aside; a run that was killed leaves
    its lock. The engine finds both.
    """
    return any((folder / name).exists() for name in ("checkpoint", "checkpoint.old", ".lock"))


def finished(folder: Path) -> Repeat | None:
    """What a run that is over left there; None where none is."""
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        over = found["result"]["stop_reason"] != "interrupted"
        return Repeat.of_results(found) if over else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
