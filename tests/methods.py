"""Methods beside LoRA: tiny models, adapters with random values in PEFT, short runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import ferrotune
from families import VOCABULARY as TINY
from families import Rows, build, gradients, rows
from labels import TOPICS, classifier, write_labelled
from llamas import Array, Batch, Computed, batch, computing_in, save
from texts import VOCABULARY, add_tokenizer, write_lines

Family = tuple[str, str]
CAUSAL: list[Family] = [("llama", "ForCausalLM"), ("gpt2", "LMHeadModel")]
LABELLED: list[Family] = [
    (family, "ForSequenceClassification") for family in ("llama", "gpt2", "bert")
]
FAMILIES = CAUSAL + LABELLED


def classifies(family: Family) -> bool:
    return family[1] == "ForSequenceClassification"


def task_of(family: Family) -> str:
    return "SEQ_CLS" if classifies(family) else "CAUSAL_LM"


def in_peft(base: Path, family: Family, adapter: Path, dtype: str = "float64") -> Any:
    """What PEFT reads, computing in `dtype`, its adapter trainable."""
    import transformers
    from peft import PeftModel

    kind = "ForSequenceClassification" if classifies(family) else "ForCausalLM"
    source = adapter if (adapter / "config.json").exists() else base
    config = transformers.AutoConfig.from_pretrained(source)
    auto: Any = getattr(transformers, f"AutoModel{kind}")
    model = auto.from_pretrained(base, config=config, attn_implementation="sdpa")
    # PEFT makes no prompt that it reads trainable; `computed` wants the gradients all the same.
    read = PeftModel.from_pretrained(model, str(adapter))
    for name, parameter in read.named_parameters():
        own = any(part in name for part in ("ia3_l", "prompt_encoder", ".modules_to_save."))
        parameter.requires_grad_(own)
    return computing_in(read, dtype)


def write_peft(family: Family, folder: Path, config: Any, std: float = 0.3) -> tuple[Path, Path]:
    """A model's folder, and an adapter of `config` with random values beside it."""
    import torch
    from peft import get_peft_model

    base = save(build(*family), folder / "base")
    model = get_peft_model(build(*family), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.normal_(mean=1, std=std, generator=generator)
            elif parameter.requires_grad:
                parameter.normal_(std=std, generator=generator)
    model.save_pretrained(str(folder / "adapter"))
    return base, folder / "adapter"


def inputs(family: Family, vocabulary: int = TINY, lengths: tuple[int, ...] = (9, 9, 9)) -> Batch:
    """Rows of one length, so that PEFT's pooling of padded prompts does not matter."""
    if classifies(family):
        data = rows(list(lengths))
        labels = np.minimum(data.labels, len(TOPICS) - 1)
        return Rows(data.ids, data.lengths, labels).batch()
    return batch(vocabulary, len(lengths), max(lengths))


def computed(model: Any, data: Batch, family: Family, lengths: tuple[int, ...] = ()) -> Computed:
    """torch's logits of the real tokens (of a classifier: of the rows), loss and gradients."""
    import torch

    ids = torch.from_numpy(data.ids.astype(np.int64))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask).logits
    targets = torch.from_numpy(data.targets.astype(np.int64))
    if classifies(family):
        targets = targets.max(1).values
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    else:
        logits = logits[:, -ids.shape[1] :]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
    loss.backward()
    return Computed(logits.detach().numpy(), float(loss.detach()), gradients(model))


def in_engine_names(found: dict[str, Array]) -> dict[str, Array]:
    """PEFT's gradients by the names of the engine's tensors."""
    return {
        name.removeprefix("base_model.")
        .removeprefix("model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): values
        for name, values in found.items()
    }


def with_data(family: Family, folder: Path) -> Path:
    """A model with a tokenizer, and data beside it."""
    if classifies(family):
        write_labelled(folder / "train.jsonl", 48)
        write_labelled(folder / "heldout.jsonl", 18, seed=1)
        return classifier(family[0], folder / "base", num_labels=len(TOPICS))
    save(build(*family, vocab_size=VOCABULARY), folder / "base")
    add_tokenizer(folder / "base")
    write_lines(folder / "train.jsonl", 60)
    write_lines(folder / "heldout.jsonl", 20)
    return folder / "base"


def settings(base: Path, output: Path, method: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": base, "data": base.parent / "train.jsonl", "output": output, "method": method,
        "engine": "embedded",
        "heldout_data": base.parent / "heldout.jsonl", "near_duplicates": 0.0, "audit": "off",
        "sequence_length": 40, "batch_size": 6, "max_steps": 6, "learning_rate": 1e-2,
        "warmup_steps": 0, "eval_every": 2, "threads": 2, "progress": False, **changes,
    }  # fmt: skip


def train(base: Path, output: Path, method: str, **changes: Any) -> ferrotune.TrainResult:
    return ferrotune.train(**settings(base, output, method, **changes))


def tensors(adapter: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return load_file(adapter / "adapter_model.safetensors")
