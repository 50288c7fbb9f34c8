"""The command line as a process: messages, exit codes and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ferrotune
from ferrotune import cli, registry
from ferrotune.config import read_toml
from ferrotune.options import settings_of
from python_face import command, environment, ferrotune_cli, interruptible


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["train"], "train needs --model (or model = … in a --config file)"),
        (["train", "--lerning-rate", "1"], "unknown option '--lerning-rate'; did you mean '--l"),
        (["train", "--r", "x"], "argument --r: wants a whole number, not 'x'"),
        (["train", "--r"], "argument --r: expected one argument"),
        (["train", "--method", "lorra"], "wants one of lora, qlora, ia3,"),
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
        preexec_fn=interruptible,
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
