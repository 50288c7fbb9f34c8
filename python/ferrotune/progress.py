"""Progress of a job: a bar in a terminal, lines in a log, a live curve in Jupyter, or nothing."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from .status import Status, sentence

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_SECONDS = 0.1
LINE_SECONDS = 5.0


class Display:
    """Shows nothing; what the other displays have in common with it."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Takes one event of the engine."""

    def close(self) -> None:
        """Leaves the last state on the screen. More than one call does no harm."""


def open_display(show: bool, title: str) -> Display:
    """The display that fits where this process writes."""
    if not show:
        return Display()
    if in_notebook():
        from .notebook import NotebookDisplay

        return NotebookDisplay(title)
    if sys.stderr.isatty():
        return BarDisplay(title)
    return LineDisplay(title)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows HTML and images.

    A terminal IPython has no kernel; nothing is imported to find out.
    """
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class LineDisplay(Display):
    """One line every few seconds, for logs; evaluations always have theirs."""

    def __init__(self, title: str, stream: TextIO | None = None, every: float = LINE_SECONDS):
        self._stream = stream if stream is not None else sys.stderr
        self._every = every
        self._status = Status()
        self._last = time.monotonic()
        self._pending = False
        self._write(title)

    def event(self, event: Mapping[str, Any]) -> None:
        self._status.add(event)
        said = sentence(event)
        if said is not None:
            self._write(said)
        if event.get("event") == "step":
            self._pending = True
            if time.monotonic() - self._last >= self._every:
                self._progress()

    def close(self) -> None:
        if self._pending:
            self._progress()

    def _progress(self) -> None:
        status = self._status
        numbers = [f"{name} {value}" for name, value in status.numbers()]
        self._write(", ".join([status.steps_text(), *numbers, status.left_text()]))
        self._last = time.monotonic()
        self._pending = False

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class BarDisplay(Display):
    """Two live lines under the terminal's text: a bar, and the latest numbers.

    It is drawn from within `event` and has no thread of its own, so it never races with training.
    """

    def __init__(self, title: str, console: "Console | None" = None):
        from rich.console import Console
        from rich.live import Live

        self._status = Status()
        self._console = console or Console(stderr=True, highlight=False)
        self._console.print(title, style="bold", markup=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._live.start()
        self._drawn = 0.0
        self._closed = False

    def event(self, event: Mapping[str, Any]) -> None:
        self._status.add(event)
        said = sentence(event) if event.get("event") != "eval" else None
        if said is not None:
            self._console.print(said, markup=False)
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._draw()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._status.step == 0:  # nothing but what was said above
            self._live.transient = True
        else:
            self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._live.update(self._lines(), refresh=True)

    def _lines(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        status = self._status
        if status.step == 0:
            return Text("preparing …" if status.heldout != status.heldout else "starting …")
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(
            total=1.0, completed=status.fraction, complete_style="cyan", finished_style="green"
        )
        end = f"{status.fraction:4.0%}  {status.left_text()}"
        first.add_row(Text(status.steps_text()), bar, Text(end))
        second = Text("  ").join(
            Text.assemble((name, "dim"), " ", (value, "bold")) for name, value in status.numbers()
        )
        second.no_wrap, second.overflow = True, "ellipsis"
        return Group(first, second)
