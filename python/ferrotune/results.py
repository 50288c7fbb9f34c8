"""What the functions return: frozen, typed, and shown as a small table wherever they are shown."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables
from .bias import Bias
from .few_shot import FewShot
from .judgement import Forgetting, TestMetrics
from .metrics import ClassificationMetrics, GenerationMetrics
from .repeats import MEASURES, Repeat, spreads
from .tables import Table
from .verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


# Methods whose runs leave a whole model.
WHOLE_MODEL = ("freeze", "full")


class TrainInterrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the checkpoint was written.

    `output` is the run's folder; `ferrotune.train(..., output=output, resume=True)` goes on.
    """

    def __init__(self, message: str, output: Path) -> None:
        super().__init__(message)
        self.output = output


class Result:
    """How every result shows itself; a result says what its table holds."""

    def __init_subclass__(cls) -> None:
        # IPython takes the nearest class's method, and a dataclass's own __repr__ is one.
        cls._repr_pretty_ = Result._repr_pretty_  # type: ignore[method-assign]

    def table(self) -> Table:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them: paths as text, numbers that are not finite as None."""
        assert dataclasses.is_dataclass(self)
        return {
            field.name: _jsonable(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    def __str__(self) -> str:
        return self.table().text()

    def __rich__(self) -> "RenderableType":
        return self.table().rich()

    def _repr_html_(self) -> str:
        return self.table().html()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows in a terminal."""
        printer.text(str(self))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, slots=True)
class TrainResult(Result):
    """A finished training run. Losses are means in nats per token, None where not measured.

    `heldout_loss_before` is the model's before the first step, `heldout_loss_best` that of the
    weights which were kept, `heldout_loss_last` that of the last evaluation. `stop_reason` is
    "finished", "early_stopping", "max_seconds" or "interrupted". `tokens` counts the training
    tokens read, `seconds` the training alone. `weights` is the folder a user takes away: a PEFT
    adapter, or a whole model for methods "full" and "freeze" (`adapter` is then None). `model` and
    `data` are what the engine reported of them. A classifier's losses are in nats per label;
    `classification_before` and `classification` are its other measures before the first step and
    with the best weights, `generation` those of a language model with its best weights. `verdict`
    says in words whether the run overfitted. `test`, `forgetting` and `bias` are None where no test
    split, no text of the model's own domain and no groups were given. `repeats` are this run and
    those under other seeds, where some were asked for.
    """

    method: str
    steps: int
    best_step: int | None
    heldout_loss_before: float | None
    heldout_loss_best: float | None
    heldout_loss_last: float | None
    train_loss_last: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    stop_reason: str
    output: Path
    weights: Path
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    generation: GenerationMetrics | None = None
    classification_before: ClassificationMetrics | None = None
    classification: ClassificationMetrics | None = None
    verdict: Verdict | None = None
    test: TestMetrics | None = None
    forgetting: Forgetting | None = None
    bias: Bias | None = None
    repeats: tuple[Repeat, ...] = ()

    @property
    def task(self) -> str:
        return "generation" if self.classification is None else "classification"

    @property
    def adapter(self) -> Path | None:
        return None if self.method in WHOLE_MODEL else self.weights

    @property
    def perplexity_before(self) -> float | None:
        return tables.perplexity(self.heldout_loss_before)

    @property
    def perplexity_best(self) -> float | None:
        return tables.perplexity(self.heldout_loss_best)

    @classmethod
    def from_native(cls, method: str, found: Mapping[str, Any], seed: int = 0) -> "TrainResult":
        """From the JSON object that the engine returns; `seed` is that of bias's bootstrap."""
        output = Path(found["output"])
        kept = found.get("adapter") or output / ("model" if method in WHOLE_MODEL else "adapter")
        same = {"steps", "best_step", "train_loss_last", "tokens", "seconds", "stop_reason"}
        same |= {"heldout_loss_before", "heldout_loss_best", "heldout_loss_last"}
        same |= {"tokens_per_second", "model", "data"}
        fields = {name: found[name] for name in same}
        generation, before, best = (
            found.get(name)
            for name in ("generation_best", "classification_before", "classification_best")
        )
        measured = ClassificationMetrics.from_native
        test, forgetting, bias = (found.get(name) for name in ("test", "forgetting", "bias"))
        new_head = found["model"].get("new_head", False)
        return cls(
            method=method,
            output=output,
            weights=Path(kept),
            generation=generation and GenerationMetrics.from_native(generation),
            classification_before=before and measured(before),
            classification=best and measured(best),
            test=test and TestMetrics.from_native(test),
            forgetting=forgetting and Forgetting.from_native(forgetting),
            bias=bias and Bias.from_native(bias, new_head, seed),
            **fields,
        )

    def table(self) -> Table:
        return Table(f"{self.method} fine-tuning", self.rows())

    def rows(self) -> tuple[tuple[str, str], ...]:
        loss = _change(tables.loss_text, self.heldout_loss_before, self.heldout_loss_best)
        if self.heldout_loss_before is not None and self.heldout_loss_best is not None:
            difference = self.heldout_loss_best - self.heldout_loss_before
            unit = "token" if self.classification is None else "label"
            loss += f" nats per {unit} ({difference:+.3f})"
        stopped = {"finished": "", "max_seconds": "time limit", "early_stopping": "early stopping"}
        reason = stopped.get(self.stop_reason, self.stop_reason)
        best = "" if self.best_step in (None, self.steps) else f"best weights from {self.best_step}"
        if self.best_step == 0 and self.steps:
            best = "none was better than before training"
        notes = ", ".join(note for note in (reason, best) if note)
        speed = f"{tables.compact(self.tokens_per_second)} tokens/s"
        return (
            ("held-out loss", loss),
            *self._measures(),
            *(self.test.rows() if self.test else ()),
            *(self.forgetting.rows() if self.forgetting else ()),
            *(self.bias.rows() if self.bias else ()),
            *self._verdict(),
            *self._spread(),
            ("trained parameters", self.parameters_text()),
            *self._engine(),
            ("steps", tables.count(self.steps) + (f" ({notes})" if notes else "")),
            ("training tokens", tables.count(self.tokens)),
            ("training time", f"{tables.duration(self.seconds)} ({speed})"),
            ("output", str(self.output)),
        )

    def _verdict(self) -> tuple[tuple[str, str], ...]:
        if self.verdict is None or self.verdict.kind == "unknown":
            return ()
        return (("verdict", self.verdict.kind),)

    def _engine(self) -> tuple[tuple[str, str], ...]:
        text = tables.engine_text(self.model)
        return (("engine", text),) if text else ()

    def _spread(self) -> tuple[tuple[str, str], ...]:
        """The measures over all seeds."""
        runs = len(self.repeats)
        return tuple(
            (f"{MEASURES[name]}, {runs} seeds", spread.text())
            for name, spread in spreads(self.repeats).items()
        )

    def _measures(self) -> tuple[tuple[str, str], ...]:
        """What the held-out part says beside the loss, before and after."""
        if self.classification is not None:
            before = self.classification_before
            earlier = [""] * 4 if before is None else [f"{v} → " for _, v in before.rows()[:4]]
            now = self.classification.rows()[:4]
            return tuple(
                (f"held-out {name}", was + value)
                for was, (name, value) in zip(earlier, now, strict=True)
            )
        perplexity = _change(tables.perplexity_text, self.perplexity_before, self.perplexity_best)
        bits = None if self.generation is None else self.generation.bits_per_byte
        rows = (("held-out perplexity", perplexity),)
        return rows if bits is None else (*rows, ("held-out bits per byte", bits.text()))

    def parameters_text(self) -> str:
        trainable, total = self.model.get("trainable"), self.model.get("parameters")
        if trainable is None:
            return "not reported"
        share = f" of {tables.count(total)} ({trainable / total:.2%})" if total else ""
        return tables.count(trainable) + share

    def figure(self) -> "Figure":
        """The run's loss curves, as a matplotlib figure."""
        from .history import History
        from .plots import curves_figure

        return curves_figure(History.read(self.output / "metrics.jsonl"), self.method)


