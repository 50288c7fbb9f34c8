"""The package's top level, the settings, the command line and its exit codes."""

import inspect
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fake_native
import ferrotune
from ferrotune import cli, registry
from ferrotune.config import read_toml, to_toml
from ferrotune.kinds import NO_TABLE, StrPath, StrPaths
from ferrotune.options import Option, SettingError, check, collect, settings_of
from python_face import command, engine, environment, ferrotune_cli

__all__ = ["engine"]


# The package's top level


def test_public_names_exist() -> None:
    for name in ferrotune.__all__:
        if name != "FormatError":  # needs the extension
            assert getattr(ferrotune, name) is not None
    assert ferrotune.eval is ferrotune.evaluate
    assert set(ferrotune.__all__) <= set(dir(ferrotune))
    assert ferrotune.__version__
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        ferrotune.tran  # noqa: B018


def test_import_is_light() -> None:
    code = "import sys, ferrotune; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "matplotlib", "rich", "numpy", "IPython", "argparse"} & set(found)


def test_import_takes_under_100_ms() -> None:
    """Typically under 2 ms; the median of five is generous to a busy machine."""
    times = []
    for _ in range(5):
        lines = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import ferrotune"],
            env=environment(), capture_output=True, text=True, check=True,
        ).stderr.splitlines()  # fmt: skip
        mine = next(line for line in lines if line.split("|")[-1].strip() == "ferrotune")
        times.append(int(mine.split("|")[1]))
    assert statistics.median(times) < 100_000, times


def test_help_needs_neither_extension_nor_heavy_imports() -> None:
    code = (
        "import sys; sys.modules['ferrotune._native'] = None; from ferrotune.cli import main; "
        "code = main([]); "
        "print(code, *{'rich', 'matplotlib', 'numpy', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert "commands:" in done.stdout


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "merge", "demo"])
def test_every_parameter_is_a_setting_and_typed(name: str) -> None:
    function = getattr(ferrotune, name)
    settings = settings_of(function)
    callbacks = {"on_event", "on_text"}
    assert set(inspect.signature(function).parameters) - callbacks == set(settings)
    assert function.__doc__
    for setting in settings.values():
        assert setting.option.help
        assert not setting.option.help.endswith(".")
        if not setting.required:  # a default passes its own check
            assert setting.accept(setting.default) == setting.default


# Settings from a signature


