"""`ferrotune audit` and `ferrotune.audit`: the table, JSON, the page, the view, a run's stop."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import ferrotune
from ferrotune import cli
from ferrotune.auditing import TITLES, AuditResult

DEMO = Path(ferrotune.__file__).parent / "data/demo-model"
WORDS = ["river", "stone", "window", "garden", "morning", "letter", "engine", "market", "winter"]

TOPICS = ("ship sail wave", "horse plough field")


def _text(number: int) -> str:
    picked = [WORDS[(number * step + step) % len(WORDS)] for step in (1, 5, 7, 11, 13)]
    return f"Number {number} of the {' and the '.join(picked)}, written {number} times over."


def _rows(count: int = 80) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "text": f"{_text(n)} {('ship sail wave', 'horse plough field')[n % 2]}",
            "label": "ab"[n % 2],
        }
        for n in range(count)
    ]
    rows[30] = dict(rows[10])
    rows[41]["text"] += " Write to <b>jane.doe@example.org</b>."
    rows[50]["text"] = "<script>alert(1)</script> &amp; more of it"
    return rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, _rows())))
    return path


class _Checked(HTMLParser):
    """Tags that are opened and closed in order, and those that must not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_result_and_table(file: Path) -> None:
    result = ferrotune.audit(file, near_duplicates=0.95)
    assert isinstance(result, AuditResult)
    assert result.records == 80
    assert result.finding("exact_duplicates").count == 1
    assert result.finding("exact_duplicates").examples[0].record == 11
    assert result.finding("secrets").count == 1
    assert dict(result.labels) == {"a": 40, "b": 40}
    assert result.severity == "warning"
    with pytest.raises(KeyError):
        result.finding("absent")
    shown = str(result)
    assert "audit of 80 records in 1 file" in shown
    assert "! exact duplicates" in shown
    assert "a.jsonl:11" in shown
    assert "jane.doe@" not in shown
    assert {one.check for one in result.findings} <= TITLES.keys()


def test_page_and_view(file: Path, tmp_path: Path) -> None:
    result = ferrotune.audit(file, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (page, result._repr_html_()):
        checked = _Checked()
        checked.feed(text)
        assert checked.open == []
        assert {"svg", "rect", "table"} <= checked.seen
        assert "script" not in checked.seen
        assert checked.links == []
        assert "jane.doe@" not in text
    assert "&lt;script&gt;alert(1)" in page
    assert "Look at this data before training" in page
    bars = re.findall(r"<title>from [\d,]+ characters: ([\d,]+) records</title>", page)
    assert sum(int(bar.replace(",", "")) for bar in bars) == 80


def test_command_line(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(file)]) == 0
    assert "exact duplicates" in capfd.readouterr().out
    assert cli.main(["audit", "--data", str(file), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["records"] == 80
    assert {one["check"] for one in found["findings"]} >= {"exact_duplicates", "secrets"}
    held = ["--heldout-data", str(file)]
    assert cli.main(["audit", str(file), *held]) == 1
    assert "would measure memory" in capfd.readouterr().out
    assert cli.main(["audit"]) == 2
    assert "audit needs" in capfd.readouterr().err
    assert cli.main(["audit", str(file.parent / "absent.csv")]) == 2


def test_tokens_and_tables_in_memory() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(_rows())
    result = ferrotune.audit(data, model=DEMO, sequence_length=16, packing=False)
    assert result.tokens is not None
    assert result.tokens["trained"] > 80 * 10
    assert result.finding("too_long").count > 40
    assert result.finding("too_long").severity == "warning"
    assert result.files == ("<datasets.Dataset 1>",)
    assert ferrotune.audit(data).tokens is None


def test_a_run_looks_at_its_data_first(file: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    settings: dict[str, Any] = {
        "max_steps": 1, "batch_size": 2, "near_duplicates": 0.0, "progress": False,
        "on_event": events.append,
    }  # fmt: skip
    copy = tmp_path / "copy.jsonl"
    copy.write_text("\n".join(file.read_text().splitlines()[:5]))
    with pytest.raises(ValueError, match="the audit stops this run: Every held-out record"):
        ferrotune.train(DEMO, file, tmp_path / "a", heldout_data=copy, **settings)
    assert not (tmp_path / "a").exists()
    result = ferrotune.train(
        DEMO, file, tmp_path / "b", heldout_data=copy, audit="warn", **settings
    )
    checks = {one["check"]: one["severity"] for one in result.data["audit"]}
    assert checks["leakage"] == "stop"
    assert checks["exact_duplicates"] == "warning"
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert any("repeat an earlier text" in message for message in warnings)
    off = ferrotune.train(DEMO, file, tmp_path / "c", audit="off", **settings)
    assert off.data["audit"] == []
