"""PackedDataset and DataCollator in PyTorch's loaders, transformers' Trainer and TRL's."""

import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ferrotune
from ferrotune.dataset import IGNORE, DataCollator, PackedDataset, load_data
from llamas import llama

DEMO = Path(ferrotune.__file__).parent / "data/demo-model"
TEXTS = [f"Text number {n} of some, and it says {'more ' * (n % 9)}of it." for n in range(60)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n\n".join(TEXTS))
    return path


def _load(files: Path, **settings: Any) -> PackedDataset:
    settings = {"sequence_length": 64, "near_duplicates": 0.0, **settings}
    return load_data(DEMO, files, **settings).train


def _batches(loader: Any) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in loader]


def _loader(data: PackedDataset, workers: int = 0, batch_size: int = 3, **more: Any) -> Any:
    return DataLoader(
        data, batch_size=batch_size, num_workers=workers, collate_fn=DataCollator(), **more
    )


def _rows(data: PackedDataset) -> list[list[int]]:
    return [data.row(index)["input_ids"].tolist() for index in range(data.rows)]


def test_rows_are_the_texts_as_the_tokenizer_has_them(files: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    loaded = load_data(tokenizer, files, sequence_length=64, heldout=0.2, near_duplicates=0.0)
    assert loaded.heldout is not None
    assert loaded.report["train_records"] == 48
    documents = []
    for side in (loaded.train, loaded.heldout):
        for index in range(side.rows):
            row = side.row(index)
            starts = [*torch.nonzero(row["position_ids"] == 0)[:, 0].tolist(), len(row["labels"])]
            for start, end in pairwise(starts):
                ids, labels = (row[name][start:end] for name in ("input_ids", "labels"))
                assert row["position_ids"][start:end].tolist() == list(range(end - start))
                assert labels[0] == IGNORE
                assert torch.equal(labels[1:], ids[1:])
                documents.append(ids.tolist())
    bos = (
        [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    )
    expected = [
        bos + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for text in TEXTS
    ]
    assert sorted(documents) == sorted(expected)


def _summed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_documents_do_not_see_one_another(
    attention: str, padding_free: bool, packing: bool
) -> None:
    """The loss of a batch is the sum of the losses of its documents, each computed alone."""
    model = llama(attn_implementation=attention).double().eval()
    generator = np.random.default_rng(0)
    lengths = [[5, 9, 3], [7], [4, 4]] if packing else [[12], [5], [9]]
    rows, documents = [], []
    for row in lengths:
        parts = [torch.from_numpy(generator.integers(1, 97, length)) for length in row]
        labels = [torch.cat([torch.tensor([IGNORE]), part[1:]]) for part in parts]
        documents += list(zip(parts, labels, strict=True))
        rows.append(
            {
                "input_ids": torch.cat(parts),
                "labels": torch.cat(labels),
                "position_ids": torch.cat([torch.arange(len(part)) for part in parts]),
            }
        )
    batch = DataCollator(padding_free=padding_free)(rows)
    assert ("attention_mask" in batch) == (not packing and not padding_free)
    if padding_free:
        bounds = [0, *np.cumsum([len(part) for part, _ in documents]).tolist()]
        assert batch.pop("cu_seq_lens_q").tolist() == bounds
        assert batch.pop("cu_seq_lens_k").dtype == torch.int32
        longest = max(len(part) for part, _ in documents)
        assert batch.pop("max_length_q") == batch.pop("max_length_k") == longest
    with torch.no_grad():
        alone = [
            _summed_loss(model, {"input_ids": part[None], "labels": labels[None]})
            for part, labels in documents
        ]
        together = _summed_loss(model, batch)
    # Eager attention takes its softmax in float32 whatever the model's type.
    tolerance = 1e-9 if attention == "sdpa" else 1e-4
    assert together.item() == pytest.approx(sum(one.item() for one in alone), abs=tolerance)


def test_every_number_of_workers_gives_the_same_batches(files: Path) -> None:
    data = _load(files, batch_size=3)
    expected = _batches(_loader(data))
    assert sorted(row for batch in expected for row in batch) != []
    assert len(expected) == -(-data.rows // 3) >= 5
    for workers in (1, 2, 3):
        assert _batches(_loader(data, workers)) == expected
    assert _batches(_loader(data, 2, multiprocessing_context="spawn")) == expected
    # Under another batch size, every row still comes once.
    found = [tuple(r) for batch in _batches(_loader(data, 2, batch_size=1)) for r in batch]
    assert sorted(found) == sorted(map(tuple, _rows(data)))
    assert [row["input_ids"].tolist() for row in pickle.loads(pickle.dumps(data))] == [
        row["input_ids"].tolist() for row in data
    ]


def test_epochs_differ_and_come_again(files: Path) -> None:
    data = _load(files)
    orders = []
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        orders.append([row["input_ids"].tolist() for row in data])
        assert sorted(orders[-1]) == sorted(_rows(data))
    assert orders[0] != orders[1] != orders[2]
    data.set_epoch(1)
    assert [row["input_ids"].tolist() for row in data] == orders[1]
    other = _load(files, seed=1)
    assert [row["input_ids"].tolist() for row in other] != orders[0]


def test_workers_that_stay_see_the_epochs(files: Path) -> None:
    data = _load(files, batch_size=3)
    loader = _loader(data, 2, persistent_workers=True)
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        found = _batches(loader)
        again = _load(files, batch_size=3)
        again.set_epoch(epoch)
        assert found == _batches(_loader(again))


def test_a_look_at_the_first_row_costs_no_row(files: Path) -> None:
    data = _load(files)
    first = next(iter(data))["input_ids"].tolist()
    rows = [row["input_ids"].tolist() for row in data]
    assert rows[0] == first
    assert sorted(rows) == sorted(_rows(data))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("sort_by_length", [False, True])
def test_reading_goes_on_in_the_middle_of_an_epoch(
    files: Path, workers: int, rank: int, world_size: int, sort_by_length: bool
) -> None:
    settings: dict[str, Any] = {"rank": rank, "world_size": world_size, "batch_size": 2}
    settings |= {"sort_by_length": sort_by_length, "packing": not sort_by_length}
    data = _load(files, **settings)
    data.set_epoch(3)
    expected = _batches(_loader(data, workers, batch_size=2))
    assert sum(map(len, expected)) == len(data)
    for read in (1, 2, len(expected) - 1):
        again = _load(files, **settings)
        again.load_state_dict({"epoch": 3, "position": 2 * read})
        assert _batches(_loader(again, workers, batch_size=2)) == expected[read:]


def test_the_state_while_reading(files: Path) -> None:
    data = _load(files)
    data.set_epoch(1)
    rows = iter(data)
    read = [next(rows)["input_ids"].tolist() for _ in range(4)]
    state = data.state_dict()
    assert (state["epoch"], state["position"]) == (1, 4)
    again = _load(files)
    again.load_state_dict(state)
    rest = [row["input_ids"].tolist() for row in again]
    again.set_epoch(1)
    assert read + rest == [row["input_ids"].tolist() for row in again]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows_out(files: Path, workers: int, world_size: int) -> None:
    parts = []
    for rank in range(world_size):
        data = _load(files, rank=rank, world_size=world_size, batch_size=2)
        found = _batches(_loader(data, workers, batch_size=1))
        assert len(found) == len(data)
        parts.append([tuple(row) for batch in found for row in batch])
    rows = sorted(map(tuple, _rows(data)))
    assert {len(part) for part in parts} == {-(-len(rows) // world_size)}
    together = sorted(row for part in parts for row in part)
    assert set(together) == set(rows)
    assert len(together) - len(rows) < world_size


def test_sorted_by_length(files: Path) -> None:
    settings: dict[str, Any] = {"packing": False, "batch_size": 4}
    size = {}
    for by_length in (False, True):
        data = _load(files, sort_by_length=by_length, **settings)
        batches = list(_loader(data, batch_size=4))
        size[by_length] = sum(batch["input_ids"].numel() for batch in batches)
        assert all("attention_mask" in batch for batch in batches)
    assert size[True] < size[False]


def test_what_is_cut_is_counted(files: Path) -> None:
    settings: dict[str, Any] = {"sequence_length": 12, "near_duplicates": 0.0}
    cut = load_data(DEMO, files, packing=False, **settings).report
    assert cut["truncated"] > 20
    assert cut["split"] == 0
    packed = load_data(DEMO, files, packing=True, **settings).report
    assert packed["truncated"] == 0
    assert packed["split"] == cut["truncated"]
    assert packed["train_targets"] > cut["train_targets"]


def test_data_is_looked_at_first(files: Path, tmp_path: Path) -> None:
    lines = files.read_text().split("\n\n")
    repeated = tmp_path / "repeated.txt"
    repeated.write_text("\n\n".join([*lines, *lines[:20]]))
    for heldout in (0.0, 0.2):
        settings: dict[str, Any] = {"near_duplicates": 0.0, "heldout": heldout}
        with pytest.warns(UserWarning, match="data: .* of the records repeat an earlier text"):
            loaded = load_data(DEMO, repeated, **settings)
        found = {one["check"]: one for one in loaded.report["audit"]}
        assert found["exact_duplicates"]["count"] == 20
        assert found["exact_duplicates"]["severity"] == "warning"
        off = load_data(DEMO, repeated, audit="off", **settings)
        assert off.report["audit"] == []
        assert off.train.rows == loaded.train.rows
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({"text": line, "class": "a"}) + "\n" for line in lines))
    settings = {"near_duplicates": 0.0, "label_column": "class"}
    with pytest.raises(ValueError, match="the audit stops this run: Every record has the label"):
        load_data(DEMO, labelled, **settings)
    with pytest.warns(UserWarning, match="data: Every record has the label `a`"):
        assert load_data(DEMO, labelled, audit="warn", **settings).train.rows
    copy = tmp_path / "copy.txt"
    copy.write_text("\n\n".join(lines[:5]))
    with pytest.raises(ValueError, match="the audit stops this run: Every held-out record"):
        load_data(DEMO, files, heldout_data=copy, near_duplicates=0.0)
    with pytest.raises(ferrotune.SettingError, match="audit"):
        load_data(DEMO, files, audit="loud")  # type: ignore[arg-type]


def test_bad_arguments(files: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        _load(files, batch_size=0)
    with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1, not 2 of 2"):
        _load(files, rank=2, world_size=2)
    with pytest.raises(ValueError, match="sequence_length must be at least 2 tokens"):
        _load(files, sequence_length=1)
    with pytest.raises(ferrotune.SettingError, match="sequence_length wants a whole number"):
        _load(files, sequence_length=-1)
    with pytest.raises(ferrotune.SettingError, match="group wants text"):
        _load(files, group=3)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_data(files.parent, files)
    with pytest.raises(FileNotFoundError):
        load_data(DEMO, files.parent / "absent.txt")
    with pytest.raises(ValueError, match="a batch of no rows"):
        DataCollator()([])


class _Spy(DataCollator):
    """Keeps what it was given."""

    seen: list[list[list[int]]]

    def __call__(self, rows: Any) -> Any:
        self.seen.append([[int(one) for one in row["input_ids"]] for row in rows])
        return super().__call__(rows)


def _spy() -> _Spy:
    spy = _Spy()
    spy.seen = []
    return spy


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO)


def _arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 9,
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "steps", "save_steps": 5, "disable_tqdm": True, "seed": 3, **changes,
    }  # fmt: skip


def _losses(trainer: Any) -> dict[int, float]:
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_keeps_where_reading_stands(files: Path, workers: int) -> None:
    nodes = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        data = _load(files, batch_size=3)
        return nodes.StatefulDataLoader(
            data, batch_size=3, num_workers=workers, collate_fn=DataCollator()
        )

    whole = _batches(loader())
    first = loader()
    reading = iter(first)
    read = [next(reading)["input_ids"].tolist() for _ in range(4)]
    again = loader()
    again.load_state_dict(first.state_dict())
    rest = _batches(again)
    assert read + rest == whole
    assert rest


def test_trainer_trains_and_resumes_in_the_middle_of_an_epoch(files: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def trainer(folder: Path, spy: _Spy) -> Any:
        arguments = TrainingArguments(**_arguments(folder))
        data = _load(files, batch_size=2)
        assert data.rows / 2 > 5.5
        return Trainer(model=_model(), args=arguments, train_dataset=data, data_collator=spy)

    whole, first = trainer(tmp_path / "a", spy := _spy()), spy.seen
    whole.train()
    losses = _losses(whole)
    assert len(losses) == 9
    assert losses[9] < losses[1]
    resumed, second = trainer(tmp_path / "b", spy := _spy()), spy.seen
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-5"))
    assert {step: _losses(resumed)[step] for step in range(6, 10)} == pytest.approx(
        {step: losses[step] for step in range(6, 10)}, abs=1e-4
    )
    # accelerate collates the batches it skips, and one ahead.
    assert any(second[at : at + 4] == first[5:9] for at in range(len(second)))


def test_trainer_on_two_ranks(files: Path, tmp_path: Path) -> None:
    import dataset_ranks

    ranks = dataset_ranks.run(DEMO, files, tmp_path)
    rows = sorted(map(tuple, ranks[0]["rows"]))
    assert rows == sorted(map(tuple, ranks[1]["rows"]))
    assert len(ranks[0]["losses"]) == 2 * -(-len(rows) // 4)
    per_epoch = -(-len(rows) // 4)  # two ranks of two rows
    for epoch in range(2):
        seen = [
            tuple(row)
            for rank in ranks
            for batch in rank["seen"][epoch * per_epoch : (epoch + 1) * per_epoch]
            for row in batch
        ]
        assert set(seen) == set(rows)
        assert len(seen) - len(rows) < 4  # the last batch is filled up from the first
    assert ranks[0]["seen"][:per_epoch] != ranks[0]["seen"][per_epoch:]


@pytest.mark.parametrize("iterable", [False, True])
def test_sft_trainer(files: Path, tmp_path: Path, iterable: bool) -> None:
    """TRL takes data sets of the datasets library alone."""
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    packed = _load(files, batch_size=2)
    data = packed.to_datasets()
    if iterable:
        data = data.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=8)
    settings = trl.SFTConfig(
        **_arguments(tmp_path),
        bf16=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model=_model(),
        args=settings,
        train_dataset=data,
        data_collator=(spy := _spy()),
        processing_class=AutoTokenizer.from_pretrained(DEMO),
    )
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == 9
    assert losses[9] < losses[1]
    rows = {tuple(row) for row in _rows(packed)}
    assert {tuple(row) for batch in spy.seen for row in batch} <= rows


def test_rows_without_their_positions_are_refused(files: Path) -> None:
    row = dict(_load(files).row(0))
    del row["position_ids"]
    with pytest.raises(ValueError, match="no position_ids: set remove_unused_columns=False"):
        DataCollator()([row])
