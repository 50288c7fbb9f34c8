"""`ferrotune plan`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..kinds import StrPath
from ..options import Option, SettingError, collect
from ..planning import advice
from ..planning.memory import CHECKPOINTS, LEVELS, Memory, Setup
from ..planning.memory import memory as memory_of
from ..planning.policy import MARGIN, Policy, choose, size_of, smallest
from ..planning.shapes import Shape, read
from ..registry import command
from ..results import Result
from ..shared import DATA, MODEL, RUN, TRAINING, Blocksize, DoubleQuant
from ..tables import Table, compact

_GIB = 1 << 30
_RESERVED = 0.75 * _GIB
"""Taken for CUDA's context and libraries, and for what the allocator cannot use."""


@dataclass(frozen=True, slots=True)
class PlanResult(Result):
    """A run's memory, in bytes.

    ``memory`` is by part, ``peak`` the most at one time and ``peak_at`` when that is. Of a card of
    ``gpu_memory`` bytes: whether the run ``fits``, the ``longest_sequence`` that does (tokens, None
    if none does), and the ``changes`` with which it would. All None, and no changes, without one.
    With ``memory`` the ``policy`` says what each layer recomputes, ``fits`` is of its size, and
    ``longest_sequence`` is with all that a policy can do.
    """

    model_type: str
    parameters: int
    trained_parameters: int
    setup: Setup
    memory: Memory
    peak: int
    peak_at: str
    gpu_memory: int | None
    fits: bool | None
    longest_sequence: int | None
    changes: tuple[advice.Change, ...]
    policy: Policy | None = None

    def table(self) -> Table:
        setup, parts = self.setup, self.memory
        what = "checkpointing" if setup.checkpointing else "no checkpointing"
        what = what if self.policy is None else "memory policy"
        policy, more = self._policy_rows()
        rows = [
            ("model", f"{self.model_type}, {compact(self.parameters)} parameters"),
            ("trained", f"{setup.method}, {compact(self.trained_parameters)} parameters"),
            ("a step", f"{setup.batch_size} x {setup.sequence_length} tokens, {what}"),
            *policy,
            ("weights", _gib(parts.weights)),
            ("adapters", _gib(parts.adapters)),
            (f"optimiser ({setup.optimizer})", _gib(parts.optimizer)),
            ("gradients", _gib(parts.gradients)),
            ("activations", _gib(parts.activations)),
            *more,
            ("scratch of backward", _gib(parts.scratch)),
            ("loss", _gib(parts.loss)),
            ("peak", f"{_gib(self.peak)}, at {self.peak_at}"),
        ]
        if self.fits is not None:
            size = self.policy.available if self.policy is not None else self.gpu_memory
            rows.append((f"fits {_gib(size or 0)}", "yes" if self.fits else "no"))
            longest = self.longest_sequence
            most = " recomputing all" if self.policy is not None else ""
            rows.append(("longest sequence", f"{longest} tokens{most}" if longest else "none fits"))
        if self.changes:
            rows.append(("to make it fit", ""))
            rows += [
                (f"  {_gib(one.peak)}{', fits' if one.fits else ''}", one.change)
                for one in self.changes
            ]
            if not self.changes[-1].fits:
                rows.append(("", "still too much: a shorter sequence or a larger card"))
        return Table("ferrotune plan", tuple(rows))

    def _policy_rows(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """What layers do, and what is besides what they keep."""
        if self.policy is None:
            return [], []
        rows = [("recomputed at once", _gib(self.memory.recomputed))]
        if self.memory.host:
            rows.append(("on the host", _gib(self.memory.host)))
        texts = str(self.policy).split("; ")
        heads = [f"policy for {_gib(self.policy.available)}", *[""] * (len(texts) - 1)]
        return [*zip(heads, texts, strict=True)], rows


@command(
    "plan",
    examples=(
        "ferrotune plan meta-llama/config.json --gpu-memory 24",
        "ferrotune plan model/ --batch-size 8 --memory auto --gpu-memory 24",
        "ferrotune plan model/ --method full --batch-size 4 --checkpointing --gpu-memory 80",
    ),
)
def plan(
    model: Annotated[
        StrPath, Option("config.json, or a folder with one", positional=True, group=MODEL)
    ],
    *,
    method: Annotated[
        Literal["lora", "qlora", "full"],
        Option("adapters, adapters over a 4-bit model, or every weight", group=MODEL),
    ] = "qlora",
    r: Annotated[int, Option("rank of the adapters, on every linear layer", group=MODEL)] = 16,
    lora_dropout: Annotated[
        float, Option("dropout before the adapters", unit="probability", group=MODEL)
    ] = 0.0,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"],
        Option("of weights that are not in 4 bits, and of activations", group=MODEL),
    ] = "bfloat16",
    batch_size: Annotated[int, Option("rows computed at once", unit="sequences", group=DATA)] = 1,
    sequence_length: Annotated[int, Option("length of a row", unit="tokens", group=DATA)] = 2048,
    checkpointing: Annotated[
        bool, Option("keep each block's input alone and compute the rest again", group=TRAINING)
    ] = False,
    fused_loss: Annotated[
        bool, Option("the loss without all logits: patch(model, fused_loss=True)", group=TRAINING)
    ] = True,
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "sgd"], Option("whose states are kept", group=TRAINING)
    ] = "adamw",
    gpu_memory: Annotated[
        float | None,
        Option("memory of the card", unit="GiB", group=RUN, unset="the first CUDA device's"),
    ] = None,
    memory: Annotated[
        str | None,
        Option(
            "what patch(model, memory=...) does: auto for the card's, or a size ('20 GiB', 20e9)",
            group=RUN,
            unset="no policy",
        ),
    ] = None,
) -> PlanResult:
    """Say what a training run on a GPU will take of its memory, and what to change if it is short.

    From the model's config.json alone: neither weights nor a GPU are needed. It is the memory of a
    model patched by `ferrotune.patch`; 0.75 GiB of the card are left to CUDA itself.

    Returns:
        A PlanResult: bytes by part, the peak, whether it fits and what to change.

    Raises:
        SettingError: a kind of model whose memory is not known, or a value out of range.
        OSError: a file that cannot be read.
    """
    settings = collect(plan, locals())
    path, asked, limit = (settings.pop(name) for name in ("model", "gpu_memory", "memory"))
    _check(settings)
    shape, setup = read(path), Setup(**settings)
    card = _card() if asked is None else asked * _GIB
    if card is not None and card <= 0:
        raise SettingError(f"gpu_memory must be above 0 GiB, not {asked:g}")
    available = None if card is None else card - _RESERVED
    policy = None if limit is None else _policy(shape, setup, limit, available)
    found, least = memory_of(shape, setup), None
    if policy is not None:
        found, available = policy.memory, policy.available / (1 + MARGIN)
        least = smallest(shape.layers)
    fits = None if available is None else found.peak <= available
    frozen = shape.linear_parameters + shape.other_parameters
    adapters = 0 if method == "full" else shape.adapter_parameters(r)
    return PlanResult(
        model_type=shape.model_type,
        parameters=frozen,
        trained_parameters=adapters or frozen,
        setup=setup,
        memory=found,
        peak=found.peak,
        peak_at=found.peak_at,
        gpu_memory=None if card is None else int(card),
        fits=fits,
        longest_sequence=(
            None if available is None else advice.longest_sequence(shape, setup, available, least)
        ),
        changes=(
            () if available is None or fits else advice.changes(shape, setup, available, least)
        ),
        policy=policy,
    )


