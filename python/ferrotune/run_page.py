"""A run as one page of HTML: is it better, did it overfit, on what data, and how to repeat it."""

import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import card, tables
from .audit_page import cards
from .auditing import Finding
from .bias_plot import bias_figure
from .history import History
from .judgement import TestMetrics
from .metrics import ClassificationMetrics
from .pages import STYLE, document, figures, grid, image, pairs
from .plots import curves_png, png
from .repeats import MEASURES, spreads
from .results import TrainResult

CURVES = (1000, 500)  # pixels: the page's width

_STYLE = """
.ft-run h2{margin:26px 0 6px}.ft-run .card h2{margin:0}
.ft-run .wide{columns:2;column-gap:30px}.ft-run .wide th{width:45%}.ft-run tr{break-inside:avoid}
.ft-run img{width:100%;height:auto;border-radius:6px;display:block}
.ft-run th{text-align:left;font-weight:400;color:var(--soft);border-top:1px solid var(--line);
padding:3px 10px 3px 0;vertical-align:top;white-space:nowrap}
.ft-run .grid th,.ft-run .grid td{text-align:right;padding:3px 8px;white-space:nowrap}
.ft-run .grid th:first-child{text-align:left}
.ft-run .verdict{border-left:5px solid var(--tone);padding:8px 16px;background:var(--card);
border-radius:6px;margin:14px 0}
.ft-run code{font-size:12px;overflow-wrap:anywhere}
.ft-run .shaded td{background:color-mix(in srgb,var(--bar) var(--part),transparent)}
.ft-run .scroll{overflow-x:auto}
@media(max-width:700px){.ft-run .wide{columns:1}}
"""
_TONES = {"healthy": "ok", "overfitted": "warning", "did not learn": "stop", "unknown": "note"}

# What a comparison is put between.
_SLOT = ("<!--comparison-->", "<!--/comparison-->")

# The path, size in bytes and SHA-256 of a data file.
File = tuple[str, int, str]


def render(
    title: str,
    result: TrainResult,
    settings: Mapping[str, Any],
    history: History,
    files: Sequence[File],
    environment: Mapping[str, str],
) -> str:
    """The page of a run that is over; nothing on it is fetched from elsewhere."""
    sections = (
        f"<h1>{html.escape(title)}</h1><p class='soft'>{_subtitle(result, settings)}</p>",
        figures(_figures(result)),
        _verdict(result),
        _section("Curves", _curves(history)),
        _section("Test split, which chose nothing", _measures(result.test)),
        _section("Held-out data, which chose the weights", _measures(result)),
        _section("Forgetting", _forgetting(result)),
        _section("Bias", _bias(result)),
        _section("Under other seeds", _seeds(result)),
        _section("Was fine-tuning worth it?", _slot(_not_compared(result, settings))),
        _section("What this does not show", _list(card.limits(result, settings))),
        _section("Data", _data(result, files)),
        _section("Audit of the data", _audit(result, settings)),
        _section("Settings", f'<div class="wide">{pairs(setting_rows(settings))}</div>'),
        _section("Environment", pairs(_environment(result, environment))),
    )
    return document(
        title,
        f'<div class="ft-page ft-run"><style>{STYLE}{_STYLE}</style>{"".join(sections)}</div>',
    )


def with_comparison(page: str, section: str) -> str:
    """A run's page with `section` as its comparison, in place of the last one.

    Raises ValueError: the page has no place for it.
    """
    before, begin, rest = page.partition(_SLOT[0])
    _, end, after = rest.partition(_SLOT[1])
    if not begin or not end:
        raise ValueError("the page has no place for a comparison: another version wrote it")
    return f"{before}{_slot(section)}{after}"


def _slot(section: str) -> str:
    return f"{_SLOT[0]}{section}{_SLOT[1]}"


def _not_compared(result: TrainResult, settings: Mapping[str, Any]) -> str:
    tested = "" if settings["test_data"] else " --test-data FILE"
    command = html.escape(f"ferrotune compare --run {shlex.quote(str(result.output))}{tested}")
    return (
        "<p>No comparison was made with the base model, prompts, retrieval and TF-IDF. On texts "
        "with labels, or prompts with completions, this makes one and puts it here: "
        f"<code>{command}</code></p>"
    )


def _environment(result: TrainResult, made_on: Mapping[str, str]) -> list[tuple[str, str]]:
    engine = tables.engine_text(result.model)
    return [*([("engine", engine)] if engine else []), *made_on.items()]


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def _subtitle(result: TrainResult, settings: Mapping[str, Any]) -> str:
    tokens = tables.count(result.tokens)
    where = f"{settings['model']} → {result.weights}"
    return html.escape(
        f"{result.task} · seed {settings['seed']} · {tokens} training tokens · {where}"
    )


