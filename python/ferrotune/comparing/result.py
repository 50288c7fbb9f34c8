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
    fine-tuning against retrieval. `report` is the page of the run that was compared, which has the
    comparison; None where no run was named.
    """

    measure: str
    examples: int
    contenders: tuple[Contender, ...]
    left_out: dict[str, str]
    guide: str
    output: Path
    report: Path | None = None

    def table(self) -> Table:
        rows = [(one.name, _line(one, self.measure)) for one in self.contenders]
        rows += [(name, f"not measured: {why}") for name, why in self.left_out.items()]
        title = f"{self.measure} on {tables.count(self.examples)} examples"
        places = [("output", str(self.output))]
        if self.report is not None:
            places.append(("report", str(self.report)))
        return Table(title, (*rows, *places))

    def header(self) -> tuple[str, ...]:
        """Of `cells`."""
        quality = "accuracy" if self.measure == "accuracy" else "loss, nats per token"
        scores = ("macro-F1",) if self.contenders[-1].macro_f1 else ()
        return ("", quality, *scores, f"{TUNED} minus this", "ms per example", "size")

    def cells(self) -> list[tuple[str, ...]]:
        """A row of text a contender."""
        return [
            (
                one.name,
                one.quality.text(),
                *(() if one.macro_f1 is None else (one.macro_f1.text(),)),
                "" if one.difference is None else _signed(one.difference),
                f"{1000 * one.seconds_per_example:.3g}",
                tables.size(one.bytes),
            )
            for one in self.contenders
        ]

    def preface(self) -> str:
        return (
            f"On {tables.count(self.examples)} test examples; in brackets the 95 % intervals of "
            "1,000 bootstrap resamples of them, paired for the differences."
        )

    def missing(self) -> list[str]:
        return [f"Not measured: {name}, for {why}." for name, why in self.left_out.items()]

    def markdown(self) -> str:
        """The report: table, plot and guide."""
        missing = "".join(f"\n- {line}" for line in self.missing())
        return (
            f"# Is fine-tuning worth it?\n\n{self.preface()}\n\n"
            f"{grid(self.header(), self.cells())}\n{missing}\n\n![Quality](compare.png)\n\n"
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
