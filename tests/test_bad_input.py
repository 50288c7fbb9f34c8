"""Bad input through the command line: one clear line, the right exit code, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamas import edit_config
from refusals import made, refused_and_unwritten, run, train, work
from texts import BOS, EOS, lines

__all__ = ["made", "work"]

pytest.importorskip("torch")
pytest.importorskip("transformers")

MODULES = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


def test_the_good_run_is_good(work: Path) -> None:
    """What the others break."""
    found = train(work)
    assert found.returncode == 0, found.stderr
    assert (work / "run" / "adapter" / "adapter_model.safetensors").is_file()


# The model


def test_a_missing_model_folder(work: Path) -> None:
    refused_and_unwritten(work, "nowhere", "No such file or directory", more=("--model", "nowhere"))


def test_a_model_that_is_a_file(work: Path) -> None:
    refused_and_unwritten(
        work, "base/config.json", "Not a directory", more=("--model", "base/config.json")
    )


def test_missing_weights(work: Path) -> None:
    (work / "base" / "model.safetensors").unlink()
    refused_and_unwritten(work, "base", "missing model.safetensors", "config.json, ")


@pytest.mark.parametrize("command", ["train", "eval", "generate", "merge"])
def test_truncated_weights(command: str, work: Path) -> None:
    path = work / "base" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    words: dict[str, tuple[object, ...]] = {
        "train": (),
        "eval": ("--model", "base", "--data", "data.jsonl", "--sequence-length", 48),
        "generate": ("--model", "base", "--prompt", "and"),
        "merge": ("--model", "base", "--adapter", "adapter", "--output", "merged"),
    }
    if command == "merge":
        import numpy as np

        from ferrotune import _native

        pair = (np.zeros((2, 48), np.float32), np.zeros((48, 2), np.float32))
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        modules = {f"model.layers.{at}.self_attn.q_proj": pair for at in (0, 1)}
        _native.write_adapter(work / "adapter", json.dumps(config), modules)
    line = refused_and_unwritten(
        work,
        "base/model.safetensors",
        "truncated",
        str(len(whole) // 2),
        str(len(whole)),
        more=words[command],
        command=command,
    )
    assert "copy or download it again" in line


@pytest.mark.parametrize("length", [0, 5, 100])
def test_weights_truncated_in_the_header(length: int, work: Path) -> None:
    path = work / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused_and_unwritten(work, "base/model.safetensors", "truncated")


def test_weights_that_are_something_else(work: Path) -> None:
    (work / "base" / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    refused_and_unwritten(work, "base/model.safetensors", "not a safetensors file")


def test_a_missing_shard(work: Path) -> None:
    shard = sorted((work / "sharded").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused_and_unwritten(
        work, "model.safetensors.index.json", shard.name, "missing", more=("--model", "sharded")
    )


def edit_weights(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_missing_tensor(work: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(work / "base" / "model.safetensors", lambda tensors: tensors.__delitem__(name))
    refused_and_unwritten(work, "base", f"no tensor '{name}'", "among them model.layers")


def test_a_tensor_of_another_shape(work: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def cut(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][:-1].copy()

    edit_weights(work / "base" / "model.safetensors", cut)
    refused_and_unwritten(work, "model.safetensors", name, "[79, 48]", "[80, 48]")


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "architectures",
    ],
)
def test_a_config_without_a_needed_field(field: str, work: Path) -> None:
    edit_config(work / "base", [field])
    refused_and_unwritten(work, "base/config.json", f"missing field '{field}'")


def test_a_rope_scaling_without_a_needed_field(work: Path) -> None:
    edit_config(
        work / "base", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    )
    refused_and_unwritten(
        work, "base/config.json", "missing field 'rope_parameters.low_freq_factor'"
    )


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", "LlamaForCausalLM"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            ["rope type 'yarn'", "default, linear and llama3"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act", "silu", "gelu"]),
        ({"hidden_size": "many"}, ["hidden_size", "a whole number", "many"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor of num_attention_heads"]),
    ],
)
def test_a_config_that_is_not_ours(change: dict[str, Any], parts: list[str], work: Path) -> None:
    edit_config(work / "base", **change)
    refused_and_unwritten(work, "base/config.json", *parts)


def test_a_config_that_is_no_json(work: Path) -> None:
    path = work / "base" / "config.json"
    path.write_text(path.read_text()[:-20])
    refused_and_unwritten(work, "base/config.json", "not valid JSON", "line ", "column ")


def test_a_missing_config(work: Path) -> None:
    (work / "base" / "config.json").unlink()
    refused_and_unwritten(work, "base", "missing config.json", "model.safetensors")


def test_a_missing_tokenizer(work: Path) -> None:
    (work / "base" / "tokenizer.json").unlink()
    refused_and_unwritten(work, "base", "tokenizer.json")


def test_a_broken_tokenizer(work: Path) -> None:
    (work / "base" / "tokenizer.json").write_text("{}")
    refused_and_unwritten(work, "base/tokenizer.json", "not a tokenizer")


def test_a_tokenizer_with_more_tokens_than_the_embedding(work: Path) -> None:
    from tokenizers import Tokenizer

    path = str(work / "base" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([f"<extra {at}>" for at in range(1000)])
    tokenizer.save(path)
    rows = json.loads((work / "base" / "config.json").read_text())["vocab_size"]
    refused_and_unwritten(work, "tokenizer.json has tokens up to id", f"embedding has {rows} rows")


# The data


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv"])
def test_an_empty_file(name: str, work: Path) -> None:
    (work / name).write_text("")
    refused_and_unwritten(work, name, "no record", more=("--data", name))


def test_a_one_line_file(work: Path) -> None:
    """One record cannot be both trained on and held out."""
    (work / "one.txt").write_text("and the house of the king\n")
    line = refused_and_unwritten(
        work, "cannot be split", "only one record", more=("--data", "one.txt")
    )
    assert "heldout_data" in line


def test_one_line_with_held_out_files_is_enough(work: Path) -> None:
    (work / "one.txt").write_text("and the house of the king\n")
    found = train(work, "--data", "one.txt", "--heldout-data", "data.jsonl")
    assert found.returncode == 0, found.stderr


def test_a_missing_data_file(work: Path) -> None:
    refused_and_unwritten(
        work, "gone.jsonl", "No such file or directory", more=("--data", "data.jsonl", "gone.jsonl")
    )


def test_an_unknown_kind_of_file(work: Path) -> None:
    (work / "data.docx").write_text("text")
    refused_and_unwritten(
        work, "data.docx", ".jsonl", ".csv", ".parquet", ".txt", more=("--data", "data.docx")
    )


@pytest.mark.parametrize(
    ("line", "column"),
    [('{"text": "and" "the"}', 16), ('{"text": "and"', 14), ("and the", 1), ('{"text": tru}', 13)],
)
def test_a_json_line_that_does_not_parse(line: str, column: int, work: Path) -> None:
    path = work / "broken.jsonl"
    good = [json.dumps({"text": text}) for text in lines(6)]
    path.write_text("\n".join([*good[:3], line, *good[3:]]) + "\n")
    refused_and_unwritten(
        work, "broken.jsonl", "line 4", f"column {column}", more=("--data", "broken.jsonl")
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_missing_column_names_those_there(suffix: str, work: Path) -> None:
    rows = [{"body": text, "author": "x"} for text in lines(8)]
    path = work / f"other.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        path.write_text("body,author\n" + "".join(f"{row['body']},x\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    parts = ["`body`", "`author`"]
    refused_and_unwritten(work, path.name, "`text`", *parts, more=("--data", path.name))
    refused_and_unwritten(
        work, path.name, "`story`", *parts, more=("--data", path.name, "--text-column", "story")
    )
    assert (
        train(work, "--data", path.name, "--text-column", "body", "--heldout", 0.3).returncode == 0
    )


def word_tokenizer(folder: Path) -> None:
    """A tokenizer that has no token for unknown words and no bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *sorted({word for text in lines(40) for word in text.split()})]
    tokenizer = Tokenizer(
        models.BPE({word: at for at, word in enumerate(words)}, [], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    assert words.index("<s>") == BOS
    assert words.index("</s>") == EOS


def test_text_that_the_tokenizer_cannot_encode_is_skipped_and_counted(work: Path) -> None:
    word_tokenizer(work / "base")
    with (work / "data.jsonl").open("a") as file:
        for text in ("ὦ φίλος", "日本", "ζωή"):
            file.write(json.dumps({"text": text}) + "\n")
    found = train(work)
    assert found.returncode == 0, found.stderr
    data = json.loads((work / "run" / "results.json").read_text())["result"]["data"]
    assert data["skipped_total"] == 3
    assert data["records"] == 40
    assert [skip["record"] for skip in data["skipped"]] == [41, 42, 43]
    assert all(
        "data.jsonl" in skip["file"] and "tokenizer" in skip["reason"] for skip in data["skipped"]
    )
    assert "3 skipped, first data.jsonl:41: the tokenizer gives no tokens for it" in found.stderr


def test_an_evaluation_tells_what_it_skips_and_measures_the_rest(work: Path) -> None:
    word_tokenizer(work / "base")
    words = ("eval", "--model", "base", "--data", "data.jsonl", "--sequence-length", 48, "--json")
    clean = json.loads(run(work, *words).stdout)
    assert clean["skipped"] == 0
    with (work / "data.jsonl").open("a") as file:
        file.write('{"text": "ὦ φίλος"}\n{"text": ""}\n')
    found = run(work, *words)
    line = "warning: 40 records are read; 2 skipped, such as data.jsonl, record 41: the tokenizer"
    assert line in found.stderr
    rest = json.loads(found.stdout)
    assert rest["skipped"] == 2
    assert [rest[name] for name in ("loss", "bits_per_byte", "tokens")] == [
        clean[name] for name in ("loss", "bits_per_byte", "tokens")
    ]
    cut = run(work, *words[:5], "--sequence-length", 4, "--no-packing", "--json")
    assert "40 records are read, 38 of them cut to sequence_length" in cut.stderr
    assert json.loads(cut.stdout)["bits_per_byte"] is None


def test_data_that_the_tokenizer_cannot_encode_at_all(work: Path) -> None:
    word_tokenizer(work / "base")
    (work / "data.jsonl").write_text(
        "".join(json.dumps({"text": "λ" * n}) + "\n" for n in range(1, 9))
    )
    refused_and_unwritten(
        work, "no trained token", "skipped", "data.jsonl, record", "the tokenizer gives no tokens"
    )


# The settings


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--r", 0), ["r must be at least 1, not 0"]),
        (("--rank-pattern", "q_proj=0"), ["rank_pattern", "q_proj", "at least 1"]),
        (("--target-modules", "query"), ["query", MODULES, "model.layers.0.self_attn.q_proj"]),
        (("--target-modules", ".*query.*"), [".*query.*", MODULES]),
        (("--target-modules", "(q_proj"), ["target_modules", "(q_proj"]),
        (("--group", "author"), ["data.jsonl", "no column `author`", "are: `text`"]),
        (("--target-modules", "model.norm"), ["model.norm", "not a linear layer"]),
        (
            ("--sequence-length", 97),
            ["sequence_length 97", "96 positions", "max_position_embeddings"],
        ),
        (("--sequence-length", 1), ["sequence_length", "at least 2"]),
        (("--batch-size", 0), ["batch_size must be at least 1, not 0"]),
        (("--lora-dropout", 1), ["lora_dropout", "below 1"]),
        (("--learning-rate", "nan"), ["--learning-rate", "finite", "nan"]),
        (("--learning-rate", 0), ["learning_rate", "above 0"]),
        (("--heldout", 1), ["heldout", "below 1"]),
        (("--blocksize", 48), ["blocksize", "48"]),
        (("--threads", 0), ["threads must be from 1 to 1024, not 0"]),
        (("--threads", 100_000), ["threads must be from 1 to 1024, not 100000"]),
        (("--epochs", "1e30"), ["epochs must be above 0 and at most 1e6"]),
        (("--method", "dora"), ["dora", "lora", "qlora", "full"]),
        (("--method", "ia3", "--feedforward-modules", "up_proj"), ["feedforward_modules", "none"]),
        (("--method", "prompt", "--num-virtual-tokens", 0), ["num_virtual_tokens", "not 0"]),
        (("--method", "prefix", "--num-virtual-tokens", 90), ["num_virtual_tokens 90", "the 96"]),
        (("--method", "adapter", "--reduction-factor", 0), ["reduction_factor", "not 0"]),
        (("--quant-type", "int4"), ["int4", "nf4", "fp4"]),
        (("--max-step", 3), ["--max-step", "--max-steps"]),
        (("--seed", "one"), ["seed", "one"]),
        (("--seed", -1), ["seed", "from 0", "-1"]),
        (("--max-steps", 10**20), ["max-steps", "2^63 - 1", str(10**20)]),
        (("--output", ""), ["output wants a path, not ''"]),
        (("--data", ""), ["data wants a path, not ''"]),
    ],
)
def test_settings_that_cannot_be_used(
    more: tuple[object, ...], parts: list[str], work: Path
) -> None:
    refused_and_unwritten(work, *parts, more=more)


