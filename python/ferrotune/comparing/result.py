"""A comparison's result: its table and its report."""

from dataclasses import dataclass
from pathlib import Path

from .. import tables
from ..metrics import Interval, grid
from ..results import Result
from ..tables import Table

TUNED = "fine-tuned"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to answer. `quality` is accuracy or, of texts, the loss in nats per token.

    `macro_f1` is None for texts. `difference` is the fine-tuned model's quality minus this one's,
    paired over the records, None for the fine-tuned model itself. `seconds_per_example` leaves out
    loading and training; `bytes` is what has to be kept.
    """

    name: str
    quality: Interval
    macro_f1: Interval | None
    difference: Interval | None
    seconds_per_example: float
    bytes: int


@dataclass(frozen=True, slots=True)
class CompareResult(Result):
    """Contenders on the same `examples`; `measure` is "accuracy" or "loss".

    `left_out` says which contenders were not asked, and why; `guide` what the numbers say of
    fine-tuning against retrieval.
    """

    measure: str
    examples: int
    contenders: tuple[Contender, ...]
    left_out: dict[str, str]
    guide: str
    output: Path

    def table(self) -> Table:
        rows = [(one.name, _line(one, self.measure)) for one in self.contenders]
        rows += [(name, f"not measured: {why}") for name, why in self.left_out.items()]
        title = f"{self.measure} on {tables.count(self.examples)} examples"
        return Table(title, (*rows, ("output", str(self.output))))

    def markdown(self) -> str:
        """The report: table, plot and guide."""
        header = (
            "", self.measure, "macro-F1", f"{TUNED} minus this", "ms per example", "size"
        )  # fmt: skip
        rows = [
            (
                one.name,
                one.quality.text(),
                "" if one.macro_f1 is None else one.macro_f1.text(),
                "" if one.difference is None else _signed(one.difference),
                f"{1000 * one.seconds_per_example:.3g}",
                tables.size(one.bytes),
            )
            for one in self.contenders
        ]
        missing = "".join(
            f"\n- Not measured: {name}, for {why}." for name, why in self.left_out.items()
        )
        return (
            f"# Is fine-tuning worth it?\n\nOn {tables.count(self.examples)} test examples; in "
            "brackets the 95 % intervals of 1,000 bootstrap resamples of them, paired for the "
            f"differences.\n\n{grid(header, rows)}\n{missing}\n\n![Quality](compare.png)\n\n"
            f"## Fine-tuning or retrieval\n\n{self.guide}\n"
        )


def _line(one: Contender, measure: str) -> str:
    parts = [one.quality.text()]
    if one.difference is not None:
        parts.append(f"{TUNED} {_signed(one.difference)}")
    parts += [f"{1000 * one.seconds_per_example:.3g} ms", tables.size(one.bytes)]
    return ", ".join(parts)


def _signed(one: Interval) -> str:
    return f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
