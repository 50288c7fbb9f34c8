"""Two gloo processes on the CPU compute what one process computes on the same global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distributed_jobs import (
    Job,
    Llama,
    Llama4bit,
    Modules,
    Result,
    build,
    run,
    run_all,
)

F32 = torch.float32
# FSDP1 holds all parameters of a unit as one tensor of one type.
AS_FLOATS: dict[str, Any] = {"quant_storage": F32}
CHECKPOINTED: dict[str, Any] = {"checkpointed": True}
DROPPING: dict[str, Any] = {"lora_dropout": 0.2}

MODULES = [
    Job(Modules, "ddp"),
    Job(Modules, "ddp", CHECKPOINTED),
    Job(Modules, "ddp", differing=True),
    Job(Modules, "fsdp2"),
    Job(Modules, "fsdp2", CHECKPOINTED),
    Job(Modules, "fsdp2 leaves"),
    Job(Modules, "fsdp1", AS_FLOATS),
    Job(Modules, "fsdp1 leaves", AS_FLOATS),
]
WITH_DROPOUT = [
    Job(Modules, wrap, {**DROPPING, **more}, dropout_seed=100)
    for wrap in ("ddp", "fsdp2")
    for more in ({}, CHECKPOINTED)
]
LLAMAS = [
    Job(model, wrap, options)
    for model in (Llama, Llama4bit)
    for wrap, options in (
        ("ddp", {}), ("ddp", CHECKPOINTED), ("fsdp2", {}), ("fsdp2", CHECKPOINTED), ("fsdp1", {}),
    )
]  # fmt: skip

Results = dict[str, list[Result]]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_all([*MODULES, *WITH_DROPOUT], tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Callable[[Job], Job]]:
    """Results by the jobs' names, and the jobs with the folder of the model on which they ran."""
    import tiny_models

    folder = tmp_path_factory.mktemp("llamas")
    tiny_models.base_model("llama").save_pretrained(folder / "model")

    def placed(job: Job) -> Job:
        return Job(job.model, job.wrap, {**job.options, "folder": folder / "model"})

    return run_all([placed(job) for job in LLAMAS], folder), placed


def check(job: Job, results: list[Result]) -> None:
    one = run(Job(job.model, "", job.options))
    assert one.losses[-1] < one.losses[0]
    for result in results:
        assert result.losses == pytest.approx(one.losses, rel=1e-6)
        near(result.gradients, one.gradients, 1e-6)
        near(result.trained, one.trained, 1e-5)
        near(result.state, one.state, 1e-5)
        assert result.reloaded_loss == pytest.approx(one.reloaded_loss, rel=1e-6)
    first, second = results
    assert first.losses == second.losses
    assert all(torch.equal(first.trained[name], second.trained[name]) for name in first.trained)


def near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float) -> None:
    assert found.keys() == wanted.keys()
    for name, truth in wanted.items():
        if "lora_" not in name:
            # Frozen ones are not touched; packed bytes held as floats may be NaN as such.
            assert torch.equal(found[name].view(torch.uint8), truth.view(torch.uint8)), name
        else:
            assert (found[name] - truth).norm() <= bound * truth.norm(), name


@pytest.mark.parametrize("job", MODULES, ids=lambda job: job.name)
def test_modules_are_those_of_one_process(job: Job, modules: Results) -> None:
    check(job, modules[job.name])


@pytest.mark.parametrize("job", MODULES, ids=lambda job: job.name)
def test_gathered_state_is_a_plain_model(job: Job, modules: Results) -> None:
    result = modules[job.name][0]
    model = build(Job(job.model, "", job.options)).eval()
    model.load_state_dict(result.state)
    with torch.no_grad():
        loss = float(model(*job.model.batch()))
    assert loss == pytest.approx(result.reloaded_loss, rel=1e-6)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_checkpointing_recomputes_the_same_masks(wrap: str, modules: Results) -> None:
    plain, checkpointed = (modules[job.name] for job in WITH_DROPOUT if job.wrap == wrap)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one.losses == other.losses
        near(other.gradients, one.gradients, 1e-6)
    without = modules[Job(Modules, wrap).name][0]
    assert without.losses[0] != pytest.approx(plain[0].losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("job", LLAMAS, ids=lambda job: job.name)
def test_patched_peft_llama_is_that_of_one_process(
    job: Job, llamas: tuple[Results, Callable[[Job], Job]]
) -> None:
    results, placed = llamas
    check(placed(job), results[job.name])
    assert all(not result.left for result in results[job.name])