def test_a_misspelt_config_key(work: Path) -> None:
    (work / "run.toml").write_text('learning_rat = 1e-3\nmethod = "lora"\n')
    refused_and_unwritten(
        work, "run.toml", "learning_rat", "learning_rate", more=("--config", "run.toml")
    )


def test_a_config_file_that_is_no_toml(work: Path) -> None:
    (work / "run.toml").write_text("r = \n")
    refused_and_unwritten(work, "run.toml", "line 1", more=("--config", "run.toml"))
    for text, expected in (
        ("r = " + "[" * 100_000, "nested too deeply"),
        ("r = " + "{a=" * 100_000, "nested too deeply"),
        ("a." * 100_000 + "r = 1", "nested too deeply"),
        ("[" + '"a" . ' * 100_000 + "r]", "nested too deeply"),
        ("#" * (1 << 20) + "\n", "larger than 1 MiB"),
        ("r = 1\0", "not TOML"),
    ):
        (work / "run.toml").write_text(text)
        refused_and_unwritten(work, "run.toml", expected, more=("--config", "run.toml"))


def test_an_output_that_is_taken(work: Path) -> None:
    (work / "run").mkdir()
    (work / "run" / "thesis.tex").write_text("important")
    refused_and_unwritten(work, "run", "not empty")


def test_nothing_to_resume(work: Path) -> None:
    refused_and_unwritten(work, "run", "no checkpoint", more=("--resume",))
