"""One small table of names and values, shown as text, in a terminal, in HTML and in Markdown."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of (name, value) under a title."""

    title: str
    rows: tuple[tuple[str, str], ...]

    def text(self) -> str:
        width = max((len(name) for name, _ in self.rows), default=0)
        return "\n".join(
            [self.title, *(f"  {name:<{width}}  {value}" for name, value in self.rows)]
        )

    def rich(self) -> "RichTable":
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, style="bold"),
            title_justify="left",
            box=None,
            show_header=False,
            padding=(0, 2, 0, 0),
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(Text(name), Text(value))
        return table

    def html(self) -> str:
        left = "text-align:left;padding:2px 12px 2px 0"
        rows = "".join(
            f'<tr><th style="{left};font-weight:normal;opacity:.7">{html.escape(name)}</th>'
            f'<td style="{left}">{html.escape(value)}</td></tr>'
            for name, value in self.rows
        )
        return (
            f'<div style="font-weight:600">{html.escape(self.title)}</div>'
            f'<table style="margin:4px 0">{rows}</table>'
        )

    def markdown(self) -> str:
        rows = (f"| {_cell(name)} | {_cell(value)} |" for name, value in self.rows)
        return "\n".join(["| | |", "| --- | --- |", *rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def count(number: int) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,}"


def compact(number: float) -> str:
    """Three digits and a suffix: 950, 12.4k, 1.07M, 8.03B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            value = number / size
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f}{suffix}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes in decimal units."""
    if number < 1000:
        return f"{number:.0f} B"
    return compact(number).replace("k", " k").replace("M", " M").replace("B", " G") + "B"


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 1 min 05 s or 2 h 03 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float | None) -> str:
    """Seconds as 1:05 or 2:03:09; unknown as -:--."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def engine_text(model: Mapping[str, Any]) -> str:
    """A run's engine, its device and why, by what is said of the model; "" where nothing is."""
    engine = model.get("engine")
    if not engine:
        return ""
    text = str(engine["name"])
    if "device" in engine:
        text += f" on {engine['device']} in {engine['dtype']}"
        if engine.get("processes", 1) > 1:
            text += f", {engine['processes']} processes"
    text += f" ({engine['why']})" if engine.get("why") else ""
    return "; ".join(part for part in (text, engine.get("layers")) if part)


def perplexity(loss: float | None) -> float | None:
    """exp of a mean loss in nats per token; None stays None, past a float's range is infinite."""
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf


def loss_text(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.3f}"


def perplexity_text(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"
