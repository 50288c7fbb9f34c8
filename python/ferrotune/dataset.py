"""Prepared data for PyTorch: rows with document boundaries, for transformers' and TRL's trainers.

Files and tables are read, split, tokenised and packed by the native core, as for `ferrotune.train`;
the rows are numpy arrays, so that worker processes share them.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .frames import named
from .kinds import DataSources, StrPath
from .options import check

IGNORE = -100  # the label of a token that is not trained

Row = dict[str, torch.Tensor]


class PackedDataset(IterableDataset[Row]):
    """The rows of one side, in another order each epoch.

    A row is a dict of 1-d int64 tensors of one length: `input_ids`; `labels`, the token itself
    where it is trained and -100 elsewhere (models shift them); `position_ids`, which restart at 0
    with each document of a packed row. A document's first token is never trained, so that nothing
    is predicted from the document before.

    The order depends on `seed` and the epoch alone (`set_epoch`, which transformers' Trainer and
    accelerate call). Under a DataLoader of this `batch_size` the batches are the same for every
    number of workers; under another one every row still comes once an epoch. With `world_size`
    above 1 each rank has its own rows; the first ones come twice where the ranks would differ in
    number. transformers' Trainer shares rows out among the ranks itself: leave `world_size` at 1,
    and set `accelerator_config={"dispatch_batches": False}` in its arguments (TRL's does).
    """

    def __init__(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        batch_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        sort_by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, not {rank} of {world_size}")
        self._arrays = dict(arrays)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.sort_by_length = sort_by_length
        self.rank = rank
        self.world_size = world_size
        # Shared, so that persistent workers see `set_epoch`.
        epoch = torch.zeros((), dtype=torch.int64)
        self._shared_epoch: torch.Tensor = epoch.share_memory_()  # type: ignore[no-untyped-call]
        # Rows of this rank that were read before: where reading began, and where it stands.
        self._start = 0
        self._position = 0
        # Whether the next iteration goes on from there.
        self._resumed = False

    @property
    def _epoch(self) -> int:
        return int(self._shared_epoch)

    @property
    def rows(self) -> int:
        """Rows of all ranks."""
        return len(self._arrays["offsets"]) - 1

    def __len__(self) -> int:
        """Rows of this rank in an epoch."""
        return -(-self.rows // self.world_size)

    def row(self, index: int) -> Row:
        """Row `index` as it is stored."""
        start, end = (int(at) for at in self._arrays["offsets"][index : index + 2])
        names = {"input_ids": "ids", "labels": "labels", "position_ids": "positions"}
        return {
            name: torch.from_numpy(self._arrays[array][start:end].astype(np.int64))
            for name, array in names.items()
        }

    def to_datasets(self) -> Any:
        """The rows in stored order as a `datasets.Dataset`, which TRL's trainers want.

        Its own `to_iterable_dataset` and `shuffle` make it an iterable one. With DataCollator, set
        `remove_unused_columns=False` and `dataset_kwargs={"skip_prepare_dataset": True}`.
        """
        import datasets
        import pyarrow as pa

        ends = pa.array(self._arrays["offsets"].astype(np.int64))
        names = {"input_ids": "ids", "labels": "labels", "position_ids": "positions"}
        columns = {
            name: pa.LargeListArray.from_arrays(ends, pa.array(self._arrays[array]))
            for name, array in names.items()
        }
        return datasets.Dataset(pa.table(columns))

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of epoch `epoch`: all of it, unless a state of it was loaded."""
        if epoch != self._epoch:
            self._shared_epoch.fill_(epoch)
            self._start, self._position, self._resumed = 0, 0, False

    def state_dict(self) -> dict[str, int]:
        """Where reading stands, for `load_state_dict`; torchdata's StatefulDataLoader keeps it.

        A plain DataLoader with workers reads copies of this object: take `position` as the rows
        that this rank has been given.
        """
        return {"epoch": self._epoch, "start": self._start, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next iteration goes on behind row `position` of epoch `epoch`."""
        self._shared_epoch.fill_(state["epoch"])
        self._position = state["position"]
        self._start = state.get("start", self._position)
        self._resumed = True

    def order(self) -> npt.NDArray[np.int64]:
        """The rows of this rank in the order of the present epoch."""
        from . import _native

        if self.shuffle:
            lengths = np.diff(self._arrays["offsets"]).astype(np.uint32)
            together = self.batch_size * self.world_size
            order = _native.epoch_order(
                lengths, together, self.seed, self._epoch, self.sort_by_length
            ).astype(np.int64)
        else:
            order = np.arange(self.rows, dtype=np.int64)
        whole = np.resize(order, len(self) * self.world_size)
        return np.ascontiguousarray(whole[self.rank :: self.world_size])

    def __iter__(self) -> Iterator[Row]:
        order = self.order()
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if not self._resumed:
            self._start = self._position = 0
        self._resumed = False
        start = self._start
        for at in range(self._position, len(order)):
            # A DataLoader takes a batch from each worker in turn.
            if (at - start) // self.batch_size % count != number:
                continue
            self._position = at + 1
            yield self.row(int(order[at]))
        self._start = self._position = 0


@dataclass(slots=True)
class DataCollator:
    """Rows as one batch, without attention across documents.

    Rows of different lengths are padded on the right with `pad_token_id`, label -100 and position
    0. Batches of one document a row get an `attention_mask`, as usual. Where a row holds several
    there is none: transformers then keeps documents apart by `position_ids`, each padding position
    being a document of its own. It does so without a cache alone: the batch says `use_cache=False`.

    With `padding_free` all rows become one of batch size 1, without padding, and the boundaries
    stand in `cu_seq_lens_q`, `cu_seq_lens_k` (int32, documents + 1), `max_length_q` and
    `max_length_k`, which flash attention takes.
    """

    pad_token_id: int = 0
    padding_free: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise ValueError("a batch of no rows")
        for name in _FILLS:
            if name not in rows[0]:
                raise ValueError(
                    f"a row has no {name}: set remove_unused_columns=False in the trainer's "
                    "arguments"
                )
        tensors = [
            {name: torch.as_tensor(row[name], dtype=torch.int64) for name in _FILLS} for row in rows
        ]
        return self._flat(tensors) if self.padding_free else self._padded(tensors)

    def _padded(self, rows: list[Row]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        fills = {**_FILLS, "input_ids": self.pad_token_id}
        batch: dict[str, Any] = {}
        for name, fill in fills.items():
            batch[name] = torch.full((len(rows), longest), fill, dtype=torch.int64)
            for line, row in enumerate(rows):
                batch[name][line, : len(row[name])] = row[name]
        if all(int((row["position_ids"] == 0).sum()) == 1 for row in rows):
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
        else:
            batch["use_cache"] = False
        return batch

    def _flat(self, rows: list[Row]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            name: torch.cat([row[name] for row in rows])[None] for name in _FILLS
        }
        positions = batch["position_ids"][0]
        starts = torch.nonzero(positions == 0)[:, 0]
        bounds = torch.cat([starts, torch.tensor([len(positions)])]).to(torch.int32)
        longest = int(bounds.diff().max())
        for side in ("q", "k"):
            batch[f"cu_seq_lens_{side}"] = bounds
            batch[f"max_length_{side}"] = longest
        batch["use_cache"] = False
        return batch


_FILLS = {"input_ids": 0, "labels": IGNORE, "position_ids": 0}


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Both sides, and what became of the records.

    The report counts records, tokens, what was truncated, split or skipped, and lists what the
    `audit` found.
    """

    train: PackedDataset
    heldout: PackedDataset | None
    report: Mapping[str, Any]


def load_data(
    tokenizer: StrPath | Any,
    data: DataSources,
    *,
    sequence_length: int = 1024,
    packing: bool = True,
    batch_size: int = 1,
    sort_by_length: bool = False,
    heldout: float = 0.0,
    heldout_data: DataSources = (),
    group: str | None = None,
    stratify: bool = True,
    near_duplicates: float = 0.8,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
    label_column: str | None = None,
    audit: Literal["stop", "warn", "off"] = "stop",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    threads: int | None = None,
) -> LoadedData:
    """Read, split, tokenise and pack data for a PyTorch trainer.

    The settings are those of `ferrotune.train`. Texts and completions end with the tokenizer's
    end-of-sequence token, and begin with its beginning-of-sequence token where the tokenizer puts
    one; conversations are what its chat template writes. A document longer than a row is cut into
    several with `packing` and truncated without; the report counts both.

    The data is audited first, as at the start of a run: what is found is in the report's `audit`,
    faults are Python warnings too, and data that training would be meaningless on is refused unless
    `audit` is "warn".

    Args:
        tokenizer: a fast tokenizer of transformers, or a folder that holds one.
        data, heldout_data: files and folders, or tables in memory.
        batch_size: of the DataLoader, on each rank.
        heldout: part of the records that becomes `heldout`; 0 for none.

    Raises:
        SettingError, ValueError, FormatError, OSError, TypeError: as in `ferrotune.train`.
    """
    from .commands.train import train as settings_of_train

    tables: dict[str, Any] = {}
    given: dict[str, Any] = {
        "data": named(data, tables),
        "heldout_data": named(heldout_data, tables),
        "sequence_length": sequence_length,
        "packing": packing,
        "heldout": heldout,
        "group": group,
        "stratify": stratify,
        "near_duplicates": near_duplicates,
        "text_column": text_column,
        "prompt_column": prompt_column,
        "completion_column": completion_column,
        "messages_column": messages_column,
        "label_column": label_column,
        "audit": audit,
        "seed": seed,
        "threads": threads,
    }
    settings = check(settings_of_train, given)
    order: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "rank": rank}
    order |= {"world_size": world_size}
    found = _prepare(tokenizer, settings, tables)
    report = json.loads(found[2])
    for fault in report["audit"]:
        if fault["severity"] != "note":
            warnings.warn(f"data: {fault['message']}", stacklevel=2)
    train = PackedDataset(found[0], sort_by_length=sort_by_length, **order)
    held = PackedDataset(found[1], shuffle=False, **order) if found[1] is not None else None
    return LoadedData(train, held, report)


def _prepare(tokenizer: Any, settings: dict[str, Any], tables: dict[str, Any]) -> Any:
    from . import _native

    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        folder = Path(tokenizer)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"a fast tokenizer is needed, not a {type(tokenizer).__name__}")
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    settings["bos_token_id"] = tokenizer.bos_token_id if begins else None
    settings["eos_token_id"] = tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        settings["tokenizer"] = saved
        return _native.prepare_rows(json.dumps(settings), tables)
