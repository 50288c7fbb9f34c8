"""What an audit found: a table in a terminal, JSON, a page of HTML, a view in Jupyter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables
from .results import Result
from .tables import Table

if TYPE_CHECKING:
    from rich.console import RenderableType

# What each check is called where people read it.
TITLES = {
    "unusable": "unusable records",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "leakage": "held-out leakage",
    "untrained": "no trained token",
    "too_long": "too long",
    "lengths": "outlying lengths",
    "encoding": "broken encoding",
    "languages": "mixed languages",
    "secrets": "secrets, personal data",
    "label_balance": "label balance",
    "rare_labels": "rare labels",
    "unlabelled": "without a label",
    "label_variants": "label variants",
    "conflicting_labels": "conflicting labels",
    "doubted_labels": "doubted labels",
}

SEVERITIES = ("ok", "note", "warning", "stop")
_MARKS = {"ok": "✓", "note": "i", "warning": "!", "stop": "✗"}
_STYLES = {"ok": "green", "note": "blue", "warning": "yellow", "stop": "bold red"}
_SHOWN = 2  # examples of a finding in a terminal


@dataclass(frozen=True, slots=True)
class AuditExample:
    """A record that a finding is about: its number in the file, from 1, and its beginning."""

    file: str
    record: int
    text: str
    note: str

    @property
    def place(self) -> str:
        return f"{Path(self.file).name}:{self.record}" if self.record else Path(self.file).name


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: `count` records of `of`, how bad it is, and what to do.

    `severity` is "ok", "note", "warning", or "stop" where training would be meaningless.
    """

    check: str
    severity: str
    count: int
    of: int
    message: str
    examples: tuple[AuditExample, ...]
    details: Mapping[str, Any]

    @property
    def title(self) -> str:
        return TITLES.get(self.check, self.check.replace("_", " "))

    @classmethod
    def from_native(cls, found: Mapping[str, Any]) -> "Finding":
        examples = tuple(AuditExample(**example) for example in found["examples"])
        return cls(**{**found, "examples": examples})


@dataclass(frozen=True, slots=True)
class AuditResult(Result):
    """What is wrong with data, check by check.

    `lengths` are in characters, `tokens` counts tokens where a model was given (None otherwise),
    `labels` and `languages` are pairs of a name and its records, `seconds` is what took long.
    """

    records: int
    heldout_records: int
    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    lengths: Mapping[str, Any]
    tokens: Mapping[str, int] | None
    labels: tuple[tuple[str, int], ...]
    languages: tuple[tuple[str, int], ...]
    seconds: Mapping[str, float]

    @classmethod
    def from_native(cls, found: Mapping[str, Any]) -> "AuditResult":
        """From the JSON object that the native side returns."""

        def counts(name: str) -> tuple[tuple[str, int], ...]:
            return tuple((one["name"], one["records"]) for one in found[name])

        return cls(
            records=found["records"],
            heldout_records=found["heldout_records"],
            files=tuple(found["files"]),
            findings=tuple(Finding.from_native(one) for one in found["findings"]),
            lengths=found["lengths"],
            tokens=found["tokens"],
            labels=counts("labels"),
            languages=counts("languages"),
            seconds=dict(found["seconds"]),
        )

    @property
    def severity(self) -> str:
        """The worst of the findings'."""
        return max((one.severity for one in self.findings), key=SEVERITIES.index, default="ok")

    @property
    def exit_code(self) -> int:
        """Of the command: 1 where training would be meaningless."""
        return int(self.severity == "stop")

    def finding(self, check: str) -> Finding:
        """The finding of this name. Raises KeyError."""
        for one in self.findings:
            if one.check == check:
                return one
        raise KeyError(check)

    def title(self) -> str:
        records = tables.count(self.records)
        held = f", {tables.count(self.heldout_records)} of them held out"
        files = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        return f"audit of {records} records{held * bool(self.heldout_records)} in {files}"

    def table(self) -> Table:
        rows = []
        for one in self.findings:
            rows.append((f"{_MARKS[one.severity]} {one.title}", f"{_count(one)}{one.message}"))
            if one.severity != "ok":
                rows += [("", _example(example)) for example in one.examples[:_SHOWN]]
        return Table(self.title(), tuple(rows))

    def __rich__(self) -> "RenderableType":
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title(), style="bold"),
            title_justify="left",
            box=None,
            show_header=False,
            padding=(0, 2, 0, 0),
        )
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for one in self.findings:
            style = _STYLES[one.severity]
            name = Text(f"{_MARKS[one.severity]} {one.title}", style=style)
            table.add_row(name, Text(tables.count(one.count) if one.count else ""), one.message)
            if one.severity != "ok":
                for example in one.examples[:_SHOWN]:
                    table.add_row("", "", Text(_example(example), style="dim"))
        return table

    def html(self) -> str:
        """A page of its own: no scripts, no files beside it."""
        from .audit_page import page

        return page(self)

    def save_html(self, path: Path) -> None:
        """Writes the page, aside and renamed. Raises OSError."""
        from .files import write_atomic

        write_atomic(path, self.html())

    def _repr_html_(self) -> str:
        from .audit_page import body

        return body(self)


def _count(finding: Finding) -> str:
    return f"{tables.count(finding.count)}: " if finding.count else ""


def _example(example: AuditExample) -> str:
    note = f" ({example.note})" if example.note and example.text else example.note
    return f"{example.place}  {example.text}{note}"
