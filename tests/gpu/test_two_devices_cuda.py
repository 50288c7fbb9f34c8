"""Two CUDA devices: in one process, whichever is the current one, and in a process for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ferrotune
from distributed_jobs import Job, Llama, Llama4bit, Modules, Result, run, run_all
from ferrotune import ops
from lora_cases import make, ours
from lora_cases import run as run_case
from mlp_cases import leaves, mlp
from side_by_side import assert_agree, both, counted
from tiny_models import base_model, batch, with_lora

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

BF16, F32 = torch.bfloat16, torch.float32
CHECKPOINTED: dict[str, Any] = {"checkpointed": True}
AS_FLOATS: dict[str, Any] = {"quant_storage": F32}  # earlier versions of FSDP2 shard no bytes
JOBS = [
    Job(Modules, "ddp", device="cuda"),
    Job(Modules, "fsdp2", AS_FLOATS, device="cuda"),
    Job(Modules, "fsdp1", AS_FLOATS, device="cuda"),
    *[
        Job(model, wrap, options, device="cuda")
        for model in (Llama, Llama4bit)
        for wrap, options in (("ddp", {}), ("ddp", CHECKPOINTED), ("fsdp2", {}), ("fsdp1", {}))
    ],
]
# Relative: gradients of a batch's halves are rounded to bfloat16 before they are added.
NEAR = 2e-2


@pytest.fixture(params=[0, 1], ids=["first is current", "second is current"])
def current(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch.cuda.device(request.param):
        yield request.param


def everywhere(work: Callable[[torch.device], dict[str, Tensor]], current: int) -> None:
    """The same bits on both devices, and the current one is the same after."""
    first, second = (
        {name: tensor.cpu() for name, tensor in work(torch.device("cuda", i)).items()}
        for i in range(2)
    )
    assert torch.cuda.current_device() == current
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("adapter", [BF16, F32])
@pytest.mark.parametrize("tokens", [3, 300])
def test_linears(
    tokens: int, adapter: torch.dtype, quant_type: str | None, current: int, hopper: str
) -> None:
    made = make(
        (tokens, 256), 320, 8, bias=True, dtype=BF16, adapter_dtype=adapter,
        quant_type=quant_type, dropout_p=0.1,
    )  # fmt: skip
    everywhere(lambda device: run_case(made.to(device), ours), current)


def test_what_is_between(current: int) -> None:
    def work(device: torch.device) -> dict[str, Tensor]:
        x, layers = mlp((64, 128), 256, 128, BF16, device, {"quant": True, "p": 0.2})
        seeds = [torch.tensor([seed], device=device) for seed in range(3)]
        y = ops.rms_norm(x, torch.ones(128, dtype=BF16, device=device))
        y = ops.gated_mlp(y, *layers, seed=seeds)
        head = torch.linspace(-1, 1, 1000 * 128, device=device, dtype=BF16).view(1000, 128)
        labels = torch.arange(64, device=device)
        loss = ops.linear_cross_entropy(y, head, labels)
        wanted = leaves(x, layers)
        grads = torch.autograd.grad(loss, wanted)
        return {"y": y, "loss": loss} | {str(i): grad for i, grad in enumerate(grads)}

    everywhere(work, current)


@pytest.mark.parametrize("quant", ["dense", "4bit"])
def test_a_model_over_two_devices(quant: str, tmp_path: Path) -> None:
    """Its layers where accelerate put them: all of them ferrotune's, and as PEFT's own."""
    base_model("llama", BF16).save_pretrained(tmp_path)
    where = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    where |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    options: dict[str, Any] = {"device_map": where, "dtype": BF16}
    if quant == "4bit":
        pytest.importorskip("bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=BF16
        )
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path, **options).train())
    devices = {parameter.device.index for parameter in model.parameters()}
    assert devices == {0, 1}
    with counted() as counts:
        stock, patched, report = both(model, batch("llama", device="cuda"))
    assert not report.left
    assert set(counts) == {None}
    assert_agree(stock, patched, BF16)
    ferrotune.unpatch(model)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, list[Result]], Callable[[Job], Job]]:
    """By the jobs' names, and the jobs with the folder of the model on which they ran."""
    folder = tmp_path_factory.mktemp("jobs")
    base_model("llama").save_pretrained(folder / "model")

    def placed(job: Job) -> Job:
        if job.model is Modules:
            return job
        options = {**job.options, "folder": folder / "model"}
        return Job(job.model, job.wrap, options, device=job.device)

    return run_all([placed(job) for job in JOBS], folder), placed


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_process_for_each_device(
    job: Job, results: tuple[dict[str, list[Result]], Callable[[Job], Job]]
) -> None:
    """Losses, gradients and what is trained, as in one process on the same global batch."""
    found, placed = results
    one = run(Job(job.model, "", placed(job).options, device="cuda"))
    for result in found[job.name]:
        assert not result.left
        assert result.losses == pytest.approx(one.losses, rel=NEAR)
        assert result.reloaded_loss == pytest.approx(one.reloaded_loss, rel=NEAR)
        assert result.gradients.keys() == one.gradients.keys()
        for name, truth in one.gradients.items():
            assert (result.gradients[name] - truth).norm() <= NEAR * truth.norm(), name
    first, second = found[job.name]
    assert first.losses == second.losses
    assert all(torch.equal(first.trained[name], second.trained[name]) for name in first.trained)