def _figures(result: TrainResult) -> list[tuple[str, str]]:
    before, best = result.heldout_loss_before, result.heldout_loss_best
    found = []
    if best is not None:
        was = "" if before is None else f"{before:.3f} → "
        found.append((f"{was}{best:.3f}", "held-out loss"))
    if result.classification is not None:
        found.append((f"{result.classification.accuracy.value:.1%}", "held-out accuracy"))
    elif result.perplexity_best is not None:
        found.append((tables.perplexity_text(result.perplexity_best), "held-out perplexity"))
    if result.model.get("trainable") is not None:
        found.append((tables.compact(result.model["trainable"]), "trained parameters"))
    found.append((tables.count(result.steps), "steps"))
    found.append((tables.duration(result.seconds), "of training"))
    return found


def _verdict(result: TrainResult) -> str:
    if result.verdict is None:
        return ""
    tone = _TONES[result.verdict.kind]
    text = html.escape(result.verdict.text)
    return f'<div class="verdict" style="--tone:var(--{tone})">{text}</div>'


def _curves(history: History) -> str:
    if not history.steps:
        return ""
    return image(curves_png(history, "", *CURVES), "Train and held-out loss over the steps")


def _measures(side: TrainResult | TestMetrics | None) -> str:
    """All measures with their intervals; a classifier's classes and what it takes for what."""
    if side is None:
        return ""
    found = side.classification
    if found is None:
        return pairs(() if side.generation is None else side.generation.rows())
    note = (
        f"<p class='soft'>On {tables.count(found.examples)} texts; in brackets the 95 % intervals "
        "of 1,000 bootstrap resamples of them.</p>"
    )
    return f"{note}{pairs(found.rows())}{_classes(found)}{_confusion(found)}"


def _forgetting(result: TrainResult) -> str:
    found = result.forgetting
    if found is None:
        return ""
    return f"<p>{html.escape(found.sentence())}</p>{pairs(found.rows())}"


def _bias(result: TrainResult) -> str:
    if result.bias is None:
        return ""
    parts = (
        f"<p>{html.escape(one)}</p>" if isinstance(one, str) else grid(*one)
        for one in result.bias.parts()
    )
    drawn = image(png(bias_figure(result.bias)), "How groups are treated")
    return f"{drawn}{''.join(parts)}"


def _classes(found: ClassificationMetrics) -> str:
    rows = [
        (
            one.label,
            one.f1.text(2),
            one.precision.text(2),
            one.recall.text(2),
            tables.count(one.support),
        )
        for one in found.classes
    ]
    return grid(("class", "F1", "precision", "recall", "texts"), rows)


def _confusion(found: ClassificationMetrics) -> str:
    """Texts by true class (row) and predicted class (column), shaded by their part of the row."""
    body = []
    for label, counts in zip(found.labels, found.confusion, strict=True):
        row = max(sum(counts), 1)
        cells = "".join(
            f'<td style="--part:{70 * number / row:.0f}%">{tables.count(number)}</td>'
            for number in counts
        )
        body.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
    head = "".join(f"<th>{html.escape(label)}</th>" for label in found.labels)
    return (
        '<div class="scroll"><table class="grid shaded"><tr><th>true \\ predicted</th>'
        f"{head}</tr>{''.join(body)}</table></div>"
    )


def _seeds(result: TrainResult) -> str:
    """The measures of every run, and their spread."""
    found = spreads(result.repeats)
    if not found:
        return ""
    rows = [
        (
            str(one.seed),
            *(f"{one.measures[name]:.3f}" if name in one.measures else "" for name in found),
        )
        for one in result.repeats
    ]
    rows.append(("mean ± deviation (range)", *(spread.text() for spread in found.values())))
    return grid(("seed", *(MEASURES[name] for name in found)), rows)


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(line.replace('`', ''))}</li>" for line in lines)
    return f"<ul>{items}</ul>"


def _data(result: TrainResult, files: Sequence[File]) -> str:
    counts = html.escape(card.counts(result))
    rows = "".join(
        f"<tr><td>{html.escape(path)}</td><td>{tables.count(size)} bytes</td>"
        f"<td><code>SHA-256 {digest}</code></td></tr>"
        for path, size, digest in files
    )
    return f"<p>{counts}</p><table>{rows}</table>"


def _audit(result: TrainResult, settings: Mapping[str, Any]) -> str:
    if settings["audit"] == "off":
        return "<p>The data was not looked at: audit was off.</p>"
    findings = [Finding.from_native(one) for one in result.data.get("audit") or ()]
    return cards(findings) or "<p>Nothing was found fault with.</p>"


def setting_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every one of them: those that were not set, too."""
    return [
        (name, "not set" if value is None else card.shown(value) or "none")
        for name, value in settings.items()
    ]
