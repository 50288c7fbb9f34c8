"""Pre-train the demo's base model: a small Llama on Python's documentation.

    python -m demo_model.corpus --output build
    python -m demo_model.pretrain --texts build --output build/demo-model

Ordinary PyTorch and transformers: a byte-level BPE tokenizer is trained on the training sources,
then a Llama of 2.4 million parameters in bf16 autocast with f32 master weights. Minutes on one
GPU; a CPU does it overnight. The weights with the lowest held-out loss are kept, in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 4096
CONTEXT = 256


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[np.ndarray, int]:
    """All records as one stream, each between `<s>` and `</s>`, and its length in UTF-8 bytes."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    stream = np.concatenate([np.array([0, *one.ids, 1], dtype=np.int32) for one in encoded])
    return stream, sum(len(text.encode()) for text in texts)


def heldout_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean nats a token over rows `[rows, context + 1]`."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for part in rows.split(64):
            logits = model(input_ids=part[:, :-1]).logits.float()
            target = part[:, 1:].reshape(-1)
            total += torch.nn.functional.cross_entropy(
                logits.reshape(-1, VOCABULARY), target, reduction="sum"
            ).item()
    model.train()
    return total / rows[:, 1:].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, default=Path("build"))
    parser.add_argument("--output", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64, help="rows of 256 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(arguments.device)

    train_texts = read_texts(arguments.texts / "docs-train.jsonl")
    tokenizer = make_tokenizer(train_texts)
    stream, train_bytes = tokens(tokenizer, train_texts)
    held, held_bytes = tokens(tokenizer, read_texts(arguments.texts / "docs-heldout.jsonl"))

    def rows(of: np.ndarray) -> torch.Tensor:
        cut = of[: (len(of) - 1) // CONTEXT * CONTEXT + 1]
        starts = np.arange(0, len(cut) - 1, CONTEXT)
        windows = np.stack([cut[s : s + CONTEXT + 1] for s in starts])
        return torch.from_numpy(windows).long().to(device)

    train = torch.from_numpy(stream).long().to(device)
    held_rows = rows(held)
    model = make_model().to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters; {len(stream):,} training tokens "
        f"({train_bytes / len(stream):.2f} bytes a token), {len(held):,} held out"
    )

    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": arguments.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / arguments.steps))))
        ),
    )

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        return torch.nn.functional.cross_entropy(
            logits.float().reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1)
        )

    step_loss = torch.compile(loss_of) if device.type == "cuda" else loss_of
    offsets = torch.arange(CONTEXT + 1, device=device)
    best, best_step, best_state, history = math.inf, 0, {}, []
    begin = time.time()
    for step in range(1, arguments.steps + 1):
        starts = torch.randint(0, len(train) - CONTEXT - 1, (arguments.batch, 1), device=device)
        loss = step_loss(train[starts + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 250 == 0 or step == arguments.steps:
            held_now = heldout_loss(model, held_rows)
            history.append({"step": step, "train_loss": loss.item(), "heldout_loss": held_now})
            print(
                f"step {step:5d}  train {loss.item():.3f}  held-out {held_now:.3f}  "
                f"{time.time() - begin:.0f} s",
                flush=True,
            )
            if held_now < best:
                best, best_step = held_now, step
                best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    seconds = time.time() - begin
    model.load_state_dict(best_state)
    model = model.to(torch.bfloat16)
    final = heldout_loss(model, held_rows)
    model.config.dtype = torch.bfloat16
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.cpu().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    settings = arguments.output / "tokenizer_config.json"
    # transformers 4 and 5 both know this class; the name that version 5 writes is new.
    content = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    content.pop("backend", None)
    settings.write_text(json.dumps(content, indent=2) + "\n")
    model = model.to(device)
    record = {
        "parameters": parameters,
        "heldout_loss_nats_per_token": round(final, 4),
        "heldout_bits_per_byte": round(final * len(held) / held_bytes / math.log(2), 4),
        "heldout_tokens": int(held_rows[:, 1:].numel()),
        "train_tokens_unique": len(stream),
        "train_tokens_seen": best_step * arguments.batch * CONTEXT,
        "best_step": best_step,
        "steps": arguments.steps,
        "batch_rows": arguments.batch,
        "context": CONTEXT,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "history": history,
    }
    (arguments.output / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "history"}, indent=1))
    prompt = torch.tensor([[0, *tokenizer.encode("The :mod:`json` module")]], device=device)
    sample = model.generate(prompt, max_new_tokens=60, do_sample=True, top_p=0.9, pad_token_id=2)
    print(tokenizer.decode(sample[0]))


if __name__ == "__main__":
    main()
