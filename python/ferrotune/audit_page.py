"""An audit as HTML: findings by severity, each with its examples, and the data's shape as plots."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import tables
from .pages import STYLE, document, figures

if TYPE_CHECKING:
    from .auditing import AuditResult, Finding

_NAMES = {"stop": "Stop", "warning": "Warning", "note": "Note", "ok": "Fine"}
_BARS = 20  # labels or languages that a plot shows


def page(result: "AuditResult") -> str:
    return document("ferrotune audit", body(result))


def body(result: "AuditResult") -> str:
    """The page's content, with its style, to stand in another page."""
    fine = [one for one in result.findings if one.severity == "ok"]
    names = ", ".join(html.escape(name) for name in result.files[:5])
    more = f" and {len(result.files) - 5} more" if len(result.files) > 5 else ""
    fine_list = "".join(f"<li>{html.escape(one.message)}</li>" for one in fine)
    return (
        f'<div class="ft-page"><style>{STYLE}</style>'
        f"<h1>{html.escape(_headline(result))}</h1>"
        f'<p class="soft">{html.escape(result.title())}: {names}{more}</p>'
        f"{_sums(result)}{cards(result.findings)}"
        f'<div class="plots">{_plots(result)}</div>'
        f'<div class="card" style="--tone:var(--ok)"><h2>Fine <span>{len(fine)} of '
        f'{len(result.findings)} checks</span></h2><ul class="fine">{fine_list}</ul></div>'
        f'<p class="soft">{html.escape(_times(result))}</p></div>'
    )


def _headline(result: "AuditResult") -> str:
    return {
        "stop": "Training on this data would be meaningless",
        "warning": "Look at this data before training",
        "note": "This data looks fit for training",
        "ok": "This data looks fit for training",
    }[result.severity]


def _times(result: "AuditResult") -> str:
    parts = [f"{name} {tables.duration(seconds)}" for name, seconds in result.seconds.items()]
    return f"Time: {', '.join(parts)}." if parts else ""


def cards(findings: "Sequence[Finding]") -> str:
    """A card for each finding that is not fine, the worst first."""
    ordered = sorted(findings, key=lambda one: list(_NAMES).index(one.severity))
    return "".join(_card(one) for one in ordered if one.severity != "ok")


def _sums(result: "AuditResult") -> str:
    sums = [(tables.count(result.records), "records")]
    if result.heldout_records:
        sums.append((tables.count(result.heldout_records), "held out"))
    if result.labels:
        sums.append((tables.count(len(result.labels)), "labels"))
    if result.tokens:
        sums.append((tables.compact(result.tokens["read"]), "tokens"))
        sums.append((tables.compact(result.tokens["trained"]), "trained tokens"))
    sums.append((tables.count(result.lengths["median"]), "characters in the median record"))
    return figures(sums)


def _card(finding: "Finding") -> str:
    count = f"{tables.count(finding.count)} of {tables.count(finding.of)}"
    rows = "".join(
        f'<tr><td class="place" title="{html.escape(one.file)}">{html.escape(one.place)}</td>'
        f'<td>{html.escape(one.text)}</td><td class="note">{html.escape(one.note)}</td></tr>'
        for one in finding.examples
    )
    examples = f"<table>{rows}</table>" if rows else ""
    return (
        f'<div class="card" style="--tone:var(--{finding.severity})">'
        f"<h2>{html.escape(finding.title.capitalize())} <span>{_NAMES[finding.severity]} · "
        f"{count}</span></h2><p>{html.escape(finding.message)}</p>{examples}{_confusions(finding)}"
        "</div>"
    )


def _confusions(finding: "Finding") -> str:
    confusions = finding.details.get("confusions", [])
    if not confusions:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(one['label'])}</td><td>{html.escape(one['predicted'])}</td>"
        f"<td>{tables.count(one['records'])}</td></tr>"
        for one in confusions
    )
    return (
        "<details><summary>labels and what is predicted instead</summary>"
        f"<table>{rows}</table></details>"
    )


def _plots(result: "AuditResult") -> str:
    plots = [_histogram(result.lengths["histogram"])]
    for title, counts in (("Labels", result.labels), ("Languages", result.languages)):
        if len(counts) > 1:
            plots.append(_bars(title, counts))
    return "".join(plots)


def _plot(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<div class="plot"><h2>{title}</h2><svg viewBox="0 0 400 {height:.0f}" role="img" '
        f'aria-label="{title}">{"".join(parts)}</svg></div>'
    )


def _histogram(bars: Sequence[Sequence[int]]) -> str:
    """Records by their length on a logarithmic axis: bars of (least length, records)."""
    height, floor = 190, 160
    most = max((records for _, records in bars), default=0) or 1
    width = 400 / max(len(bars), 1)
    parts = []
    for place, (least, records) in enumerate(bars):
        tall = (floor - 20) * records / most
        x = place * width
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="{floor - tall:.1f}" width="{max(width - 1, 1):.1f}" '
            f'height="{tall:.1f}"><title>from {least:,} characters: {records:,} records'
            "</title></rect>"
        )
        if place % max(1, len(bars) // 6) == 0 and x < 375:
            parts.append(f'<text x="{x:.1f}" y="{floor + 16}">{tables.compact(least)}</text>')
    parts.append(f'<text x="0" y="12">most: {most:,} records</text>')
    return _plot("Length of the records in characters", height, parts)


def _bars(title: str, counts: Sequence[tuple[str, int]]) -> str:
    """Records of each name, most frequent first; what is not shown is summed."""
    shown = list(counts[:_BARS])
    rest = sum(records for _, records in counts[_BARS:])
    if rest:
        shown.append((f"{len(counts) - _BARS} more", rest))
    most = max(records for _, records in shown)
    parts = []
    for place, (name, records) in enumerate(shown):
        y = place * 20 + 4
        label = name if len(name) <= 20 else f"{name[:19]}…"
        wide = 200 * records / most
        parts.append(
            f'<text x="0" y="{y + 12}">{html.escape(label)}</text>'
            f'<rect x="140" y="{y}" width="{max(wide, 1):.1f}" height="15">'
            f"<title>{html.escape(name)}: {records:,} records</title></rect>"
            f'<text x="{146 + wide:.1f}" y="{y + 12}">{records:,}</text>'
        )
    return _plot(title, len(shown) * 20 + 8, parts)
