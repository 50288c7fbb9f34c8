"""Training loops run unchanged after ferrotune.patch: transformers' Trainer, TRL's, a plain one."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import ferrotune
from ferrotune.patching.masks import index_dropout
from side_by_side import counted
from tiny_models import VOCABULARY, base_4bit_model, base_model, with_lora

STEPS = 6


def records(rows: int = 24, length: int = 10) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }


def losses(trainer: Any) -> list[float]:
    with index_dropout(trainer.model):
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lora_model() -> Any:
    return with_lora(base_model("llama"), lora_dropout=0.1, filled=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing: bool, tmp_path: Path) -> None:
    curves = []
    for patched in (False, True):
        model = lora_model()
        if patched:
            ferrotune.patch(model, strict=True)
        settings = arguments(tmp_path, gradient_checkpointing=checkpointing)
        settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
        with counted() as counts:
            trainer = Trainer(model, TrainingArguments(**settings), train_dataset=records())
            curves.append(losses(trainer))
        assert set(counts) == ({None} if patched else set())
    assert len(curves[0]) == STEPS
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)  # the Trainer rounds to 4 digits
    resumed = lora_model()
    ferrotune.patch(resumed, strict=True)
    trainer = Trainer(resumed, TrainingArguments(**settings), train_dataset=records())
    with index_dropout(resumed):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert again == pytest.approx(curves[1], abs=2e-4)


def test_trainer_with_bf16_on_4bit(tmp_path: Path) -> None:
    curves = []
    for patched in (False, True):
        base = base_4bit_model("llama", torch.bfloat16, tmp_path / "model")
        model = with_lora(base, lora_dropout=0.1, filled=False)
        if patched:
            ferrotune.patch(model, strict=True)
        settings = TrainingArguments(**arguments(tmp_path, bf16=True))
        curves.append(losses(Trainer(model, settings, train_dataset=records())))
    assert curves[0] == pytest.approx(curves[1], abs=1e-2)


def test_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lora_model()
    classes = [type(module) for module in model.modules()]
    callback = ferrotune.TrainerCallback(strict=True)
    with counted() as counts:
        trainer = Trainer(
            model,
            TrainingArguments(**arguments(tmp_path)),
            train_dataset=records(),
            eval_dataset=records(4),
            callbacks=[callback],
        )
        trainer.train()
    assert counts == {None: 14 * STEPS}
    assert [type(module) for module in model.modules()] == classes
    assert not model._forward_pre_hooks
    assert callback.report is not None
    assert callback.report.counts("LoRA") == (14, 14)
    assert "ferrotune runs 14 of 14 LoRA layers" in capsys.readouterr().out
    speeds = [e["tokens_per_second"] for e in trainer.state.log_history if "loss" in e]
    assert len(speeds) == STEPS
    assert min(speeds) > 0
    assert all("tokens_per_second" not in e for e in trainer.state.log_history if "loss" not in e)


def test_callback_leaves_patched_layers_patched(tmp_path: Path) -> None:
    model = lora_model()
    ferrotune.patch(model)
    callback = ferrotune.TrainerCallback(show=False)
    settings = TrainingArguments(**arguments(tmp_path))
    Trainer(model, settings, train_dataset=records(), callbacks=[callback]).train()
    assert ferrotune.unpatch(model) == 14


def test_callback_refuses_a_model_without_lora(tmp_path: Path) -> None:
    trainer = Trainer(
        base_model("llama"),
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=records(),
        callbacks=[ferrotune.TrainerCallback()],
    )
    with pytest.raises(ferrotune.PatchError, match="no LoRA layers"):
        trainer.train()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def texts(completions: bool) -> Any:
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(0, 90, (count,), generator=generator))

    if completions:
        return Dataset.from_list(
            [{"prompt": words(4 + i % 3), "completion": " " + words(5)} for i in range(24)]
        )
    return Dataset.from_list([{"text": words(6 + i % 7)} for i in range(48)])


@pytest.mark.parametrize("kind", ["packing", "completion-only"])
def test_sft_trainer(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trl = pytest.importorskip("trl")
    caplog.set_level(logging.ERROR)
    curves = []
    options = (
        {"packing": True, "max_length": 24}
        if kind == "packing"
        else {"completion_only_loss": True, "max_length": 32}
    )
    for patched in (False, True):
        model = lora_model()
        if patched:
            ferrotune.patch(model, strict=True)
        with counted() as counts:
            trainer = trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(**arguments(tmp_path), bf16=False, **options),
                train_dataset=texts(kind == "completion-only"),
                processing_class=tokenizer(),
            )
            assert trainer.model is model
            curves.append(losses(trainer))
        assert set(counts) == ({None} if patched else set())
    assert len(curves[0]) == STEPS
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)


def test_sft_trainer_makes_the_peft_model_itself(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from peft import LoraConfig

    callback = ferrotune.TrainerCallback(strict=True, show=False)
    with counted() as counts:
        trainer = trl.SFTTrainer(
            model=base_model("llama"),
            args=trl.SFTConfig(**arguments(tmp_path), bf16=False, max_length=24),
            train_dataset=texts(False),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[callback],
        )
        trainer.train()
    assert set(counts) == {None}
    assert counts[None] >= 14 * STEPS
    assert all("tokens_per_second" in e for e in trainer.state.log_history if "loss" in e)


def test_plain_loop() -> None:
    curves = []
    for patched in (False, True):
        model = lora_model().train()
        if patched:
            ferrotune.patch(model, strict=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        torch.manual_seed(0)
        found = []
        with index_dropout(model):
            for start in range(0, 24, 4):
                rows = records()[start : start + 4]
                inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
                loss = model(**inputs).loss
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                found.append(float(loss.detach()))
        curves.append(found)
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
