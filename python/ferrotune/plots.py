"""Loss curves, drawn without pyplot: no global state, no display, any thread."""

import functools
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .history import History, smooth_both_ways
from .tables import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any common colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
WIDTH, HEIGHT, DPI = 1000, 600, 100  # pixels, pixels, pixels an inch


def curves_figure(
    history: History, title: str = "", width: int = WIDTH, height: int = HEIGHT
) -> "Figure":
    """Train and held-out loss over the steps, with the tokens read on a second axis above."""
    figure = figure_class()(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    _train(axes, history)
    _heldout(axes, history)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {history.unit})")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if history.steps:
        axes.set_xlim(0, max(history.steps[-1].step, 1) * 1.01)
    _limits(axes, history)
    _token_axis(axes, history)
    if title:
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.94), framealpha=0.9, edgecolor="none")
    else:
        axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", color=GREY)
    return figure


def curves_png(
    history: History, title: str = "", width: int = WIDTH, height: int = HEIGHT
) -> bytes:
    """The figure as the bytes of a PNG file of `width` by `height` pixels."""
    return png(curves_figure(history, title, width, height))


def save_curves(history: History, path: Path, title: str = "") -> None:
    """Writes the curves as a PNG file, aside and renamed. Raises OSError."""
    from .files import write_atomic

    write_atomic(path, curves_png(history, title))


@functools.cache
def figure_class() -> "type[Figure]":
    from matplotlib.figure import Figure

    class Curves(Figure):
        """A figure that Jupyter shows where pyplot, which would see to that, is not imported."""

        def _repr_png_(self) -> bytes:
            return png(self)

    return Curves


def png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _train(axes: "Axes", history: History) -> None:
    if not history.steps:
        return
    steps = [found.step for found in history.steps]
    losses = [found.loss for found in history.steps]
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.9)
    span = max(1.0, min(len(losses) / 10, max(4.0, len(losses) / 60)))
    smoothed = smooth_both_ways(losses, span)
    axes.plot(steps, smoothed, color=BLUE, linewidth=1.8, label="train (smoothed)")


def _heldout(axes: "Axes", history: History) -> None:
    found = history.evaluations
    if not found:
        return
    steps, losses = [one.step for one in found], [one.loss for one in found]
    axes.plot(
        steps, losses, color=ORANGE, linewidth=1.8, marker="o", markersize=4.5, label="held-out"
    )
    base, best = history.base_loss, history.best
    if base is not None and math.isfinite(base):
        label = f"before training: {base:.3f}"
        axes.axhline(base, color=GREY, linewidth=1.1, linestyle=(0, (5, 4)), label=label)
    if best is not None:
        label = f"best: {best.loss:.3f} at step {best.step:,}"
        axes.plot(
            [best.step],
            [best.loss],
            color=GREEN,
            marker="*",
            markersize=15,
            markeredgecolor="white",
            linestyle="none",
            zorder=5,
            label=label,
            clip_on=False,
        )


def _limits(axes: "Axes", history: History) -> None:
    """Bounds that single noisy batches do not stretch: the middle 98 % of the train losses."""
    losses = sorted(one.loss for one in history.steps if math.isfinite(one.loss))
    cut = len(losses) // 100
    values = [*losses[cut : len(losses) - cut], *(one.loss for one in history.evaluations)]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    margin = max(0.04 * (high - low), 0.02 * abs(high), 1e-3)
    axes.set_ylim(low - margin, high + margin)


def _token_axis(axes: "Axes", history: History) -> None:
    """Labels tokens at the steps' ticks, where steps read about the same number of tokens each."""
    last = next((one for one in reversed(history.steps) if one.tokens > 0), None)
    if last is None or last.step == 0:
        return
    rate = last.tokens / last.step

    def to_tokens(steps: Any) -> Any:
        return steps * rate

    def to_steps(tokens: Any) -> Any:
        return tokens / rate

    above = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    above.set_xlabel("training tokens", color=GREY, fontsize=9)
    above.tick_params(colors=GREY, labelsize=8)
    above.spines["top"].set_visible(False)
    above.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    """950k, 1M, 1.5M: the compact form without zeros behind the point."""
    text = compact(value)
    number, suffix = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + suffix
