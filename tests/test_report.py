"""What a finished run leaves: settings, results, curves, cards; and how results show themselves."""

import dataclasses
import io
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferrotune
from ferrotune import card, cli, files
from ferrotune.config import read_toml
from ferrotune.history import History
from ferrotune.options import check, collect, settings_of
from ferrotune.plots import HEIGHT, WIDTH, curves_figure, curves_png, save_curves
from ferrotune.results import DemoResult, EvaluateResult, Sample, TrainResult
from ferrotune.tables import Table
from python_face import engine

__all__ = ["engine"]

Train = Callable[..., TrainResult]


@pytest.fixture
def train(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs ferrotune.train over the fake engine in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text('{"text": "é|x"}\n')
    Path("m").mkdir()
    Path("m/config.json").write_text('{"_name_or_path": "org/base-1B"}')

    def run(**settings: Any) -> TrainResult:
        return ferrotune.train(
            **{"model": "m", "data": "d.jsonl", "output": "run", "progress": False, **settings}
        )

    return run


def test_the_run_folder(train: Train) -> None:
    train(method="lora", rank_pattern={"q_proj": 4}, patience=3)
    assert {path.name for path in Path("run").iterdir()} == {
        "config.toml", "metrics.jsonl", "adapter", "curves.png", "results.json", "README.md",
        "report.html",
    }  # fmt: skip
    settings = read_toml("run/config.toml")
    assert settings["rank_pattern"] == {"q_proj": 4}
    assert settings["output"] == "run"
    complete = collect(ferrotune.train, check(ferrotune.train, settings, "config.toml"))
    missing = {name for name, value in complete.items() if value is None} | {"progress"}
    assert set(settings) == set(settings_of(ferrotune.train)) - missing

    results = json.loads(Path("run/results.json").read_text())
    assert results["settings"]["patience"] == 3
    assert results["result"]["heldout_loss_before"] == 5.58
    assert results["result"]["perplexity_before"] == pytest.approx(math.exp(5.58))
    file = results["files"][0]
    assert (file["path"], file["bytes"]) == ("d.jsonl", len(Path("d.jsonl").read_bytes()))
    assert len(file["sha256"]) == 64


def test_piped_results_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    cli._show(EvaluateResult(2.0, 7.4, 1.1, 10, 1.0, 10.0), False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["evaluation", "  loss           2.0000 nats per token"]
    assert all(line == line.rstrip() for line in lines)


def test_samples_of_the_demo_stand_in_columns(train: Train) -> None:
    from rich.console import Console

    sample = Sample("In the", " a\n  b " * 20, "c")
    shown = DemoResult(train(), (sample,), 5.0)
    console = Console(file=io.StringIO(), width=40)
    console.print(shown)
    before, *continued = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert before.startswith("before In the a b a b")
    assert continued[0].startswith("       a b") or continued[0].startswith("       b a")
    assert "after  In thec …" in str(shown)


def front_matter(text: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_cards(train: Train) -> None:
    train(group="book", max_seconds=60)
    run, adapter = Path("run/README.md").read_text(), Path("run/adapter/README.md").read_text()
    for text in (run, adapter):
        found = front_matter(text)
        assert found["base_model"] == "org/base-1B"
        assert found["library_name"] == "peft"
        assert {"qlora", "base_model:adapter:org/base-1B"} <= set(found["tags"])
        for part in (
            "| held-out loss | 5.580 → ", "| held-out tokens | 10,000 |", "split by `book`",
            "skipped: 1; truncated: 2", "| max_seconds | 60.0 |", "| `d.jsonl` |",
            'bnb_4bit_quant_type="nf4"', "PeftModel.from_pretrained(base, '",
        ):  # fmt: skip
            assert part in text, part
    assert "](curves.png)" in run
    assert "ferrotune.generate('m', \"…\", 'run/adapter', quant_type=\"nf4\")" in run
    assert "from_pretrained('org/base-1B', quantization_config=quantization)" in adapter
    assert "from_pretrained(base, 'path/to/this/adapter')" in adapter
    assert "curves.png" not in adapter


def test_the_hub_reads_the_card(train: Train) -> None:
    hub = pytest.importorskip("huggingface_hub")
    train()
    loaded = hub.ModelCard.load("run/adapter/README.md")
    assert loaded.data.base_model == "org/base-1B"
    assert loaded.data.pipeline_tag == "text-generation"


def test_code_in_cards_is_python(train: Train) -> None:
    for method in ("lora", "qlora", "full"):
        train(method=method, output=method, blocksize=128)
        text = Path(method, "README.md").read_text()
        blocks = text.split("```python\n")[1:]
        assert len(blocks) == 2
        for block in blocks:
            compile(block.split("```")[0], "card", "exec")
        assert ("BitsAndBytesConfig" in text) == (method == "qlora")
        assert ("block size is 64" in text) == (method == "qlora")


def test_card_of_a_full_run_without_heldout_data() -> None:
    settings = collect(ferrotune.train, {"model": "a/b/tiny", "data": "x.txt", "method": "full"})
    found: dict[str, Any] = {
        "steps": 5, "best_step": None, "heldout_loss_before": None, "heldout_loss_best": None,
        "heldout_loss_last": None, "train_loss_last": 2.0, "tokens": 100, "seconds": 1.0,
        "tokens_per_second": 100.0, "stop_reason": "max_seconds", "output": "o", "model": {},
        "data": {}, "adapter": None,
    }  # fmt: skip
    result = TrainResult.from_native("full", found)
    assert (result.weights, result.adapter) == (Path("o/model"), None)
    assert result.perplexity_before is None
    text = card.render(result, settings, [("x.txt", 12, "ab" * 32)])
    assert front_matter(text)["library_name"] == "transformers"
    assert front_matter(text)["base_model"] == "tiny"
    assert "No data was held out" in text
    assert "ended before its last planned step: max_seconds" in text
    assert "lora_alpha" not in text
    assert "not measured" in str(result)


def test_shown_settings_exist() -> None:
    assert set(card._SHOWN) <= set(settings_of(ferrotune.train))


# Results


def test_results_are_frozen_and_show_themselves(train: Train) -> None:
    from rich.console import Console

    result = train()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.steps = 3  # type: ignore[misc]
    console = Console(file=io.StringIO(), width=120)
    console.print(result)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (str(result), shown, result._repr_html_()):
        for part in (
            "qlora fine-tuning", "5.580 →", "nats per token (-1.", "70,656 of 1,070,000 (6.60%)",
            "120", "245,760", "12.0 s", "run",
        ):  # fmt: skip
            assert part in text, part
    assert json.loads(json.dumps(result.to_dict()))["weights"] == "run/adapter"
    worse = dataclasses.replace(result, best_step=0, stop_reason="early_stopping")
    assert "120 (early stopping, none was better than before training)" in str(worse)
    assert result.best_step == 100
    assert "best weights from 100" in str(result)
    assert result.figure().get_axes()


def test_html_and_markdown_escape() -> None:
    table = Table("<b>", (("a|b", "<script>\nx"),))
    assert "&lt;script&gt;" in table.html()
    assert "<script>" not in table.html()
    assert table.markdown().splitlines()[-1] == "| a\\|b | <script> x |"


def test_infinite_numbers_are_null_in_json() -> None:
    result = EvaluateResult(math.nan, math.inf, None, 1, 1.0, 1.0)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["perplexity"] is None
    assert ferrotune.TrainResult.from_native(
        "lora",
        {
            "steps": 1, "best_step": 0, "heldout_loss_before": 800.0, "heldout_loss_best": None,
            "heldout_loss_last": None, "train_loss_last": None, "tokens": 1, "seconds": 1.0,
            "tokens_per_second": 1.0, "stop_reason": "finished", "output": "o", "model": {},
            "data": {},
        },
    ).perplexity_before == math.inf  # fmt: skip


# Curves


def history(scale: float = 1.0, steps: int = 60, heldout: bool = True) -> History:
    found = History()
    for number in range(steps + 1):
        loss = 3.0 + scale * math.exp(-number / 20)
        if number:
            found.add({"event": "step", "step": number, "loss": loss, "tokens": 100 * number})
        if heldout and number % 10 == 0:
            found.add({"event": "eval", "step": number, "loss": loss + 0.1})
    return found


def pixels(png: bytes) -> Any:
    from matplotlib import image

    return image.imread(io.BytesIO(png), format="png")


def test_curves_are_a_png_of_the_data(tmp_path: Path) -> None:
    save_curves(history(), tmp_path / "curves.png", "title")
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    one, other = pixels(content), pixels(curves_png(history(3.0), "title"))
    assert one.shape[:2] == other.shape[:2] == (HEIGHT, WIDTH)
    assert (one != other).any(axis=2).sum() > 500
    assert (pixels(curves_png(history(), "title")) == one).all()
    assert one[..., :3].std() > 0.02
    assert pixels(curves_png(history(), "", 500, 300)).shape[:2] == (300, 500)


def test_both_curves_and_the_best_step_are_on_one_plot() -> None:
    found = history()
    found.add({"event": "eval", "step": 75, "loss": 9.0})
    (axes, *_) = curves_figure(found).axes
    lines = {str(line.get_label()).partition(":")[0]: line for line in axes.get_lines()}
    steps = [one.step for one in found.evaluations]
    assert {"train (smoothed)", "held-out", "before training", "best"} <= lines.keys()
    assert list(lines["held-out"].get_xdata()) == steps
    best = min(found.evaluations, key=lambda one: one.loss)
    assert best.step < 75 == steps[-1]
    assert list(lines["best"].get_xdata()) == [best.step]
    assert list(lines["best"].get_ydata()) == [best.loss]
    assert lines["best"].get_label() == f"best: {best.loss:.3f} at step {best.step}"


@pytest.mark.filterwarnings("error")
def test_curves_of_little_or_broken_data() -> None:
    broken = history(steps=3)
    broken.add({"event": "step", "step": 4, "loss": None, "tokens": 400})
    broken.add({"event": "eval", "step": 4, "loss": None})
    assert broken.best is not None
    only_nan = History.of([{"event": "step", "step": 1, "loss": None}])
    for found in (History(), history(steps=0), history(steps=1), broken, only_nan):
        assert pixels(curves_png(found)).shape[:2] == (HEIGHT, WIDTH)
    constant = History.of([{"event": "step", "step": 1, "loss": 0.0, "tokens": 0}])
    assert curves_png(constant)
    assert curves_png(history(heldout=False))


def test_history_of_a_resumed_run(tmp_path: Path) -> None:
    first, second = history(steps=30), history(5.0, steps=40)
    events = [{"event": "step", "step": s.step, "loss": s.loss} for s in first.steps]
    events += [{"event": "eval", "step": e.step, "loss": e.loss} for e in first.evaluations]
    events += [{"event": "step", "step": s.step, "loss": s.loss} for s in second.steps[20:]]
    events.append({"event": "eval", "step": 40, "loss": 2.5})
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, events)) + '\n{"event": "st')
    found = History.read(file)
    assert [one.step for one in found.steps] == list(range(1, 41))
    assert found.steps[20].loss == second.steps[20].loss
    assert [one.step for one in found.evaluations] == [0, 10, 20, 40]
    assert found.base_loss == pytest.approx(4.1)
    assert found.best is not None
    assert found.best.step == 40


# Files


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_written_files_hold_their_content(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        path.write_text("old")
        files.write_atomic(path, text)
        assert path.read_bytes().decode() == text
        assert os.listdir(folder) == ["f"]
        assert files.fingerprint(path)[0] == len(text.encode())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o444

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_free_sibling(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert files.free_sibling(folder) == folder
    folder.mkdir()
    assert files.free_sibling(folder) == folder
    (folder / "x").touch()
    assert files.free_sibling(folder) == tmp_path / "a-2"
    (tmp_path / "a-2").touch()
    assert files.free_sibling(folder) == tmp_path / "a-3"
