"""The errors against float64 of ferrotune and of PEFT, as a table that the tests leave behind.

Tests add rows through the fixture `error_table`; rows of the same tests replace those of earlier
runs. The folder is target/errors, or what FERROTUNE_ERRORS names: errors.jsonl has every row,
errors.md the table of groups.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent.parent / "target" / "errors"


class Row(NamedTuple):
    """Relative errors (Frobenius norm) of one tensor; ``elements`` is its weight in a group."""

    group: str
    case: str
    of: str
    ferrotune: float
    peft: float
    elements: int


class ErrorTable:
    """Rows by the test that added them."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}

    def add(self, test: str, rows: list[Row]) -> None:
        self.rows[test] = rows

    def write(self) -> Path | None:
        """The folder; None without rows."""
        if not self.rows:
            return None
        folder = Path(os.environ.get("FERROTUNE_ERRORS") or FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "errors.jsonl"
        with (folder / "lock").open("w") as lock:  # another worker may end now, too
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _read(path) | self.rows
            lines = (
                json.dumps({"test": test, **row._asdict()})
                for test in sorted(found)
                for row in found[test]
            )
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            (folder / "errors.md").write_text(markdown(found), encoding="utf-8")
        return folder


def _read(path: Path) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            found.setdefault(fields.pop("test"), []).append(Row(**fields))
    return found


def mean_square(pairs: list[tuple[float, int]]) -> float:
    """Root of the mean square of errors, each as often as its tensor has elements."""
    total = sum(weight for _, weight in pairs)
    return (sum(error**2 * weight for error, weight in pairs) / max(1, total)) ** 0.5


def markdown(found: dict[str, list[Row]]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for rows in found.values():
        for row in rows:
            groups.setdefault((row.group, row.of), []).append(row)
    lines = [
        "# Errors against float64",
        "",
        "Relative errors (Frobenius norm) of ferrotune's results and PEFT's, from the same inputs",
        "under the same dropout masks: root mean square over all elements of the cases; of models,",
        "over all models. T5's in bf16 scatter, as its ReLU switches on other elements after",
        "rounding: a single draw says little of them, the mean of many does. Written by the tests",
        "(`tests/error_table.py`).",
        "",
        "| cases | of | tensors | ferrotune | PEFT | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for (group, of), rows in sorted(groups.items()):
        mine = mean_square([(row.ferrotune, row.elements) for row in rows])
        theirs = mean_square([(row.peft, row.elements) for row in rows])
        ratio = f"{mine / theirs:.3f}" if theirs else "both exact" if not mine else "PEFT exact"
        lines.append(f"| {group} | {of} | {len(rows)} | {mine:.2e} | {theirs:.2e} | {ratio} |")
    return "\n".join(lines) + "\n"
