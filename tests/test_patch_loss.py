"""The fused loss of patched causal models: the stock model's loss and gradients, without logits."""

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainingArguments,
)

import ferrotune
from side_by_side import assert_agree, counted
from test_trainers import arguments, losses, records, texts, tokenizer
from tiny_models import base_4bit_model, base_model, batch, with_lora

MODELS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2"]
NO_LOGITS = "in training with labels, without logits"


def lora_model(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return with_lora(base_model(name, dtype).train(), name, **options)


def grads(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def compare(model: Any, dtype: torch.dtype = torch.float32, **given: Any) -> None:
    """Loss and gradients of the stock and of the patched model, which it stays."""
    ferrotune.unpatch(model)
    torch.manual_seed(0)  # of dropout
    stock = grads(model, model(**given).loss)
    ferrotune.patch(model, fused_loss=True)
    torch.manual_seed(0)
    with counted() as counts:
        output = model(**given)
    assert set(counts) == {None}
    assert output.logits is None
    assert_agree(stock, grads(model, output.loss), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str, dtype: torch.dtype) -> None:
    model = lora_model(name, dtype)
    certificate = ferrotune.verify(model, batch(name), fused_loss=True)
    assert certificate.passed, str(certificate)
    assert certificate.layers["loss"] == (1, 1)
    assert not certificate.own_forward
    loss = [one for one in certificate.differences if one.kind == "output"]
    assert [one.tensors for one in loss] == [1]
    compare(model, dtype, **batch(name))


def test_the_report_and_the_way_back() -> None:
    model = lora_model()
    classes = [type(module) for module in model.modules()]
    signature = inspect.signature(model.base_model.model.forward)
    plain = ferrotune.patch(model)
    assert plain.counts("loss") == (0, 0)
    assert model(**batch("llama")).logits is not None
    report = ferrotune.patch(model, fused_loss=True)
    assert report.counts("loss") == (1, 1)
    (row,) = [layer for layer in report.layers if layer.kind == "loss"]
    assert (row.name, row.layer) == ("base_model.model", "LlamaForCausalLM")
    assert row.details == "V=96 d=64 float32"
    assert row.outcome == f"ferrotune linear cross-entropy ({NO_LOGITS})"
    assert str(report).startswith("ferrotune runs 1 of 1 losses and 14 of 14 LoRA layers")
    assert ferrotune.patch(model).counts("loss") == (1, 1)  # what is replaced is reported
    assert inspect.signature(model.base_model.model.forward) == signature
    assert type(model.base_model.model).__name__ == "LlamaForCausalLM"
    assert ferrotune.unpatch(model) == 15
    assert [type(module) for module in model.modules()] == classes


def test_everything_else_is_stock() -> None:
    model = lora_model()
    given = batch("llama")
    stock = model(**given)
    ferrotune.patch(model, fused_loss=True)
    without = {name: tensor for name, tensor in given.items() if name != "labels"}
    with counted() as counts:
        torch.testing.assert_close(model(**without).logits, stock.logits)
        with torch.no_grad():
            assert model(**given).logits is not None
        model.eval()
        torch.testing.assert_close(model(**given).logits, stock.logits)
        torch.testing.assert_close(model(**given).loss, stock.loss)
    assert set(counts) == {None}  # of LoRA layers


def test_arguments_of_the_forward() -> None:
    model = lora_model()
    given = batch("llama")
    ids, mask, labels = given["input_ids"], given["attention_mask"], given["labels"]
    compare(model, **given, num_items_in_batch=torch.tensor(7))
    compare(model, **given, num_items_in_batch=5)
    compare(model, **given, shift_labels=labels.roll(-2, 1))
    compare(model, **given | {"labels": ids}, ignore_index=4)
    want = model(**given).loss
    causal = model.base_model.model
    assert torch.equal(causal(ids, mask, labels=labels).loss, want)
    loss, *rest = causal(**given, return_dict=False)
    assert torch.equal(loss, want)
    assert not [one for one in rest if isinstance(one, torch.Tensor)]
    output = model(**given, output_hidden_states=True, use_cache=True)
    assert len(output.hidden_states) == 3
    assert output.past_key_values is not None
    assert model(**given).past_key_values is None  # not filled where nobody asks
    embedded = causal.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss, want)


@pytest.mark.parametrize(
    ("reason", "given"),
    [
        ("its loss function is not transformers' own", {}),
        ("logits_to_keep asks for some of the logits", {"logits_to_keep": 12}),
        ("its head has hooks", {}),
    ],
)
def test_what_the_stock_forward_keeps(
    reason: str, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = lora_model()
    causal = model.base_model.model
    inputs = batch("llama") | given
    stock = model(**inputs)
    ferrotune.patch(model, fused_loss=True)
    if "loss function" in reason:
        own = causal.loss_function
        causal.loss_function = lambda **given: own(**given) * 2
    elif "hooks" in reason:
        causal.lm_head.register_forward_hook(lambda *_: None)
    with counted() as counts:
        output = model(**inputs)
    assert counts[reason] == 1
    torch.testing.assert_close(output.logits, stock.logits)
    torch.testing.assert_close(output.loss, stock.loss * (2 if "function" in reason else 1))


HEADS: list[tuple[str, dict[str, Any]]] = [
    ("adapted", {"target_modules": ["q_proj", "v_proj", "lm_head"]}),
    ("trained whole", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("kind", "options"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_heads(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = lora_model(dtype=dtype, **options)
    compare(model, dtype, **batch("llama"))
    trained = [
        name for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad
    ]
    assert trained
    assert all(model.get_parameter(name).grad.any() for name in trained)
    ferrotune.unpatch(model)
    with model.disable_adapter():
        stock = model(**batch("llama"))
    ferrotune.patch(model, fused_loss=True)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch("llama")).loss, stock.loss, rtol=1e-2, atol=1e-2)


def test_an_adapted_head_with_dropout() -> None:
    model = lora_model(target_modules=["q_proj", "lm_head"], lora_dropout=0.3)
    certificate = ferrotune.verify(model, batch("llama"), fused_loss=True)
    assert certificate.passed, str(certificate)
    assert certificate.dropout


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_without_adapters(name: str) -> None:
    """All weights are trained; GPT-2's head is its embedding."""
    model = base_model(name).train()
    with pytest.raises(ferrotune.PatchError, match="no LoRA layers"):
        ferrotune.patch(model)
    compare(model, **batch(name))
    assert ferrotune.unpatch(model) == 1


def test_a_4bit_model(tmp_path: Path) -> None:
    model = with_lora(base_4bit_model("llama", torch.bfloat16, tmp_path))
    compare(model, torch.bfloat16, **batch("llama"))


def test_autocast() -> None:
    model = lora_model()
    with torch.autocast("cpu", torch.bfloat16):
        compare(model, torch.bfloat16, **batch("llama"))


def test_an_architecture_without_a_fused_loss() -> None:
    settings = {"vocab_size": 96, "hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 1}
    config = OPTConfig(**settings, num_attention_heads=4, word_embed_proj_dim=64)
    model = with_lora(OPTForCausalLM(config).train(), target_modules=["q_proj"])
    report = ferrotune.patch(model, strict=True, fused_loss=True)
    assert report.counts("loss") == (0, 1)
    (row,) = report.left
    assert row.reason == "there is no fused loss for OPTForCausalLM"
    assert model(**batch("llama")).logits is not None


def test_copies_and_files(tmp_path: Path) -> None:
    model = base_model("llama").train()
    ferrotune.patch(model, fused_loss=True)
    twin = copy.deepcopy(model)
    want = model(**batch("llama"))
    assert torch.equal(twin(**batch("llama")).loss, want.loss)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    again = type(base_model("llama")).from_pretrained(tmp_path).train()
    torch.testing.assert_close(again(**batch("llama")).loss, want.loss)


def test_a_forward_that_a_library_kept() -> None:
    model = base_model("llama").train()
    ferrotune.patch(model, fused_loss=True)
    kept = model.forward
    assert kept(**batch("llama")).logits is None
    ferrotune.unpatch(model)
    assert kept(**batch("llama")).logits is not None


def test_trainer(tmp_path: Path) -> None:
    """With accumulated batches of several lengths, and evaluation in between, which has logits."""
    rows = records()
    for i, row in enumerate(rows):
        row["labels"][: i % 7] = -100
    curves, evaluations = [], []
    settings = arguments(
        tmp_path, gradient_accumulation_steps=3, eval_strategy="steps", eval_steps=3
    )

    def shapes(predictions: Any) -> dict[str, float]:
        return {"logits": float(predictions.predictions.shape[-1])}

    for fused in (False, True):
        model = with_lora(base_model("llama"), filled=False)
        with counted() as counts:
            trainer = Trainer(
                model,
                TrainingArguments(**settings),
                train_dataset=rows,
                eval_dataset=rows[:4],
                compute_metrics=shapes,
                callbacks=[ferrotune.TrainerCallback(fused_loss=fused, show=False)],
            )
            curves.append(losses(trainer))
        log = trainer.state.log_history
        evaluations.append([entry["eval_loss"] for entry in log if "eval_loss" in entry])
        assert all(entry["eval_logits"] == 96 for entry in log if "eval_logits" in entry)
        assert set(counts) == {None}
        assert ferrotune.unpatch(model) == 0
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)
    assert evaluations[0] == pytest.approx(evaluations[1], abs=2e-4)
    assert len(evaluations[0]) == 2


@pytest.mark.parametrize("early", [False, True])
def test_sft_trainer(early: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL has a fused loss of its own, with the token accuracy that it reports: it stays."""
    trl = pytest.importorskip("trl")
    caplog.set_level(logging.ERROR)
    curves = []
    for fused in (False, True):
        model = with_lora(base_model("llama"), filled=False)
        callback = ferrotune.TrainerCallback(fused_loss=fused, show=False)
        if early:
            ferrotune.patch(model, fused_loss=fused)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**arguments(tmp_path), bf16=False, max_length=24),
            train_dataset=texts(False),
            processing_class=tokenizer(),
            callbacks=[] if early else [callback],
        )
        curves.append(losses(trainer))
        if fused and not early:
            assert callback.report is not None
            (row,) = callback.report.left
            assert row.reason is not None
            assert "its forward is replaced on the instance" in row.reason
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()
    model = base_model("llama").train()
    ferrotune.patch(model, fused_loss=True)
    want = grads(model, model(**batch("llama")).loss)
    compiled = torch.compile(model, backend="aot_eager")
    output = compiled(**batch("llama"))
    assert output.logits is None
    assert_agree(want, grads(model, output.loss))
