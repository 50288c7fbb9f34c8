"""The Python functions and the demo over the fake engine."""

from pathlib import Path
from typing import Any

import pytest

import fake_native
import ferrotune
from ferrotune import cli
from ferrotune.options import settings_of
from python_face import engine

__all__ = ["engine"]


def test_train_sends_every_setting(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    result = ferrotune.train("m", tmp_path / "d.txt", tmp_path / "run", progress=False)
    name, sent = engine[-1]
    assert name == "train"
    assert set(sent) == set(settings_of(ferrotune.train)) - {"progress", "repeats", "tensorboard"}
    assert sent["data"] == [str(tmp_path / "d.txt")]
    assert sent["learning_rate"] == 2e-4
    assert sent["rank_pattern"] == {}
    assert result.adapter == tmp_path / "run/adapter"
    assert result.heldout_loss_before == fake_native.BASE_LOSS
    ferrotune.train("m", tmp_path / "d.txt", tmp_path / "all", method="full", progress=False)
    assert engine[-1][1]["learning_rate"] == 2e-5


def test_the_default_output_is_never_overwritten(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.txt").write_text("text")
    Path("ferrotune-run").mkdir()
    outputs = [ferrotune.train("m", "d.txt", progress=False).output.name for _ in range(3)]
    assert outputs == ["ferrotune-run", "ferrotune-run-2", "ferrotune-run-3"]


def test_on_event_sees_all_and_can_stop(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    seen: list[dict[str, Any]] = []

    def watch(event: dict[str, Any]) -> bool:
        seen.append(event)
        return not (event["event"] == "step" and event["step"] == 7)

    result = ferrotune.train("m", tmp_path / "d.txt", tmp_path / "r", on_event=watch)
    assert (result.steps, result.stop_reason) == (7, "interrupted")
    assert {event["event"] for event in seen} == {
        "data", "model", "step", "eval", "checkpoint", "stop"
    }  # fmt: skip


def test_an_interrupt_inside_python_writes_a_checkpoint(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")

    def interrupt(event: dict[str, Any]) -> None:
        if event.get("step") == 9:
            raise KeyboardInterrupt

    with pytest.raises(ferrotune.TrainInterrupted, match="--resume") as caught:
        ferrotune.train("m", tmp_path / "d.txt", tmp_path / "r", on_event=interrupt)
    assert caught.value.output == tmp_path / "r"
    assert (tmp_path / "r/checkpoint/step").read_text() == "9"


def test_an_error_in_on_event_is_raised(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")

    def fail(event: dict[str, Any]) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        ferrotune.train("m", tmp_path / "d.txt", tmp_path / "r", on_event=fail)


def test_generate_streams_and_stops(engine: Any) -> None:
    said: list[str] = []
    result = ferrotune.generate("m", "x", stop=["END"], on_text=lambda text: said.append(text))
    assert result.text == "".join(said) == " def so\non →"
    assert engine[-1][1]["stop"] == ["END"]
    assert engine[-1][1]["top_k"] is None
    assert ferrotune.generate("m", "x", on_text=lambda text: False).tokens == 1


def test_generate_prints_the_prompt_before_its_text_only(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--model", "m", "--prompt", "x"]) == 0
    assert capsys.readouterr().out == "x def so\non →\n"
    assert cli.main(["generate", "--model", "m", "--prompt", "x", "--max-tokens", "0"]) == 0
    assert capsys.readouterr().out == "x\n"
    assert cli.main(["generate", "--model", "missing", "--prompt", "x"]) == 2
    assert capsys.readouterr() == ("", "error: missing: No such file or directory\n")


@pytest.fixture
def demo_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data/demo-model").mkdir(parents=True)
    (tmp_path / "data/kjv.parquet").write_bytes(b"PAR1")
    (tmp_path / "data/docs-heldout.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def test_demo(engine: Any, demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--seconds", "5", "--seed", "3"]) == 0
    sent = next(settings for name, settings in engine if name == "train")
    assert sent["method"] == "qlora"
    assert sent["group"] == "book"
    assert sent["max_seconds"] == 5.0
    assert sent["seed"] == 3
    assert sent["model"] == str(demo_data / "demo-model")
    assert sent["forgetting"] == [str(demo_data / "docs-heldout.parquet")]
    asked = [settings for name, settings in engine if name == "generate"]
    assert [one["adapter"] for one in asked] == [None, None] + ["ferrotune-demo/adapter"] * 2
    assert asked[0]["prompt"] == asked[2]["prompt"]
    output = capsys.readouterr().out
    assert "before And the king said unto def so on → …" in output
    assert "after  And the king said unto and so on → …" in output
    for part in ("held-out loss", "5.580 →", "total time", "ferrotune-demo/curves.png"):
        assert part in output
    assert ferrotune.demo(seconds=5, progress=False).train.output == Path("ferrotune-demo-2")


def test_demo_without_its_data(
    engine: Any, demo_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (demo_data / "kjv.parquet").unlink()
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err.endswith("kjv.parquet: No such file or directory\n")
    assert not Path("ferrotune-demo").exists()