def _policy(shape: Shape, setup: Setup, limit: str, available: float | None) -> Policy:
    if setup.method == "full":
        raise SettingError("memory: ferrotune.patch is for adapters: method lora or qlora")
    if limit == "auto":
        if available is None:
            raise SettingError("memory auto needs a card: give gpu_memory")
        size = available
    else:
        try:
            size = size_of(limit)
        except ValueError as error:
            raise SettingError(str(error)) from None
        size = size if available is None else min(size, available)
    ladder = CHECKPOINTS if setup.checkpointing else LEVELS
    found = choose(shape, setup, size / (1 + MARGIN), ladder)
    return dataclasses.replace(found, available=int(size))


def _check(settings: dict[str, Any]) -> None:
    for name in ("r", "batch_size", "sequence_length"):
        if settings[name] < 1:
            raise SettingError(f"{name} must be at least 1, not {settings[name]}")
    if not 0 <= settings["lora_dropout"] < 1:
        raise SettingError(
            f"lora_dropout must be at least 0 and below 1, not {settings['lora_dropout']:g}"
        )
    blocksize = settings["blocksize"]
    if blocksize not in {32 << i for i in range(8)}:
        raise SettingError(f"blocksize must be a power of two from 32 to 4096, not {blocksize}")


def _card() -> float | None:
    """Bytes of the first CUDA device."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)


def _gib(number: float) -> str:
    return f"{number / _GIB:.2f} GiB"
