"""Tiny transformers models with random weights, plain or in bitsandbytes' 4 bits, with LoRA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

VOCABULARY, HIDDEN = 96, 64
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CAPPED = {**_DECODER, "head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16, "d_ff": 128, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_DECODER),
    "mistral": lambda: MistralConfig(**_DECODER, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_DECODER),
    "qwen3": lambda: Qwen3Config(**_DECODER, head_dim=16),
    "gemma": lambda: GemmaConfig(**_DECODER, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_CAPPED),
    "gemma3": lambda: Gemma3TextConfig(**_CAPPED),
    "phi3": lambda: Phi3Config(**_DECODER),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "bert": lambda: BertConfig(**_ENCODER),
    "roberta": lambda: RobertaConfig(**_ENCODER, pad_token_id=1),
    "t5": lambda: T5Config(**_T5),
}
_HEADS: dict[str, Any] = {
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForSequenceClassification,
    "t5": AutoModelForSeq2SeqLM,
}
_SKIPPED = {"bert": ["classifier", "pooler"], "roberta": ["classifier"]}
_TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def base_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model without adapters, of the same weights at every call."""
    torch.manual_seed(0)
    head = _HEADS.get(name, AutoModelForCausalLM)
    model = head.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which start as 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(dtype)


def base_4bit_model(
    name: str, dtype: torch.dtype, folder: Path, device: str = "cpu", **options: Any
) -> Any:
    """The same as transformers loads it with bitsandbytes: NF4, double-quantised.

    In training mode: bitsandbytes repacks weights in evaluation, on processors with AVX512-BF16.
    """
    base_model(name, dtype).save_pretrained(folder)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    if name in _SKIPPED:  # heads that PEFT trains whole cannot be in 4 bits
        settings.setdefault("llm_int8_skip_modules", _SKIPPED[name])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings)
    head = _HEADS.get(name, AutoModelForCausalLM)
    model = head.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=device)
    return model.train()


def with_lora(model: Any, name: str = "llama", *, filled: bool = True, **options: Any) -> PeftModel:
    """The model with LoRA on all its linear layers; lora_B is not zero where ``filled``."""
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    settings |= {"task_type": _TASKS.get(name, "CAUSAL_LM"), **options}
    torch.manual_seed(1)
    made = get_peft_model(model, LoraConfig(**settings))
    if filled:
        fill_lora_b(made)
    return made  # type: ignore[return-value]


@torch.no_grad()
def fill_lora_b(model: torch.nn.Module, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def batch(
    name: str, rows: int = 3, length: int = 12, seed: int = 3, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    if name in ("bert", "roberta"):
        labels = torch.randint(0, 3, (rows,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in found.items()}
