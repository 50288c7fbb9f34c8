"""Corpora to start the fuzz targets from: real files, small enough to be changed quickly.

    python tests/fuzz/seeds.py

writes tests/fuzz/corpus/<target>/, in the form that each target reads. It needs pyarrow, torch,
peft, bitsandbytes and trl.
"""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

FUZZ = Path(__file__).parent
TYPES = {"uint8": 0, "float32": 1, "float16": 2, "bfloat16": 3, "int64": 4}
NAMES = (
    "", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4",
)  # fmt: skip


def tables() -> Iterator[pa.Table]:
    talk = [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "Yes."}]
    yield pa.table({"text": ["One.", "Two, and\nmore.", ""], "label": ["a", "b", "a"]})
    yield pa.table({"prompt": ["1 + 1 =", "Name:"], "completion": [" 2", " Zoë"]})
    yield pa.table({"messages": [talk, talk[:1]], "tools": ["[]", None]})


def readers() -> Iterator[bytes]:
    """The extension and the packing by number, then the file."""
    packings = (bytes, gzip.compress, lambda content: pa.compress(content, "zstd", asbytes=True))
    for table in tables():
        arrow, parquet, feather = io.BytesIO(), io.BytesIO(), io.BytesIO()
        pyarrow.parquet.write_table(table, parquet, compression="zstd")
        with pa.ipc.new_file(arrow, table.schema) as writer:
            writer.write_table(table)
        with pa.ipc.new_stream(feather, table.schema) as writer:
            writer.write_table(table)
        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
        files = {1: lines, 4: parquet.getvalue(), 5: arrow.getvalue()}
        if "messages" not in table.column_names:
            csv = io.BytesIO()
            pyarrow.csv.write_csv(table, csv)
            files[2] = csv.getvalue()
            files[3] = csv.getvalue().replace(b",", b"\t")
            files[0] = "\n\n".join(map(str, table.to_pylist())).encode()
        for extension, content in files.items():
            for packing, pack in enumerate(packings):
                yield bytes([extension + 6 * packing]) + pack(content)
        yield bytes([5]) + feather.getvalue()


def chat_templates() -> Iterator[bytes]:
    import trl

    for path in sorted(Path(trl.__file__).parent.rglob("*.jinja")):
        yield path.read_bytes()


def adapters() -> Iterator[bytes]:
    """adapter_config.json, a NUL, adapter_model.safetensors."""
    import torch
    from peft import LoraConfig, get_peft_model

    for settings in (
        {"r": 2},
        {"r": 2, "use_rslora": True, "rank_pattern": {"up": 1}, "alpha_pattern": {"^up": 3}},
        {"r": 1, "bias": "all", "init_lora_weights": False},
    ):
        layers = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "up": torch.nn.Linear(4, 2)})
        model = get_peft_model(layers, LoraConfig(target_modules=["q_proj", "up"], **settings))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config, weights = (
                (Path(folder) / name).read_bytes()
                for name in ("adapter_config.json", "adapter_model.safetensors")
            )
        yield config + b"\0" + weights


def quant_states() -> Iterator[bytes]:
    """Of each tensor its type, its length as two bytes and its bytes."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    for double in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.linspace(-1, 1, 256 * 3).reshape(12, 64).to(dtype)
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
            saved: dict[str, Any] = {"": packed, **state.as_dict(packed=True)}
            parts = []
            for name in NAMES:
                tensor = saved.get(name)
                content = b"" if tensor is None else tensor.view(torch.uint8).numpy().tobytes()
                kind = 0 if tensor is None else TYPES[str(tensor.dtype).removeprefix("torch.")]
                parts.append(bytes([kind]) + len(content).to_bytes(2, "little") + content)
            yield b"".join(parts)


def main() -> None:
    for target in (readers, chat_templates, adapters, quant_states):
        folder = FUZZ / "corpus" / target.__name__
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(target()):
            (folder / f"seed-{number:02}").write_bytes(content)
        print(f"{folder}: {len(list(folder.iterdir()))} files")


if __name__ == "__main__":
    main()
