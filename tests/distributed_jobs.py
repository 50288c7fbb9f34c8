"""What each process of the distributed tests runs, and the one process they are compared with.

A job builds a model from a seed, trains it for a few steps on its rows of a global batch, and
gives back the losses of the global batch, the first step's gradients and the trained parameters,
all of them whole and under the names of the model without its wrapper.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ferrotune import patching
from ferrotune.nn import Linear4bit, LoraLinear, LoraLinear4bit

WORLD, ROWS, STEPS = 2, 6, 3
WIDTH = 64
FULL = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    """Two layers, the second in 4 bits; recomputed in the backward pass if ``checkpointed``."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        options = dict(options)
        self.checkpointed = options.pop("checkpointed", False)
        storage = options.pop("quant_storage", torch.uint8)
        self.up = LoraLinear(WIDTH, 2 * WIDTH, r=4, **options)
        self.down = LoraLinear4bit(2 * WIDTH, WIDTH, r=4, quant_storage=storage, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            found: Tensor = checkpoint(self._compute, x, use_reentrant=False)
            return found
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Modules(nn.Module):
    """Blocks of ferrotune.nn's layers that give back the mean loss of their rows."""

    whole_state = True

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(options) for _ in range(2)))

    def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.blocks(x), wanted)

    @property
    def units(self) -> list[nn.Module]:
        """What is sharded by itself."""
        return list(self.blocks)

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        torch.manual_seed(4)
        return torch.randn(ROWS, 5, WIDTH), torch.randn(ROWS, 5, WIDTH)


class Llama(nn.Module):
    """A tiny PEFT Llama that ``ferrotune.patch`` has patched."""

    whole_state = True

    def __init__(self, checkpointed: bool = False, folder: Path | None = None) -> None:
        super().__init__()
        import ferrotune
        import tiny_models

        base = self.base(folder)
        self.model = tiny_models.with_lora(base)
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        assert not ferrotune.patch(self.model, strict=True).left

    @staticmethod
    def base(folder: Path | None) -> Any:
        import tiny_models

        return tiny_models.base_model("llama")

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids, labels=ids).loss

    @property
    def units(self) -> list[nn.Module]:
        return list(self.model.base_model.model.model.layers)

    @staticmethod
    def batch() -> tuple[Tensor]:
        return (torch.randint(3, 96, (ROWS, 12), generator=torch.Generator().manual_seed(4)),)


class Llama4bit(Llama):
    """The same on bitsandbytes' Linear4bit, whose packed bytes are held as float32.

    bitsandbytes' layers load no state dict of their own: only the adapters are gathered.
    """

    whole_state = False

    @staticmethod
    def base(folder: Path | None) -> Any:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32,
        )  # fmt: skip
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )


@dataclass(frozen=True)
class Job:
    """One way to train one model.

    ``wrap`` is "ddp", "fsdp1", "fsdp2", or "" for one process; "fsdp1 leaves" and "fsdp2 leaves"
    shard every linear layer by itself, as PEFT's policy for FSDP does.
    """

    model: Callable[..., Any]
    wrap: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    dropout_seed: int | None = None
    differing: bool = False
    """Whether every rank starts from weights of its own; DDP gives all of them the first one's."""
    device: str = "cpu"
    """By gloo there; on "cuda" by NCCL, a device each, and under autocast to bfloat16."""

    @property
    def place(self) -> torch.device:
        """This process's device."""
        rank = dist.get_rank() if self.wrap else 0
        return torch.device(self.device, rank) if self.device == "cuda" else torch.device("cpu")

    @property
    def name(self) -> str:
        shown = [f"{key}={value}" for key, value in self.options.items() if key != "folder"]
        shown += ["differing"] if self.differing else []
        return " ".join([self.model.__name__, self.wrap, *shown])


@dataclass
class Result:
    """All whole: of the global batch, and of the parameters before they were sharded."""

    losses: list[float]
    gradients: dict[str, Tensor]
    trained: dict[str, Tensor]
    state: dict[str, Tensor]
    """The gathered state dict after training."""
    reloaded_loss: float
    """Of a fresh model, wrapped in the same way, that has loaded ``state``."""
    left: set[str | None]
    """Why patched layers did not run through ferrotune."""