def example(
    path: Annotated[StrPath, Option("a path")],
    paths: Annotated[StrPaths | None, Option("paths")] = None,
    *,
    flag: Annotated[bool, Option("a flag")] = True,
    whole: Annotated[int, Option("a number", unit="steps")] = 3,
    real: Annotated[float | None, Option("a number", unset="no limit")] = None,
    choice: Annotated[Literal["left", "right"], Option("a side")] = "left",
    names: Annotated[str | Sequence[str], Option("names")] = "all-linear",
    table: Annotated[Mapping[str, int], Option("a table")] = NO_TABLE,
    reals: Annotated[Mapping[str, float], Option("a table")] = NO_TABLE,
    stops: Annotated[Sequence[str], Option("texts")] = (),
    hidden: int = 0,
) -> dict[str, Any]:
    """Gives its settings back."""
    return collect(example, locals())


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line of a command `example`, registered for this test; returns its values."""
    seen: dict[str, Any] = {}
    registry.commands()
    monkeypatch.setattr(registry, "_COMMANDS", dict(registry._COMMANDS))
    registry.command(
        "example", examples=("ferrotune example",), run=lambda call: seen.update(call.values)
    )(example)

    def run(*words: object) -> dict[str, Any]:
        seen.clear()
        assert cli.main(["example", *map(str, words)]) == 0
        return dict(seen)

    return run


def test_command_line_values(run_example: Any) -> None:
    assert run_example("--path", "a") == {"path": "a"}
    values = run_example(
        "--path", "a", "--paths", "b", "c", "--no-flag", "--whole", "7", "--real", "1e-3",
        "--choice", "right", "--names", "q_proj", "v_proj", "--table", "a=b=2", "c=3",
        "--reals", "x=0.5", "--stops", "end", "--stops", "fin",
    )  # fmt: skip
    assert values == {
        "path": "a", "paths": ["b", "c"], "flag": False, "whole": 7, "real": 1e-3,
        "choice": "right", "names": ["q_proj", "v_proj"], "table": {"a=b": 2, "c": 3},
        "reals": {"x": 0.5}, "stops": ["end", "fin"],
    }  # fmt: skip
    assert example(**values) == values


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("layers.0.q_proj", ["layers.0.q_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_one_name_is_a_list_and_a_pattern_is_text(
    run_example: Any, word: str, value: object
) -> None:
    assert run_example("--path", "a", "--names", word)["names"] == value


def test_python_values_become_json() -> None:
    values = example(Path("a"), Path("b"), real=1, names=("q",), stops=["x"])
    assert values["path"] == "a"
    assert values["paths"] == ["b"]
    assert type(values["real"]) is float
    assert values["names"] == ["q"]
    assert values["table"] == {}
    assert json.loads(json.dumps(values)) == values
    assert "hidden" not in values


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("path", 3, r"path wants text, not 3 \(a whole number\)"),
        ("flag", 1, r"flag wants true or false, not 1 \(a whole number\)"),
        ("whole", 2.0, r"whole wants a whole number, not 2\.0 \(a number\)"),
        ("whole", True, r"whole wants a whole number, not True \(a boolean\)"),
        ("whole", None, r"whole wants a whole number, not None \(nothing\)"),
        ("real", "fast", r"real wants a number, not 'fast'$"),
        ("real", float("nan"), "real wants a finite number, not nan"),
        ("choice", "lft", "choice wants one of left, right, not 'lft'"),
        ("names", 3, r"names wants a list of texts, not 3"),
        ("table", {"a": 0.5}, r"table wants a whole number, not 0\.5"),
        ("table", [1], r"table wants a table, not \[1\] \(a list\)"),
        ("stops", "x", "stops wants a list of texts, not 'x'"),
    ],
)
def test_a_wrong_type_says_which(name: str, value: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check(example, {name: value})


@pytest.mark.parametrize(
    "wrong", ["lerning_rate", "learning-rate", "Learning_Rate", "learningrate"]
)
def test_an_unknown_key_names_the_nearest(wrong: str) -> None:
    with pytest.raises(SettingError, match="did you mean 'learning_rate'"):
        check(ferrotune.train, {wrong: 1.0}, "x.toml")
    with pytest.raises(SettingError, match=r"x\.toml: unknown setting 'zzz'; known: model, data"):
        check(ferrotune.train, {"zzz": 1.0}, "x.toml")


# TOML

texts = st.text(st.characters(exclude_categories=["Cs"]))
tables = st.dictionaries(texts, st.integers(-(2**63), 2**63 - 1))
values = st.fixed_dictionaries(
    {"path": texts},
    optional={
        "paths": st.lists(texts),
        "flag": st.booleans(),
        "whole": st.integers(-(2**63), 2**63 - 1),
        "real": st.floats(allow_nan=False, allow_infinity=False),
        "choice": st.sampled_from(["left", "right"]),
        "names": texts | st.lists(texts),
        "table": tables,
        "reals": st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False)),
        "stops": st.lists(texts),
    },
)


@given(values)
def test_toml_round_trip(values: dict[str, Any]) -> None:
    complete = collect(example, values)
    text = to_toml(complete, "written\nby a test")
    assert text.startswith("# written\n# by a test\n")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    assert collect(example, check(example, tomllib.loads(text), "x.toml")) == complete


def test_the_command_line_wins_over_toml(run_example: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('path = "t"\nwhole = 5\nstops = ["a"]\n[table]\nx = 1\n')
    found = run_example("--config", file, "--whole", "6", "--stops", "b")
    assert found == {"path": "t", "whole": 6, "stops": ["b"], "table": {"x": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model = 3", "model wants text, not 3"),
        (b"modle = 'x'", "unknown setting 'modle'; did you mean 'model'?"),
        (b"batch_size = 'a'", "batch_size wants a whole number, not 'a'"),
        (b"on_event = 'x'", "unknown setting 'on_event'"),
        (b"model = \n", "not TOML: Invalid value (at line 1, column 9)"),
        (b"\xff", "not UTF-8 at byte 0"),
    ],
)
def test_bad_config_files(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    assert cli.main(["train", "--config", str(file)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"error: {file}: {message}")


def test_a_missing_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(tmp_path / "no.toml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/no.toml: No such file or directory\n"


# The command line as a process


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["train"], "train needs --model (or model = … in a --config file)"),
        (["train", "--lerning-rate", "1"], "unknown option '--lerning-rate'; did you mean '--l"),
        (["train", "--r", "x"], "argument --r: wants a whole number, not 'x'"),
        (["train", "--r"], "argument --r: expected one argument"),
        (["train", "--method", "lorra"], "wants one of lora, qlora, full, not 'lorra'"),
        (["train", "stray"], "unexpected argument 'stray'"),
        (["--versoin"], "unknown option '--versoin'; did you mean '--version'?"),
        (["train", "--rank-pattern", "q"], "wants NAME=N, not 'q'"),
    ],
)
def test_bad_command_lines(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("missing", 2, "models/missing: No such file or directory"),
        ("directory", 2, "models/directory: Is a directory"),
        ("file", 2, "models/file: Not a directory"),
        ("forbidden", 2, "models/forbidden: Permission denied"),
        ("broken", 2, "models/broken/model.safetensors: truncated at byte 12"),
        ("value", 2, "r is 0; it must be at least 1"),
        ("unsupported", 2, "architecture GPT2LMHeadModel: no code for it"),
        ("diverged", 1, "the loss is not finite at step 7"),
        ("full-disk", 1, "run/checkpoint: No space left on device"),
        ("bug", 1, "KeyError: 'somewhere' (--debug shows where)"),
    ],
)
def test_exit_codes(kind: str, code: int, message: str, tmp_path: Path) -> None:
    words = ["train", "--model", f"models/{kind}", "--data", "d.txt", "--output", "run"]
    done = ferrotune_cli(*words, "--no-progress", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {message}\n")
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = ferrotune_cli("eval", "--model", "value", "--data", "d", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("\nerror: r is 0; it must be at least 1\n")


def test_a_failed_run_keeps_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    words = ["train", "--model", "late-full-disk", "--data", "d.txt", "--output", "run"]
    done = ferrotune_cli(*words, "--checkpoint-every", 50, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: run/checkpoint: No space left on device"
    assert (tmp_path / "run/checkpoint/step").read_text() == "50"
    assert read_toml(tmp_path / "run/config.toml")["checkpoint_every"] == 50


def test_version_and_help(tmp_path: Path) -> None:
    version = ferrotune_cli("--version").stdout
    assert version in (f"ferrotune {ferrotune.__version__}\n", "ferrotune 0.0.0\n")
    alone = ferrotune_cli()
    assert alone.returncode == 0
    for name, found in registry.commands().items():
        assert name in alone.stdout
        shown = ferrotune_cli(name, "--help", COLUMNS="200")
        assert shown.returncode == 0
        for setting in settings_of(found.function).values():
            assert setting.flag in shown.stdout
            assert setting.default_text() in shown.stdout or setting.required
            assert setting.option.unit in shown.stdout
        assert found.examples[0] in shown.stdout
    module = subprocess.run(
        [sys.executable, "-m", "ferrotune", "--help"],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "commands:" in module.stdout


def test_every_example_of_the_help_parses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shlex

    from ferrotune.parser import build_parser

    for found in registry.commands().values():
        assert found.examples
        for line in found.examples:
            program, *words = shlex.split(line)
            assert program == "ferrotune"
            assert build_parser(registry.commands()).parse_args(words).command == found.name


def test_train_and_run_again_and_resume(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    words = ["train", "--model", "m", "--data", "d.txt", "--output", "run"]
    done = ferrotune_cli(*words, "--learning-rate", "0.003", "--seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "5.580 →" in done.stdout
    again = ferrotune_cli(*words, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: run is not empty: ")

    config = tmp_path / "run/config.toml"
    repeated = ferrotune_cli("train", "--config", "run/config.toml", "--json", cwd=tmp_path)
    assert "run holds a run already: writing run-2" in repeated.stderr
    assert json.loads(repeated.stdout)["output"] == "run-2"
    first, second = read_toml(config), read_toml(tmp_path / "run-2/config.toml")
    assert {**first, "output": ""} == {**second, "output": ""}
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (
        tmp_path / "run-2/metrics.jsonl"
    ).read_bytes()

    nothing = ferrotune_cli("train", "--config", "run/config.toml", "--resume", cwd=tmp_path)
    assert nothing.returncode == 2
    assert "run has no checkpoint to resume from" in nothing.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    words = ["train", "--model", "slow", "--data", "d.txt", "--output", "run", "--max-steps", 3000]
    process = subprocess.Popen(
        command(*words, "--checkpoint-every", 20),
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/checkpoint/step").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    hint = "ferrotune train --config run/config.toml --resume"
    assert stderr.splitlines()[-1] == (
        f"interrupted: a checkpoint is in run/checkpoint; go on with: {hint}"
    )
    step = int((tmp_path / "run/checkpoint/step").read_text())
    resumed = ferrotune_cli(*hint.split()[1:], "--max-steps", step + 10, "--json", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == step + 10
    assert (tmp_path / "run/curves.png").exists()


# The functions


def test_train_sends_every_setting(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    result = ferrotune.train("m", tmp_path / "d.txt", tmp_path / "run", progress=False)
    name, sent = engine[-1]
    assert name == "train"
    assert set(sent) == set(settings_of(ferrotune.train)) - {"progress"}
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


def test_eval_generate_merge(tmp_path: Path) -> None:
    done = ferrotune_cli("eval", "--model", "m", "--data", "a", "b", "--quant-type", "nf4")
    assert "2.0000 nats per token" in done.stdout
    assert "1.250" in done.stdout
    found = json.loads(ferrotune_cli("eval", "--model", "m", "--data", "a", "--json").stdout)
    assert found["loss"] == 2.0

    done = ferrotune_cli("generate", "--model", "m", "--prompt", "Once")
    assert done.stdout == "Once def so\non →\n"
    assert done.stderr == "3 tokens in 0.1 s, 30 tokens/s\n"
    found = json.loads(ferrotune_cli("generate", "--model", "m", "--prompt", "x", "--json").stdout)
    assert found["text"] == " def so\non →"

    words = ["merge", "--model", "m", "--adapter", "a", "--output", "merged"]
    assert "28" in ferrotune_cli(*words, cwd=tmp_path).stdout
    (tmp_path / "merged/x").write_text("")
    again = ferrotune_cli(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: merged is not empty")


def test_generate_streams_and_stops(engine: Any) -> None:
    said: list[str] = []
    result = ferrotune.generate("m", "x", stop=["END"], on_text=lambda text: said.append(text))
    assert result.text == "".join(said) == " def so\non →"
    assert engine[-1][1]["stop"] == ["END"]
    assert engine[-1][1]["top_k"] is None
    assert ferrotune.generate("m", "x", on_text=lambda text: False).tokens == 1


def test_output_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    done = ferrotune_cli("generate", "--model", "m", "--prompt", "é", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "? def so\non ?\n")


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_a_closed_pipe_is_no_traceback(word: str) -> None:
    with subprocess.Popen(
        command(word),
        env=environment(PYTHONUNBUFFERED=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.fixture
def demo_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data/demo-model").mkdir(parents=True)
    (tmp_path / "data/kjv.parquet").write_bytes(b"PAR1")
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
    asked = [settings for name, settings in engine if name == "generate"]
    assert [one["adapter"] for one in asked] == [None, None] + ["ferrotune-demo/adapter"] * 2
    assert asked[0]["prompt"] == asked[2]["prompt"]
    output = capsys.readouterr().out
    assert "And the king said unto def so / on" in output
    assert "And the king said unto and so / on" in output
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
