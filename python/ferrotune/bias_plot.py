"""The plot of a run's bias: rates by group, and what swapped terms do, with their intervals."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .bias import Bias
from .metrics import Interval
from .plots import BLUE, DPI, GREY, ORANGE, WIDTH, figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rates that are drawn: those of the labels with the widest gaps.
MOST_LABELS = 6
Line = tuple[str, Sequence[tuple[Interval, str, str]]]


def bias_figure(bias: Bias) -> "Figure":
    """One panel for rates and one for swaps, where there are any."""
    rates, swaps = _rates(bias), _swaps(bias)
    panels = [
        panel
        for panel in (
            (rates, f"share with the label, {bias.side} records"),
            (swaps, f"effect of swapped terms ({bias.unit})"),
        )
        if panel[0]
    ]
    heights = [0.5 * len(lines) + 1.0 for lines, _ in panels]
    size = (WIDTH / DPI, sum(heights) + 0.6)
    figure = figure_class()(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for one, (lines, title) in zip(axes, panels, strict=True):
        _draw(one, lines, title)
    if swaps:
        axes[-1].axvline(0.0, color=GREY, linewidth=0.8)
    if rates:
        axes[0].set_xlim(-0.03, 1.03)
    figure.suptitle("How groups are treated", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _rates(bias: Bias) -> list[Line]:
    labels = list(dict.fromkeys(gap.label for gap in bias.widest())) or [
        one.label for one in bias.rates
    ]
    base = "base (untrained head)" if bias.new_head else "base"
    return [
        (
            f"{one.label}, {one.group}",
            ((one.data, "data", GREY), (one.base, base, BLUE), (one.tuned, "tuned", ORANGE)),
        )
        for label in labels[:MOST_LABELS]
        for one in bias.rates
        if one.label == label
    ]


def _swaps(bias: Bias) -> list[Line]:
    return [
        (one.name, ((one.base, "base", BLUE), (one.tuned, "tuned", ORANGE))) for one in bias.swaps
    ]


def _draw(axes: "Axes", lines: Sequence[Line], title: str) -> None:
    seen = set()
    for at, (_, marks) in enumerate(lines):
        for place, (interval, name, color) in enumerate(marks):
            height = at + (place - (len(marks) - 1) / 2) * 0.22
            axes.plot([interval.low, interval.high], [height] * 2, color=color, linewidth=2.0)
            label = None if name in seen else name
            axes.plot([interval.value], [height], "o", color=color, markersize=6, label=label)
            seen.add(name)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(title)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