def _change(show: Any, before: float | None, after: float | None) -> str:
    return f"{show(before)} → {show(after)}" if before is not None else str(show(after))


@dataclass(frozen=True, slots=True)
class EvaluateResult(Result):
    """A model's loss on data: `loss` in nats per token, `bits_per_byte` of the text's UTF-8.

    `bits_per_byte` is None where only a part of the text was read; `skipped` counts the records
    that could not be used. `generation` has a language model's measures with their intervals,
    `classification` a classifier's, whose `loss` is in nats per label. `few_shot` has the measures
    with demonstrations in the prompt; `loss` is then the mean over the draws, in nats per token of
    the completions or per label, and `tokens` were predicted by each draw.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    skipped: int = 0
    generation: GenerationMetrics | None = None
    classification: ClassificationMetrics | None = None
    few_shot: FewShot | None = None

    def table(self) -> Table:
        speed = f"{tables.compact(self.tokens_per_second)} tokens/s"
        time = tables.duration(self.seconds)
        if self.few_shot is not None:
            rows = [*self.few_shot.rows(), ("time", time)]
        elif self.classification is not None:
            rows = [
                *self.classification.table().rows,
                ("texts", tables.count(self.tokens)),
                ("time", time),
            ]
        else:
            rows = [
                *self._language(),
                ("tokens", tables.count(self.tokens)),
                ("time", f"{time} ({speed})"),
            ]
        if self.skipped:
            rows.insert(len(rows) - 1, ("skipped records", tables.count(self.skipped)))
        return Table("evaluation", tuple(rows))

    def _language(self) -> tuple[tuple[str, str], ...]:
        if self.generation is not None:
            return self.generation.rows()
        per_byte = "not measured" if self.bits_per_byte is None else f"{self.bits_per_byte:.3f}"
        return (
            ("loss", f"{self.loss:.4f} nats per token"),
            ("perplexity", tables.perplexity_text(self.perplexity)),
            ("bits per byte", per_byte),
        )


@dataclass(frozen=True, slots=True)
class GenerateResult(Result):
    """Generated text, without the prompt; `tokens` counts the generated ones.

    `warnings` are about the adapter.
    """

    prompt: str
    text: str
    tokens: int
    seconds: float
    tokens_per_second: float
    warnings: tuple[str, ...] = ()

    def table(self) -> Table:
        speed = f"{tables.compact(self.tokens_per_second)} tokens/s"
        rows = (
            ("prompt", self.prompt),
            ("text", self.text),
            ("time", f"{self.tokens} tokens in {tables.duration(self.seconds)} ({speed})"),
        )
        return Table("generation", rows + _warning_rows(self.warnings))


@dataclass(frozen=True, slots=True)
class MergeResult(Result):
    """A merged Hugging Face folder: its files' names, and how many modules had an adapter.

    `warnings` are about the adapter.
    """

    output: Path
    files: tuple[str, ...]
    merged_modules: int
    warnings: tuple[str, ...] = ()

    def table(self) -> Table:
        rows = (
            ("merged modules", tables.count(self.merged_modules)),
            ("files", ", ".join(self.files)),
            ("output", str(self.output)),
        )
        return Table("merge", rows + _warning_rows(self.warnings))


def _warning_rows(warnings: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(("warning", warning) for warning in warnings)


@dataclass(frozen=True, slots=True)
class SplitFile:
    """One side of a division: its file, records, different texts, and records of each label."""

    side: str
    path: Path
    records: int
    texts: int
    labels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SplitResult(Result):
    """The files of a division, and how many records could not be used."""

    files: tuple[SplitFile, ...]
    skipped: int

    def table(self) -> Table:
        total = sum(one.records for one in self.files)
        rows = [
            (
                one.side,
                f"{tables.count(one.records)} records ({one.records / total:.1%}), "
                f"{tables.count(one.texts)} different, {len(one.labels)} labels → {one.path}"
                if one.labels
                else f"{tables.count(one.records)} records ({one.records / total:.1%}), "
                f"{tables.count(one.texts)} different → {one.path}",
            )
            for one in self.files
        ]
        if self.skipped:
            rows.append(("skipped", f"{tables.count(self.skipped)} records"))
        return Table("split", tuple(rows))


@dataclass(frozen=True, slots=True)
class Sample:
    """What one prompt continues to, before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class DemoResult(Result):
    """The demo's run, samples of its text, and the seconds that everything took together.

    The run's `forgetting` is on held-out text of the base model's own domain, Python's docs.
    """

    train: TrainResult
    samples: tuple[Sample, ...]
    seconds: float

    def table(self) -> Table:
        forgetting = self.train.forgetting
        general = forgetting.rows() if forgetting is not None else ()
        rows = [row for row in self.train.rows() if row[0] != "output" and row not in general]
        if forgetting is not None:
            before, after = forgetting.before.loss.value, forgetting.after.loss.value
            change = _change(tables.loss_text, before, after)
            forgotten = f"{change} nats per token ({after - before:+.3f})"
            rows.insert(2, ("loss on Python's docs", forgotten))
        output = self.train.output
        places = (
            ("total time", tables.duration(self.seconds)),
            ("adapter (PEFT)", str(self.train.weights)),
            ("loss curves", str(output / "curves.png")),
            ("metrics", str(output / "metrics.jsonl")),
            ("settings", str(output / "config.toml")),
            ("model card", str(output / "README.md")),
            ("report", str(output / "report.html")),
        )
        return Table("ferrotune demo", (*rows, *places))

    def __str__(self) -> str:
        parts = [f"{_one_line(sample)}\n" for sample in self.samples]
        return "\n".join([*parts, self.table().text()])

    def __rich__(self) -> "RenderableType":
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        shown: list[RenderableType] = []
        for sample in self.samples:
            grid = RichTable.grid(padding=(0, 1))
            for label, text in (("before", sample.before), ("after", sample.after)):
                continued = Text.assemble((sample.prompt, "bold"), _flat(text))
                grid.add_row(Text(label, style="cyan"), continued)
            shown += [grid, Text()]
        return Group(*shown, self.table().rich())

    def _repr_html_(self) -> str:
        import html

        shown = "".join(
            f"<p><small>{label}</small><br><b>{html.escape(sample.prompt)}</b>"
            f"{html.escape(_flat(text))}</p>"
            for sample in self.samples
            for label, text in (("before", sample.before), ("after", sample.after))
        )
        return shown + self.table().html()


def _flat(text: str) -> str:
    """Generated text on one line; the dots say that it was cut off there."""
    start = " " if text[:1].isspace() else ""
    return f"{start}{' '.join(text.split())} …"


def _one_line(sample: Sample) -> str:
    return (
        f"before {sample.prompt}{_flat(sample.before)}\nafter  {sample.prompt}{_flat(sample.after)}"
    )