def build(job: Job) -> Any:
    torch.manual_seed(dist.get_rank() if job.differing else 0)
    model = job.model(**job.options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.to(job.place).train()


def wrap(job: Job, model: Any) -> Any:
    if job.wrap == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if "fsdp1" in job.wrap:

        def is_unit(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            return recurse or ("leaves" in job.wrap and isinstance(module, nn.Linear))

        return FullyShardedDataParallel(
            model, use_orig_params=True, device_id=job.place, auto_wrap_policy=is_unit
        )
    if "fsdp2" in job.wrap:
        leaves = [m for m in model.modules() if isinstance(m, (nn.Linear, Linear4bit))]
        for unit in leaves if "leaves" in job.wrap else model.units:
            fully_shard(unit)
        fully_shard(model)
    return model


def run(job: Job) -> Result:
    """Trains, gathers, and loads what was gathered into a fresh model."""
    model = wrap(job, build(job))
    rank, world = (dist.get_rank(), WORLD) if job.wrap else (0, 1)
    batch = [part.chunk(world)[rank].to(job.place) for part in job.model.batch()]
    mixed = torch.autocast("cuda", torch.bfloat16, enabled=job.device == "cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, gradients = [], {}
    left: set[str | None] = set()
    for step in range(STEPS):
        if job.dropout_seed is not None:
            torch.manual_seed(job.dropout_seed + 10 * step + rank)
        optimizer.zero_grad()
        with mixed, patching.listening(lambda layer, reason: left.add(reason)):
            loss = model(*batch)
        loss.backward()
        if step == 0:
            gradients = whole(job, model, gradient=True)
        optimizer.step()
        losses.append(mean(job, loss))
    state = gathered(job, model)
    fresh = wrap(job, perturbed(build(job)))
    load(job, fresh, state)
    with torch.no_grad(), mixed:
        reloaded = mean(job, fresh.eval()(*batch))
    trained = whole(job, model, gradient=False)
    return Result(
        losses, on_cpu(gradients), on_cpu(trained), on_cpu(state), reloaded, left - {None}
    )


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    return model


def mean(job: Job, loss: Tensor) -> float:
    loss = loss.detach().clone()
    if job.wrap:
        dist.all_reduce(loss)
        loss /= WORLD
    return float(loss)


def whole(job: Job, model: Any, *, gradient: bool) -> dict[str, Tensor]:
    """Trained parameters, or their gradients, by their names in the model without wrapper."""
    found = {}
    with parameters_gathered(job, model):
        for name, parameter in model.named_parameters():
            tensor = parameter.grad if gradient else parameter.detach()
            if parameter.requires_grad:
                assert tensor is not None, name
                if isinstance(tensor, DTensor):
                    tensor = tensor.full_tensor()
                found[plain(name)] = tensor.clone()
    return found


def parameters_gathered(job: Job, model: Any) -> contextlib.AbstractContextManager[Any]:
    if "fsdp1" in job.wrap:
        found: contextlib.AbstractContextManager[Any] = FullyShardedDataParallel.summon_full_params(
            model, with_grads=True
        )
        return found
    return contextlib.nullcontext()


def plain(name: str) -> str:
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def gathered(job: Job, model: Any) -> dict[str, Tensor]:
    if not job.model.whole_state:
        return whole(job, model, gradient=False)
    found: dict[str, Tensor] = get_model_state_dict(model, options=FULL)
    return {name: tensor.clone() for name, tensor in found.items()}


def load(job: Job, model: Any, state: dict[str, Tensor]) -> None:
    model = model.module if job.wrap == "ddp" else model
    whole_state = job.model.whole_state
    options = StateDictOptions(full_state_dict=True, strict=whole_state)
    found = set_model_state_dict(model, copy.deepcopy(state), options=options)
    assert not (whole_state and found.missing_keys), found
    assert not found.unexpected_keys, found


def start(rank: int, rendezvous: Path, jobs: list[Job], out: Path) -> None:
    """A process of `torch.multiprocessing.spawn`: runs the jobs and writes its results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cuda = jobs[0].device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    for number, job in enumerate(jobs):
        torch.save(run(job), out / f"{number}-{rank}.pt")
    dist.destroy_process_group()


def run_all(jobs: list[Job], folder: Path) -> dict[str, list[Result]]:
    """Results by the jobs' names: one for each rank. Raises what a process raised."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(start, (folder / "rendezvous", jobs, folder), nprocs=WORLD)
    return {
        job.name: [
            torch.load(folder / f"{number}-{rank}.pt", weights_only=False) for rank in range(WORLD)
        ]
        for number, job in enumerate(jobs)
    }
