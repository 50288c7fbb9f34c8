"""Live progress in Jupyter: the numbers as HTML, and the curves of the losses under them."""

import html
import time
from collections.abc import Mapping
from typing import Any

from .history import History
from .progress import Display
from .status import Status, sentence

NUMBERS_SECONDS = 0.25
CURVE_SECONDS = 2.0
CURVE_SHARE = 0.05  # most of the time that drawing may take
CURVE_SIZE = (760, 400)  # pixels


class NotebookDisplay(Display):
    """Two outputs of the cell that are replaced in place; needs IPython, and no widgets."""

    def __init__(self, title: str) -> None:
        from IPython.display import HTML, display

        self._title = title
        self._status, self._history = Status(), History()
        self._notes: list[str] = []
        self._numbers_at = self._curve_at = self._curve_cost = 0.0
        self._html = HTML
        self._closed = False
        self._numbers: Any = display(HTML(self._page()), display_id=True)
        self._curve: Any = None

    def event(self, event: Mapping[str, Any]) -> None:
        self._status.add(event)
        self._history.add(event)
        said = sentence(event) if event.get("event") != "eval" else None
        if said is not None:
            self._notes.append(said)
        now = time.monotonic()
        if said is not None or now - self._numbers_at >= NUMBERS_SECONDS:
            self._show_numbers()
        pause = max(CURVE_SECONDS, self._curve_cost / CURVE_SHARE)
        if self._history.steps and now - self._curve_at >= pause:
            self._show_curve()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._show_numbers()
        if self._history.steps:
            self._show_curve()

    def _show_numbers(self) -> None:
        self._numbers_at = time.monotonic()
        self._numbers.update(self._html(self._page()))

    def _show_curve(self) -> None:
        from IPython.display import Image, display

        from .plots import curves_png

        started = time.monotonic()
        image = Image(data=curves_png(self._history, "", *CURVE_SIZE), format="png")
        if self._curve is None:
            self._curve = display(image, display_id=True)
        else:
            self._curve.update(image)
        self._curve_at = time.monotonic()
        self._curve_cost = self._curve_at - started

    def _page(self) -> str:
        status = self._status
        notes = "".join(
            f"<div style='opacity:.7'>{html.escape(note)}</div>" for note in self._notes
        )
        head = f"<b>{html.escape(self._title)}</b>{notes}"
        if status.step == 0:
            return f"<div>{head}{'' if self._closed else '<div>preparing …</div>'}</div>"
        numbers = " · ".join(
            f"{html.escape(name)} <b>{html.escape(value)}</b>" for name, value in status.numbers()
        )
        percent = f"{status.fraction:.0%}"
        bar = (
            "<div style='background:#8884;border-radius:4px;height:8px;max-width:760px'>"
            f"<div style='background:#0072B2;border-radius:4px;height:8px;width:{percent}'></div>"
            "</div>"
        )
        place = f"{status.steps_text()} · {percent} · {status.left_text()}"
        return f"<div>{head}{bar}<div>{html.escape(place)}</div><div>{numbers}</div></div>"
