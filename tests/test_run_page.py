"""A run's report.html and its TensorBoard event files."""

import json
import re
import struct
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import ferrotune
from ferrotune import environment, run_page
from ferrotune.history import History
from ferrotune.options import SettingError, collect, settings_of
from ferrotune.results import TrainResult
from python_face import engine

__all__ = ["engine"]

VOID = {"meta", "img", "br", "hr", "rect"}


class Checked(HTMLParser):
    """Fails on a tag that is closed where another is open; keeps text and sources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


def read(page: str) -> Checked:
    found = Checked()
    found.feed(page)
    assert found.open == []
    assert all(source.startswith("data:") for source in found.sources)
    assert "<script" not in page
    return found


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text('{"text": "x"}\n')
    return "d.jsonl"


def train(**settings: Any) -> TrainResult:
    return ferrotune.train(
        **{"model": "m", "data": "d.jsonl", "output": "run", "progress": False, **settings}
    )


def test_the_page_of_a_run(engine: Any, data: str) -> None:
    result = train(seed=17, target_modules=["a<b", "q_proj"])
    found = read(Path("run/report.html").read_text())
    assert len(found.sources) == 1
    text = "\n".join(found.texts)
    assert result.verdict is not None
    for part in (
        "qlora fine-tuning of m", "5.580 → ", "70.7k", result.verdict.text, "a<b, q_proj",
        "no safety, no bias", "950 training records", "Records that were skipped: 1",
        "processor", "numpy",
    ):  # fmt: skip
        assert part in text, part
    for name in settings_of(ferrotune.train):
        assert name == "progress" or f"\n{name}\n" in text, name
    digest = json.loads(Path("run/results.json").read_text())["files"][0]["sha256"]
    assert f"SHA-256 {digest}" in text


def test_the_environment_is_in_the_results(engine: Any, data: str) -> None:
    train()
    found = json.loads(Path("run/results.json").read_text())["environment"]
    assert found == environment.describe()
    assert found["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert int(found["cores"]) >= 1
    assert all(value for value in found.values())


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def classified() -> dict[str, Any]:
    classes = [
        {
            "label": label,
            "support": support,
            **{name: interval(0.5) for name in ("precision", "recall", "f1")},
        }
        for label, support in (("<spam>", 3), ("ham", 5))
    ]
    measures = ("loss", "accuracy", "macro_f1", "mcc", "calibration_error")
    return {
        "examples": 8, **{name: interval(0.75) for name in measures}, "classes": classes,
        "confusion": [[2, 1], [0, 5]], "confusion_interval": None,
    }  # fmt: skip


def finding(severity: str) -> dict[str, Any]:
    example = {"file": "a/d.jsonl", "record": 7, "text": "<b>again", "note": "as record 2"}
    return {
        "check": "exact_duplicates", "severity": severity, "count": 3, "of": 10,
        "message": f"3 records are copies ({severity}).", "examples": [example], "details": {},
    }  # fmt: skip


def result_of(**found: Any) -> TrainResult:
    return TrainResult.from_native(
        "lora",
        {
            "steps": 4, "best_step": 4, "heldout_loss_before": 1.0, "heldout_loss_best": 0.7,
            "heldout_loss_last": 0.7, "train_loss_last": 0.5, "tokens": 100, "seconds": 1.0,
            "tokens_per_second": 100.0, "stop_reason": "finished", "output": "o", "model": {},
            "data": {}, **found,
        },
    )  # fmt: skip


def page(result: TrainResult, **changed: Any) -> str:
    settings = collect(ferrotune.train, {"model": "m", "data": "d.jsonl", "method": "lora"})
    return run_page.render("lora", result, {**settings, **changed}, History(), [], {"cores": "2"})


def test_the_page_of_a_classifier_with_an_audit() -> None:
    audit = [finding("note"), finding("warning")]
    written = page(result_of(classification_best=classified(), data={"audit": audit}))
    text = read(written).texts
    assert "75.0%" in text
    assert {"<spam>", "ham", "0.50 (0.49 to 0.51)", "d.jsonl:7", "<b>again"} <= set(text)
    warning, note = written.index("copies (warning)"), written.index("copies (note)")
    assert warning < note
    # Two of three <spam> are right, and every ham.
    assert re.findall(r"--part:(\d+)%\">(\d+)<", written) == [
        ("47", "2"), ("23", "1"), ("0", "0"), ("70", "5"),
    ]  # fmt: skip


def test_the_page_of_a_test_split_and_of_forgetting() -> None:
    language = {
        name: interval(value)
        for name, value in (("loss_interval", 2.5), ("perplexity_interval", 12.0))
    }
    language["bits_per_byte"] = None
    test = {"loss": 0.6, "tokens": 8, "classification": classified()}
    forgetting = {"tokens": 50, "before": language, "after": language, "change": interval(0.3)}
    written = page(result_of(test=test, forgetting=forgetting))
    text = " ".join(read(written).texts)
    assert written.index("Test split") < written.index("What this does not show")
    for part in ("0.750 (0.740 to 0.760)", "The model forgot", "+0.300 (+0.290 to +0.310)"):
        assert part in text, part
    assert "nor what the model lost" not in text
    assert "Test split" not in page(result_of())


def test_a_page_of_little() -> None:
    before = {"heldout_loss_before": None, "heldout_loss_best": None, "heldout_loss_last": None}
    written = page(result_of(**before), audit="off")
    text = " ".join(read(written).texts)
    assert "No data was held out" in text
    assert "audit was off" in text
    assert "Curves" not in text
    assert "Nothing was found fault with" in " ".join(read(page(result_of())).texts)


# TensorBoard


def records(file: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, content, its checksum."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of a folder's event files, without those that a later one purges."""
    from tensorboardX.proto.event_pb2 import Event

    found: list[tuple[str, int, float]] = []
    for file in sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime_ns):
        for record in records(file):
            event = Event.FromString(record)
            if event.HasField("session_log"):
                found = [one for one in found if one[1] < event.step]
            for value in event.summary.value:
                found.append((value.tag, event.step, value.simple_value))
    return found


def test_event_files_hold_every_number(engine: Any, data: str) -> None:
    pytest.importorskip("tensorboardX")
    train(tensorboard=True, max_steps=30)
    found = {(tag, step): value for tag, step, value in scalars(Path("run/tensorboard"))}
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        section = {"step": "train", "eval": "heldout"}[event["event"]]
        assert found[section + "/loss", event["step"]] == pytest.approx(event["loss"], rel=1e-6)
    assert {"train/learning_rate", "train/grad_norm", "heldout/perplexity"} <= {
        tag for tag, _ in found
    }
    assert not any("seconds" in tag and "per_second" not in tag for tag, _ in found)


def test_event_files_of_a_resumed_run_go_on(engine: Any, data: str) -> None:
    pytest.importorskip("tensorboardX")

    def stop_at(event: dict[str, Any]) -> bool:
        return not (event["event"] == "step" and event["step"] == 7)

    train(tensorboard=True, max_steps=30, on_event=stop_at)
    train(tensorboard=True, max_steps=30, resume=True)
    steps = [step for tag, step, _ in scalars(Path("run/tensorboard")) if tag == "train/loss"]
    assert steps == list(range(1, 31))


def test_without_the_package_there_is_one_error(
    engine: Any, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SettingError, match=r"pip install 'ferrotune\[tensorboard\]'"):
        train(tensorboard=True)
    assert not Path("run").exists()
    assert engine == []
