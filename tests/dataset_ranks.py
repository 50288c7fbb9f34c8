"""What each process of the test of transformers' Trainer on two ranks runs."""

import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

WORLD = 2


class Spy:
    """Collates, and keeps the rows it was given."""

    def __init__(self) -> None:
        from ferrotune import DataCollator

        self.seen: list[list[list[int]]] = []
        self._collate = DataCollator()

    def __call__(self, rows: Any) -> Any:
        self.seen.append([row["input_ids"].tolist() for row in rows])
        return self._collate(rows)


def start(rank: int, port: int, model: str, file: str, folder: str) -> None:
    """A process of `torch.multiprocessing.spawn`: one epoch, and the rows this rank was given."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from ferrotune import load_data

    data = load_data(model, file, sequence_length=64, near_duplicates=0.0, batch_size=2).train
    spy = Spy()
    arguments = TrainingArguments(
        output_dir=f"{folder}/{rank}", per_device_train_batch_size=2, num_train_epochs=2,
        learning_rate=1e-3, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", ddp_backend="gloo", accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=data,
        data_collator=spy,
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    rows = [data.row(index)["input_ids"].tolist() for index in range(data.rows)]
    found = {"seen": spy.seen, "losses": losses, "rows": rows}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def run(model: Path, file: Path, folder: Path) -> list[dict[str, Any]]:
    """What each rank saw. Raises what a process raised."""
    import torch.multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(start, (port, str(model), str(file), str(folder)), nprocs=WORLD)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(WORLD)]
