"""Data from memory and from packed files, and `ferrotune split`."""

import csv
import datetime
import decimal
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import ferrotune
from ferrotune.frames import named

TEXTS = [f"Record {number} says {word * 3}." for number, word in enumerate(["ab", "cd", "ef"] * 20)]
LABELS = [number % 3 for number in range(60)]


def _read(folder: Path) -> list[dict[str, Any]]:
    lines = [
        line
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [json.loads(line) for line in lines]


def _sides(data: Any, folder: Path, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    result = ferrotune.split(data, folder, heldout=0.2, near_duplicates=0.0, **settings)
    assert sum(one.records for one in result.files) == 60
    return {
        one.side: [json.loads(line) for line in one.path.read_text().splitlines()]
        for one in result.files
    }


def _pandas() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"text": TEXTS, "label": LABELS})


def _polars() -> Any:
    polars = pytest.importorskip("polars")
    return polars.DataFrame({"text": TEXTS, "label": LABELS})


def _dataset() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    return datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS}, features=features)


def _selected() -> Any:
    """A data set whose table is in another order than its records."""
    data = _dataset()
    return data.select(range(59, -1, -1)).select(range(59, -1, -1))


def _arrow() -> Any:
    return pa.table({"text": TEXTS, "label": LABELS})


@pytest.mark.parametrize("make", [_pandas, _polars, _dataset, _selected, _arrow])
def test_a_table_in_memory_is_read_as_its_file_is(make: Any, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    expected = _sides(file, tmp_path / "file")
    assert _sides(make(), tmp_path / "table") == expected
    assert {row["label"] for row in expected["heldout"]} == {0, 1, 2}
    assert len(expected["heldout"]) == 12


def _columns() -> dict[str, list[Any]]:
    """Columns of every kind, none of which a split reads but the first two."""
    day = datetime.datetime(2024, 2, 29, 12, 30, 15)
    return {
        "body": [f'Line {number}, "quoted"\nand broken' for number in range(8)],
        "kind": ["a", "b"] * 4,
        "text": [f"not read {number}" for number in range(8)],
        "région": ["nord", "süd", None, ""] * 2,
        "number": [*range(7), 2**53 + 1],
        "share": [0.1, float("nan"), 1e300, -0.5, 2.0, 3.0, 4.0, 5.0],
        "true": [True, False] * 4,
        "list": [[1, 2], [], None, [3]] * 2,
        "object": [{"x": 1, "y": "é"}] * 8,
        "when": [day] * 8,
        "day": [day.date()] * 8,
        "price": [decimal.Decimal("1.50")] * 8,
        "bytes": [b"\x00\xff"] * 8,
    }


def _split_whole(data: Any, folder: Path) -> list[dict[str, Any]]:
    """The records of all sides in their own order."""
    ferrotune.split(
        data, folder, text_column="body", label_column="kind", heldout=0.25, test=0.25,
        near_duplicates=0.0,
    )  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == [
        "heldout.jsonl", "test.jsonl", "train.jsonl",
    ]  # fmt: skip
    return sorted(_read(folder), key=lambda row: str(row["body"]))


def test_every_column_survives_a_split(tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    columns = _columns()
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    plain = {"when": "2024-02-29T12:30:15", "day": "2024-02-29", "price": 1.5, "bytes": "00ff"}
    expected = [
        {**row, **plain, "share": None if row["share"] != row["share"] else row["share"]}
        for row in rows
    ]
    table = pa.table(columns)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert _split_whole(tmp_path / name, tmp_path / f"{name}-parts") == expected, name
    assert _split_whole(table, tmp_path / "table-parts") == expected
    # Lines of JSON stay as they are, digit by digit.
    lines = [json.dumps({**row, "digits": 0}).replace('"digits": 0', '"digits": 1.10')
             for row in expected]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    _split_whole(tmp_path / "a.jsonl", tmp_path / "lines")
    parts = [path.read_text(encoding="utf-8") for path in (tmp_path / "lines").iterdir()]
    assert sorted("".join(parts).splitlines()) == sorted(lines)
    # What is in a .csv file is text.
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as csv_file:
        writer = csv.DictWriter(csv_file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
    found = _split_whole(tmp_path / "a.csv", tmp_path / "csv-parts")
    texts = [{name: "" if value is None else str(value) for name, value in row.items()}
             for row in rows]  # fmt: skip
    assert found == texts


def test_a_column_named_later_is_there(tmp_path: Path) -> None:
    """A group's column that the split was not told of can be compared by a run on its parts."""
    rows = [{"text": text, "label": label, "region": "ns"[label % 2]}
            for text, label in zip(TEXTS, LABELS, strict=True)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = ferrotune.split(tmp_path / "a.jsonl", tmp_path / "out", near_duplicates=0.0).files[0]
    again = ferrotune.split(
        first.path, tmp_path / "again", group="region", heldout=0.4, near_duplicates=0.0
    )
    sides = [{row["region"] for row in _read_side(one.path)} for one in again.files]
    assert sorted(map(sorted, sides)) == [["n"], ["s"]]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_two_columns_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    (tmp_path / "a.csv").write_text("text,x,x\na,1,2\nb,3,4\n")
    table = pa.table([["a", "b"], [1, 2], [3, 4]], names=["text", "x", "x"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the column `x` is there more than once"):
        ferrotune.split(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tables_and_files_together(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("One of a file.\n\nAnother of it.\n")
    result = ferrotune.split([file, _arrow(), _arrow()], tmp_path / "out", near_duplicates=0.0)
    texts = [row["text"] for row in _read(tmp_path / "out")]
    assert len(texts) == 122
    assert sum(one.texts for one in result.files) == 62


def test_messages_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "é" * n}]
        for n in range(1, 9)
    ]
    data = datasets.Dataset.from_dict({"messages": rows})
    ferrotune.split(data, tmp_path / "out", near_duplicates=0.0)
    found = [row["messages"] for row in _read(tmp_path / "out")]
    assert sorted(map(str, found)) == sorted(map(str, rows))


def test_buffers_are_shared() -> None:
    """The strings of a table are where they were: no copy is handed over."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    tables: dict[str, Any] = {}
    assert named(data, tables) == ["<datasets.Dataset 1>"]
    (table,) = tables.values()
    own = data.data.table.column("text").chunk(0).buffers()[2].address
    assert table.column("text").chunk(0).buffers()[2].address == own


def test_what_is_not_in_memory_says_so(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    with pytest.raises(TypeError, match=r"data is a DatasetDict: give one of its splits \('train'"):
        ferrotune.split(datasets.DatasetDict({"train": data}), tmp_path / "out")
    with pytest.raises(TypeError, match="whose records are not in memory"):
        ferrotune.split(data.to_iterable_dataset(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"<datasets\.Dataset 1>: no column `text`"):
        ferrotune.split(data.rename_column("text", "body"), tmp_path / "out")
    with pytest.raises(ValueError, match="was a table in memory"):
        ferrotune.split("<datasets.Dataset 1>", tmp_path / "out")


def test_split_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ferrotune import cli

    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    words = ["split", "--data", tmp_path / "a.jsonl", "--heldout", "0.2", "--test", "0.1"]
    words += ["--near-duplicates", "0", "--output", tmp_path / "out"]
    assert cli.main([str(word) for word in words]) == 0
    shown = capfd.readouterr().out
    assert "heldout" in shown
    assert "12 records (20.0%)" in shown
    assert "6 records (10.0%)" in shown
    assert cli.main([str(word) for word in words]) != 0
    assert "is not empty" in capfd.readouterr().err


def test_near_duplicates_stay_together(tmp_path: Path) -> None:
    rows = [
        f"{TEXTS[number]} And so on, until the end of it{'!' * copy}"
        for number in range(30)
        for copy in (0, 1)
    ]
    (tmp_path / "a.txt").write_text("\n\n".join(rows))
    ferrotune.split(tmp_path / "a.txt", tmp_path / "out", heldout=0.3, near_duplicates=1.0)
    held = {row["text"].rstrip("!") for row in _read_side(tmp_path / "out/heldout.jsonl")}
    trained = {row["text"].rstrip("!") for row in _read_side(tmp_path / "out/train.jsonl")}
    assert held
    assert not held & trained


def _read_side(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_on_conversations_in_memory(tmp_path: Path) -> None:
    """From a data set of messages through the model's own chat template to an adapter."""
    datasets = pytest.importorskip("datasets")
    model = tmp_path / "model"
    shutil.copytree(Path(ferrotune.__file__).parent / "data/demo-model", model)
    template = (
        "{% for message in messages %}{{ message.role }}: {% generation %}"
        "{{ message.content }}{% endgeneration %}\n{% endfor %}"
    ).replace("{% generation %}", "{% if message.role == 'assistant' %}{% generation %}")
    template = template.replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    rows = [
        [{"role": "user", "content": f"Say {text}"}, {"role": "assistant", "content": text}]
        for text in TEXTS
    ]
    rows.append([{"role": "user", "content": "Nobody answers."}])
    data = datasets.Dataset.from_dict({"messages": rows})
    settings: dict[str, Any] = {"near_duplicates": 0.0, "progress": False}
    output = tmp_path / "run"
    result = ferrotune.train(
        model, data, output, max_steps=2, batch_size=2, heldout=0.2, warmup_steps=0, **settings
    )
    assert result.data["train_records"] == 48
    assert result.data["heldout_records"] == 12
    skipped = result.data["skipped"][0]
    assert "<datasets.Dataset 1>" in skipped["file"]
    assert skipped["record"] == 61
    assert "no turn of an assistant" in skipped["reason"]
    assert "<datasets.Dataset 1>" in (output / "config.toml").read_text()
    assert "from tables in memory" in (output / "README.md").read_text()
    measured = ferrotune.evaluate(model, data, result.adapter, progress=False)
    assert measured.tokens > 0
    assert measured.bits_per_byte is None
