"""A comparison of a run: what its folder says of it, and the section of its page."""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files, tables
from ..options import SettingError
from ..pages import grid, image, pairs
from ..results import WHOLE_MODEL
from ..run_page import setting_rows, with_comparison
from .result import CompareResult

PAGE = "report.html"
_FROM_THE_RUN = (
    "model", "data", "test_data", "text_column", "prompt_column", "completion_column",
    "label_column",
)  # fmt: skip
_QUANTISED = ("quant_type", "blocksize", "double_quant")


def settings_with(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what the run says in place of what was not given.

    Raises SettingError for a folder without a run that is over, and where the run cannot say it.
    """
    for name in ("adapter", "tuned"):
        if settings[name] is not None:
            raise SettingError(f"run has the fine-tuned model: leave {name} out")
    page_of(run)
    try:
        found = json.loads((run / "results.json").read_text(encoding="utf-8"))
        its, weights = found["settings"], Path(found["result"]["weights"]).name
        known = {name: its[name] for name in (*_FROM_THE_RUN, *_QUANTISED, "method")}
    except OSError:
        raise SettingError(f"{run} has no results.json: no run is over there") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{run / 'results.json'} is not that of a run ({error!r})") from None
    complete = dict(settings)
    for name in _FROM_THE_RUN:
        complete[name] = settings[name] or known[name]
        if name.endswith("data") and any(path.startswith("<") for path in complete[name] or ()):
            raise SettingError(f"the run's {name} was a table in memory: give {name}")
    if not complete["test_data"]:
        raise SettingError(
            f"{run} has no test files of its own: give test_data, records that neither training "
            "nor retrieval saw, as `ferrotune split` with test writes them"
        )
    if known["method"] == "qlora" and settings["quant_type"] is None:
        complete |= {name: known[name] for name in _QUANTISED}
    complete["tuned" if known["method"] in WHOLE_MODEL else "adapter"] = str(run / weights)
    return complete


def page_of(run: Path) -> str:
    """The run's page. Raises SettingError where it is not there, or takes no comparison."""
    file = run / PAGE
    try:
        page = file.read_text(encoding="utf-8")
        with_comparison(page, "")
    except OSError:
        raise SettingError(f"{run} has no {PAGE}: no run is over there") from None
    except ValueError as error:
        raise SettingError(f"{file}: {error}") from None
    return page


def add_to_page(run: Path, result: CompareResult, settings: Mapping[str, Any], plot: bytes) -> Path:
    """Puts the comparison into the run's page, in place of the last one."""
    files.write_atomic(run / PAGE, with_comparison(page_of(run), section(result, settings, plot)))
    return run / PAGE


def section(result: CompareResult, settings: Mapping[str, Any], plot: bytes) -> str:
    """Table, plot and guide as HTML, with the settings and the fingerprints of the files."""
    marked = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(result.guide))
    guide = "".join(f"<p>{text}</p>" for text in marked.split("\n\n"))
    missing = "".join(f"<p class='soft'>{html.escape(line)}</p>" for line in result.missing())
    return (
        f"<p class='soft'>{html.escape(result.preface())}</p>"
        f"{image(plot, 'Quality of every way to answer')}"
        f"{grid(result.header(), result.cells())}{missing}{guide}"
        "<details><summary>Settings and files of the comparison</summary>"
        f"<div class='wide'>{pairs(setting_rows(settings))}</div>"
        f"{pairs(fingerprints(settings))}</details>"
    )


def fingerprints(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Path, and size with SHA-256, of every file of the data; tables in memory have none."""
    found = []
    for path in map(Path, [*settings["data"], *settings["test_data"]]):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in filter(Path.is_file, inside):
            size, digest = files.fingerprint(file)
            found.append((str(file), f"{tables.count(size)} bytes, SHA-256 {digest}"))
    return found
