"""The plot of a comparison: quality with intervals, and the differences to the fine-tuned model."""

from typing import TYPE_CHECKING

from ..plots import BLUE, DPI, GREY, ORANGE, WIDTH, figure_class
from .result import TUNED, CompareResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def compare_figure(result: CompareResult) -> "Figure":
    """Two panels with one row a contender."""
    contenders = result.contenders
    height = 0.45 * len(contenders) + 1.4
    figure = figure_class()(figsize=(WIDTH / DPI, height), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)  # inches
    left, right = figure.subplots(1, 2, sharey=True)
    for at, one in enumerate(contenders):
        color = ORANGE if one.name == TUNED else BLUE
        left.plot([one.quality.low, one.quality.high], [at, at], color=color, linewidth=2)
        left.plot([one.quality.value], [at], "o", color=color)
        if one.difference is not None:
            right.plot([one.difference.low, one.difference.high], [at, at], color=BLUE, linewidth=2)
            right.plot([one.difference.value], [at], "o", color=BLUE)
    right.axvline(0.0, color=GREY, linewidth=0.9)
    left.set_yticks(range(len(contenders)), [one.name for one in contenders])
    left.set_ylim(len(contenders) - 0.5, -0.5)
    unit = "accuracy" if result.measure == "accuracy" else "loss (nats per token)"
    left.set_xlabel(unit)
    right.set_xlabel(f"{TUNED} minus this")
    for axes in (left, right):
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"Is fine-tuning worth it? {result.examples:,} examples"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
