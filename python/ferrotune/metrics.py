"""What the engine measures of a model: numbers with 95 % bootstrap intervals, and their tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tables import Table, count, perplexity_text


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def from_native(cls, found: Mapping[str, float]) -> "Interval":
        return cls(found["value"], found["low"], found["high"])

    def text(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class GenerationMetrics:
    """A language model's loss in nats per token, perplexity, and bits per UTF-8 byte.

    The intervals are over the rows that were read. `bits_per_byte` is None where a part of the
    text was read, and for conversations.
    """

    loss: Interval
    perplexity: Interval
    bits_per_byte: Interval | None

    @classmethod
    def from_native(cls, found: Mapping[str, Any]) -> "GenerationMetrics":
        bits = found["bits_per_byte"]
        return cls(
            Interval.from_native(found["loss_interval"]),
            Interval.from_native(found["perplexity_interval"]),
            None if bits is None else Interval.from_native(bits),
        )

    def rows(self) -> tuple[tuple[str, str], ...]:
        low, high = self.perplexity.low, self.perplexity.high
        perplexity = (
            f"{perplexity_text(self.perplexity.value)} "
            f"({perplexity_text(low)} to {perplexity_text(high)})"
        )
        bits = "not measured" if self.bits_per_byte is None else self.bits_per_byte.text()
        return (
            ("loss", f"{self.loss.text()} nats per token"),
            ("perplexity", perplexity),
            ("bits per byte", bits),
        )


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One class, of which there are `support` texts."""

    label: str
    precision: Interval
    recall: Interval
    f1: Interval
    support: int


@dataclass(frozen=True, slots=True)
class ClassificationMetrics:
    """A classifier's quality on `examples` texts, with intervals over the texts.

    `loss` is the mean negative log-likelihood of the true class in nats, `macro_f1` the unweighted
    mean of the classes' F1, `mcc` Matthews' correlation coefficient, `calibration_error` the mean
    distance of confidence and accuracy over 15 bins of confidence. `confusion` counts texts by true
    class (row) and predicted class (column); `confusion_interval` has the low and the high end of
    each count, and is None for more than 64 classes.
    """

    examples: int
    loss: Interval
    accuracy: Interval
    macro_f1: Interval
    mcc: Interval
    calibration_error: Interval
    classes: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    confusion_interval: tuple[tuple[tuple[float, float], ...], ...] | None

    @classmethod
    def from_native(cls, found: Mapping[str, Any]) -> "ClassificationMetrics":
        measures = ("loss", "accuracy", "macro_f1", "mcc", "calibration_error")
        cells = found["confusion_interval"]
        return cls(
            examples=found["examples"],
            **{name: Interval.from_native(found[name]) for name in measures},
            classes=tuple(
                ClassMetrics(
                    label=one["label"],
                    support=one["support"],
                    **{
                        name: Interval.from_native(one[name])
                        for name in ("precision", "recall", "f1")
                    },
                )
                for one in found["classes"]
            ),
            confusion=tuple(map(tuple, found["confusion"])),
            confusion_interval=None
            if cells is None
            else tuple(tuple((low, high) for low, high in row) for row in cells),
        )

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(one.label for one in self.classes)

    def rows(self) -> tuple[tuple[str, str], ...]:
        return (
            ("accuracy", self.accuracy.text()),
            ("macro-F1", self.macro_f1.text()),
            ("MCC", self.mcc.text()),
            ("calibration error", self.calibration_error.text()),
            ("loss", f"{self.loss.text()} nats per label"),
        )

    def class_rows(self) -> tuple[tuple[str, str], ...]:
        """A row a class: F1, precision, recall and the number of texts."""
        return tuple(
            (one.label, f"F1 {one.f1.text(2)}, {_rest(one)}, {count(one.support)} texts")
            for one in self.classes
        )

    def table(self) -> Table:
        return Table("classification", (*self.rows(), *self.class_rows()))

    def markdown(self) -> str:
        """The tables of the classes and of the confusion matrix."""
        classes = grid(
            ("class", "F1", "precision", "recall", "texts"),
            [
                (one.label, one.f1.text(2), one.precision.text(2), one.recall.text(2), one.support)
                for one in self.classes
            ],
        )
        cells = self.confusion_interval
        confusion = grid(
            ("true \\ predicted", *self.labels),
            [
                (label, *(_cell(cells, row, at, n) for at, n in enumerate(counts)))
                for row, (label, counts) in enumerate(zip(self.labels, self.confusion, strict=True))
            ],
        )
        return f"{classes}\n\n{confusion}"


def _rest(one: ClassMetrics) -> str:
    return f"precision {one.precision.text(2)}, recall {one.recall.text(2)}"


def _cell(
    cells: tuple[tuple[tuple[float, float], ...], ...] | None, row: int, column: int, number: int
) -> str:
    if cells is None:
        return count(number)
    low, high = cells[row][column]
    return f"{count(number)} ({low:.0f} to {high:.0f})"


def grid(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are numbers."""

    def line(cells: Sequence[object]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    rule = f"| --- |{' ---: |' * (len(header) - 1)}"
    return "\n".join([line(header), rule, *map(line, rows)])
