"""Settings from a signature, from the command line and from TOML."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ferrotune
from ferrotune import cli, registry
from ferrotune.config import to_toml
from ferrotune.kinds import NO_TABLE, StrPath, StrPaths
from ferrotune.options import Option, SettingError, check, collect


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
        ("whole", -1, r"whole wants a whole number from 0 to 2\^63 - 1, not -1"),
        ("whole", 2**63, r"from 0 to 2\^63 - 1, not 9223372036854775808"),
        ("table", {"a": -1}, r"table wants a whole number from 0"),
        ("path", "", r"path wants a path, not ''"),
        ("paths", ["a", ""], r"paths wants a path, not ''"),
        ("paths", 3, r"paths wants a path or a list of paths, not 3"),
        ("stops", ["a\udcff"], r"stops wants text that UTF-8 can hold, not 'a\\udcff'"),
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
paths = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
whole = st.integers(0, 2**63 - 1)
tables = st.dictionaries(texts, whole)
values = st.fixed_dictionaries(
    {"path": paths},
    optional={
        "paths": st.lists(paths),
        "flag": st.booleans(),
        "whole": whole,
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
