"""Runs under several seeds: `repeats`, their spread, and few-shot runs with `shots`."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

import ferrotune
from ferrotune.config import read_toml
from ferrotune.options import SettingError
from ferrotune.repeats import Spread
from python_face import engine

__all__ = ["engine"]


@pytest.fixture
def train(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text('{"text": "x"}\n')

    def run(**settings: Any) -> ferrotune.TrainResult:
        given = {"model": "m", "data": "d.jsonl", "output": "run", "progress": False}
        return ferrotune.train(**{**given, **settings})

    return run


def test_every_run_has_its_seed_and_folder_on_one_split(train: Any, engine: Any) -> None:
    result = train(seed=5, repeats=3, shots=4)
    sent = [settings for _, settings in engine]
    assert [one["seed"] for one in sent] == [5, 6, 7]
    assert [one["split_seed"] for one in sent] == [None, 5, 5]
    assert [one["shots"] for one in sent] == [4, 4, 4]
    folders = [Path("run"), Path("run/repeats/2"), Path("run/repeats/3")]
    assert (
        [Path(one["output"]) for one in sent] == [one.output for one in result.repeats] == folders
    )
    for folder in folders[1:]:
        assert (folder / "report.html").is_file()
        assert read_toml(folder / "config.toml")["repeats"] == 1
    losses = [one.measures["loss"] for one in result.repeats]
    assert losses[0] == result.heldout_loss_best
    assert losses[2] == pytest.approx(losses[0] + 0.02)
    mean, deviation = statistics.fmean(losses), statistics.stdev(losses)
    spread = Spread(mean, deviation, min(losses), max(losses)).text()
    assert f"held-out loss, 3 seeds  {spread}" in str(result)
    assert spread in Path("run/report.html").read_text()
    assert "3 runs, seeds 5 to 7" in Path("run/README.md").read_text()
    saved = json.loads(Path("run/results.json").read_text())["result"]["repeats"]
    assert [one["measures"]["loss"] for one in saved] == losses


def test_a_spread_as_text() -> None:
    assert Spread(0.5, 0.1, 0.4, 0.62).text(2) == "0.50 ± 0.10 (0.40 to 0.62)"


def test_one_run_has_no_spread(train: Any, engine: Any) -> None:
    result = train()
    assert result.repeats == ()
    assert len(engine) == 1
    assert "seeds" not in str(result)
    assert "Under other seeds" not in Path("run/report.html").read_text()
    for number in (0, -1):
        with pytest.raises((SettingError, ValueError), match="repeats"):
            train(output="other", repeats=number)
    assert len(engine) == 1


def test_interrupted_repeats_go_on_where_they_were(train: Any, engine: Any) -> None:
    seen: list[int] = []

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seen.append(event["step"])
            if len(seen) == 120 + 50:
                raise KeyboardInterrupt

    with pytest.raises(ferrotune.TrainInterrupted, match=re.escape("run/config.toml")):
        train(repeats=3, checkpoint_every=50, on_event=interrupt)
    assert not Path("run/repeats/2/results.json").exists()
    engine.clear()
    result = train(repeats=3, checkpoint_every=50, resume=True)
    assert [(Path(one["output"]).name, one["resume"]) for _, one in engine] == [
        ("run", True), ("2", True), ("3", False),
    ]  # fmt: skip
    assert [one.seed for one in result.repeats] == [0, 1, 2]


def test_a_repeat_that_ended_before_its_checkpoint_begins_again(train: Any, engine: Any) -> None:
    train(repeats=2, checkpoint_every=50)
    second = Path("run/repeats/2")
    (second / "results.json").unlink()
    for file in (second / "checkpoint").iterdir():
        file.unlink()
    (second / "checkpoint").rmdir()
    (second / "left").touch()
    engine.clear()
    assert len(train(repeats=2, checkpoint_every=50, resume=True).repeats) == 2
    assert [one["resume"] for _, one in engine] == [True, False]
    assert not (second / "left").exists()


def test_a_function_that_ends_a_run_ends_the_others(train: Any, engine: Any) -> None:
    def stop(event: dict[str, Any]) -> bool:
        return not (event["event"] == "step" and event["step"] == 7)

    assert train(repeats=3, on_event=stop).repeats == ()
    assert len(engine) == 1


def test_few_shots_of_a_real_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from labels import TOPICS, classifier, settings, write_labelled

    write_labelled(tmp_path / "train.jsonl", 96)
    write_labelled(tmp_path / "heldout.jsonl", 30, seed=1)
    model = classifier("bert", tmp_path / "model", "Model")
    chosen = settings(
        model, output=tmp_path / "run", task="classification", max_steps=4, eval_every=4
    )
    result = ferrotune.train(**chosen, shots=3, repeats=2)
    assert result.data["train_records"] == 3 * len(TOPICS)
    assert result.data["heldout_records"] == 30
    first, second = (one.measures for one in result.repeats)
    assert {"loss", "accuracy", "macro_f1", "mcc"} == set(first) == set(second)
    assert first["loss"] != second["loss"]
    with pytest.raises(ValueError, match=r"shots is 90, but .* of label"):
        ferrotune.train(**{**chosen, "output": tmp_path / "other"}, shots=90)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_shots_count_the_records_without_a_label(task: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from labels import TOPICS, classifier, settings, write_labelled

    train = write_labelled(tmp_path / "train.jsonl", 24)
    bare = [{"text": f"the water came {at}", "label": None} for at in range(3)]
    with train.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in [*bare, {"text": "no day"}])
    write_labelled(tmp_path / "heldout.jsonl", 9, seed=1)
    model = classifier("gpt2", tmp_path / "model", "LMHeadModel")
    result = ferrotune.train(
        **settings(model, output=tmp_path / "run", task=task, max_steps=2, eval_every=2),
        shots=2, audit="off",
    )  # fmt: skip
    assert result.data["train_records"] == 2 * len(TOPICS)
    assert result.data["skipped_total"] == 4
    assert [one["record"] for one in result.data["skipped"]] == [25, 26, 27, 28]
    assert all("`label`" in one["reason"] for one in result.data["skipped"])
    assert "Records that were skipped: 4" in (tmp_path / "run/README.md").read_text()
