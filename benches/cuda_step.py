"""A whole QLoRA training step of a Llama-shaped model, beside PEFT + bitsandbytes and Unsloth.

``python benches/cuda_step.py --peers FOLDER`` writes results/cuda_step.{md,json}. The model has
random weights, which it writes once and every contender loads in NF4 (double-quantised); LoRA
r = 16 on all seven projections, bf16 autocast, AdamW. Each contender has a process of its own.
``--profile`` also writes where a step's time goes, results/cuda_step_profile.{md,json}.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timeline

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
}  # fmt: skip
CONTENDERS = ("ferrotune", "Unsloth", "PEFT + bitsandbytes")


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration; ``least`` is what Unsloth's tokens/s are multiplied by for the bar.

    With ``memory`` ferrotune runs under that policy, and what is beside it as without.
    """

    layers: int
    batch: int
    checkpointing: bool
    least: float | None
    shape: str = "llama-3-8b"
    length: int = 2048
    dropout: float = 0.0
    memory: str | None = None

    def __str__(self) -> str:
        kept = "with" if self.checkpointing else "without"
        dropped = f", dropout {self.dropout:g}" if self.dropout else ""
        what = f"{kept} checkpointing"
        if self.memory:
            what = f"policy {self.memory}" + (f" beside {what}" if self.checkpointing else "")
        return (
            f"{self.shape}, {self.layers} layers, {self.batch}x{self.length} tokens, "
            f"{what}{dropped}"
        )


CASES = [
    Case(8, 4, True, None),
    Case(8, 4, False, 1.2),
    Case(8, 1, False, 1.3),
    Case(8, 4, False, None, dropout=0.05),
    Case(16, 4, False, None, "llama-3.2-1b"),
    Case(8, 4, False, None, "qwen2.5-7b"),
    Case(32, 2, True, None),
    Case(32, 2, False, 1.3),
    Case(32, 2, False, None, memory="auto"),
    Case(8, 4, False, None, memory="9 GiB"),
    Case(8, 4, False, None, memory="7 GiB"),
    Case(8, 4, False, None, memory="5 GiB"),
    Case(8, 4, True, 1.2, memory="5.2 GiB"),
    Case(32, 2, True, 1.25, memory="7.05 GiB"),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--peers", help="a folder to put first on the path")
    parser.add_argument("--cases", default="0,1,2", help="numbers of the cases, from 0")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which to run")
    parser.add_argument(
        "--models", default="/tmp/ferrotune-models", help="where models are written"
    )
    parser.add_argument("--steps", type=int, default=12, help="of which four warm up")
    parser.add_argument("--name", default="cuda_step", help="name of the result files")
    parser.add_argument("--resume", action="store_true", help="keep the file's other figures")
    parser.add_argument("--profile", action="store_true", help="write where the time goes, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker), options)
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    import cuda_common as cuda

    import common

    packages = ["torch", "transformers", "peft", "bitsandbytes", "unsloth"]
    record: dict[str, Any] = {"machine": cuda.machine(packages), "results": {}, "planned_gib": {}}
    file = common.RESULTS / f"{options.name}.json"
    if options.resume and file.is_file():
        earlier = json.loads(file.read_text())
        same = [found["machine"] for found in (earlier, record)]
        if any(same[0].get(name) != same[1].get(name) for name in ("commit", "device", "versions")):
            print(f"{file} is of another commit, device or version: not added to", file=sys.stderr)
            return 2
        record |= {name: earlier[name] for name in ("results", "planned_gib")}
    chosen = [CASES[int(number)] for number in options.cases.split(",")]
    passed = True
    profiled = {"machine": record["machine"], "results": {}}
    for case in chosen:
        alone = case.memory and not case.checkpointing
        names = ["ferrotune"] if alone else options.contenders.split(",")
        found = {name: run(name, case, options) for name in names}
        kept = record["results"].setdefault(str(case), {})
        profiled["results"][str(case)] = {
            name: {"step_ms": one["step_ms"]}
            | {part: one.pop(part) for part in ("shares", "rates") if part in one}
            for name, one in found.items()
            if one
        }
        kept |= {name: one for name, one in found.items() if one}
        ours = found.get("ferrotune") or {}
        record["planned_gib"][str(case)] = ours.get("policy_gib") or planned_gib(case)
        passed = write(options.name, record)
        if options.profile:
            write_profile(profiled)
    return 0 if passed else 1


def write_profile(record: dict[str, Any]) -> None:
    """Each case's time line by family, beside what could not take less."""
    import common

    parts = [f"{record['machine']['device']}, driver for {record['machine']['driver']}."]
    for case in (one for one in CASES if str(one) in record["results"]):
        for name, found in record["results"][str(case)].items():
            parts.append(profile_of(case, name, found))
    method = (
        "One step of each, its kernels' times without overlaps; floors are operations over what "
        "cuBLAS sustains and bytes over what a copy does, here, of a step that recomputes nothing."
    )
    body = "\n\n".join(parts)
    common.write("cuda_step_profile", "Where a step's time goes", record, body, [], method)


def profile_of(case: Case, name: str, found: dict[str, Any]) -> str:
    import common

    operations, copied = found["rates"]
    work = timeline.floors(SHAPES[case.shape], case.layers, case.batch * case.length, case.length)
    least = {part: -one / operations if one < 0 else one / copied for part, one in work.items()}
    whole = sum(one[0] for part, one in found["shares"].items() if part != timeline.COPIES)
    rows: list[list[object]] = []
    for part, (spent, kernels) in found["shares"].items():
        floor = f"{least.pop(part):.1f}" if part in least else ""
        rows.append([part, f"{spent:.1f}", f"{100 * spent / whole:.1f} %", kernels or "", floor])
    products = least.pop("products")
    rows.append(["all products", "", "", "", f"{products:.1f}"])
    text = common.table(["what", "ms", "of the step", "kernels", "floor, ms"], rows)
    return (
        f"## {case}, {name}: {whole:.1f} ms (unprofiled {found['step_ms']:.1f})\n\n"
        f"cuBLAS sustains {operations / 1e9:.0f} TFLOP/s, a copy {copied / 1e9:.2f} TB/s.\n\n{text}"
    )


def write(name: str, record: dict[str, Any]) -> bool:
    """Writes the results of a record, and returns whether their bars are met."""
    import common

    rows: list[list[object]] = []
    plans: list[list[object]] = []
    bars: list[common.Bar] = []
    for case in (one for one in CASES if str(one) in record["results"]):
        found = record["results"][str(case)]
        ours, theirs = found.get("ferrotune"), found.get("Unsloth")
        for by, one in found.items():
            ratio = f"{ours['step_ms'] / one['step_ms']:.2f}" if ours else ""
            rows.append(
                [str(case), by, f"{one['step_ms']:.1f}", f"{one['tokens_per_second']:.0f}",
                 f"{one['peak_gib']:.2f}", ratio, f"{one['losses'][-1]:.4f}"]
            )  # fmt: skip
        if ours:
            planned = record["planned_gib"][str(case)]
            off = planned / ours["peak_gib"] - 1
            plans.append([str(case), f"{planned:.2f}", f"{ours['peak_gib']:.2f}", f"{off:+.1%}"])
            bars.append(
                common.Bar(f"{case}: plan's error", 100 * abs(off), 5, at_least=False, unit="%")
            )
        without = record["results"].get(str(dataclasses.replace(case, dropout=0.0)), {})
        if ours and case.dropout and "ferrotune" in without:
            slower = ours["step_ms"] / without["ferrotune"]["step_ms"]
            bars.append(
                common.Bar(f"{case}: time over without dropout", slower, 1.05, at_least=False)
            )
        if ours and theirs and case.least:
            speed = theirs["step_ms"] / ours["step_ms"]
            bars.append(common.Bar(f"{case}: speed over Unsloth", speed, case.least))
            more = ours["peak_gib"] / theirs["peak_gib"]
            bars.append(common.Bar(f"{case}: memory of Unsloth's", more, 1.0, at_least=False))
    header = ["case", "by", "ms a step", "tokens/s", "peak GiB", "ours over it", "last loss"]
    body = common.table(header, rows)
    if plans:
        peaks = ["ferrotune", "GiB planned", "GiB measured", "error"]
        body += "\n\n`ferrotune plan` beside it:\n\n" + common.table(peaks, plans)
    where = record["machine"]
    body = f"{where['device']}, driver for {where['driver']}.\n\n{body}"
    method = "Median of the steps after the warm-up; each contender in a process of its own."
    return common.write(name, "A QLoRA training step", record, body, bars, method)


def run(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """One contender's figures, from a process of its own; None if that failed."""
    given = json.dumps({"name": name, **dataclasses.asdict(case)})
    arguments = [sys.executable, __file__, "--worker", given, "--models", options.models]
    arguments += ["--steps", str(options.steps)]
    arguments += ["--peers", options.peers] if options.peers else []
    arguments += ["--profile"] if options.profile else []
    found = last_line(arguments, f"{case}: {name}")
    if found is not None:
        print(f"{case}: {name} {found['step_ms']:.1f} ms, {found['peak_gib']:.2f} GiB", flush=True)
    return found


def last_line(arguments: list[str], what: str) -> dict[str, Any] | None:
    """The JSON that a process ends its output with, and shows the rest of; None if it failed."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    *said, last = done.stdout.splitlines() or [""]
    print("\n".join(said), flush=True)
    try:
        found: dict[str, Any] = json.loads(last)
    except json.JSONDecodeError:
        print(f"without {what}:\n{done.stdout[-500:]}{done.stderr[-1500:]}", flush=True)
        return None
    return found


def worker(given: dict[str, Any], options: argparse.Namespace) -> None:
    name = given.pop("name")
    case = Case(**given)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    if options.peers:
        sys.path.insert(0, options.peers)
    if name == "Unsloth":
        import unsloth  # type: ignore[import-not-found]  # before transformers

        _ = unsloth
    import torch

    torch.manual_seed(0)
    folder = Path(options.models) / f"{case.shape}-{case.layers}"
    if not (folder / "config.json").is_file():
        make(case, folder)
    model = load(name, case, folder)
    if name != "ferrotune":
        case = dataclasses.replace(case, memory=None)
    print(json.dumps(train(model, case, options)), flush=True)


def make(case: Case, folder: Path) -> None:
    """The model and a tokenizer, which Unsloth wants."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    kind = Qwen2Config if case.shape.startswith("qwen") else LlamaConfig
    config = kind(
        **SHAPES[case.shape], num_hidden_layers=case.layers, max_position_embeddings=8192,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(torch.bfloat16).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    del model
    torch.cuda.empty_cache()


def load(name: str, case: Case, folder: Path) -> Any:
    import torch

    settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": TARGETS}
    settings["lora_dropout"] = case.dropout
    if name == "Unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=case.length, load_in_4bit=True, dtype=torch.bfloat16,
            local_files_only=True,
        )  # fmt: skip
        checkpointing = "unsloth" if case.checkpointing else False
        return FastLanguageModel.get_peft_model(
            model, **settings, use_gradient_checkpointing=checkpointing, random_state=0
        )
    checkpointing = case.checkpointing and not (name == "ferrotune" and case.memory)
    return adapted(name, base_model(folder), settings, checkpointing, case.memory)


def base_model(folder: Path) -> Any:
    """The model in bitsandbytes' NF4, double-quantised."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )


def adapted(
    name: str,
    model: Any,
    settings: dict[str, Any],
    checkpointing: bool,
    memory: str | None = None,
) -> Any:
    """A 4-bit model with PEFT's LoRA, run by PEFT + bitsandbytes or by ferrotune."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    reentrant = {"use_reentrant": False}
    if name == "PEFT + bitsandbytes":  # as its documentation has it
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=reentrant,
        )  # fmt: skip
    model = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    if name == "ferrotune":
        import ferrotune

        if checkpointing:
            model.gradient_checkpointing_enable(reentrant)
            model.enable_input_require_grads()
        report = ferrotune.patch(model, fused_loss=True, memory=memory)
        print(str(report).splitlines()[0], flush=True)
    return model


def planned_gib(case: Case) -> float:
    """The peak that `ferrotune plan` gives for ferrotune's run of a case."""
    from ferrotune.planning.memory import Setup, memory
    from ferrotune.planning.shapes import shape_of

    kind = "qwen2" if case.shape.startswith("qwen") else "llama"
    config = {"model_type": kind, "num_hidden_layers": case.layers, **SHAPES[case.shape]}
    setup = Setup(
        batch_size=case.batch, sequence_length=case.length, checkpointing=case.checkpointing,
        lora_dropout=case.dropout,
    )  # fmt: skip
    return memory(shape_of(config, case.shape), setup).peak / 2**30


def policy_gib(model: Any, case: Case) -> float | None:
    """The peak by which a memory policy was chosen; prints the policy."""
    if case.memory is None:
        return None
    import ferrotune

    found = ferrotune.patch(model).memory
    print(found, flush=True)
    return None if found is None or found.peak is None else found.peak / 2**30


def train(model: Any, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Median time of a step, peak memory after the first ones, losses."""
    import torch

    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(4, 1000, (case.batch, case.length), device="cuda")
    times, losses = [], []

    def step() -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for i in range(options.steps):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        losses.append(round(float(loss), 4))
        if i == 3:
            torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(times[4:])
    figures = {
        "step_ms": seconds * 1e3,
        "spread_ms": [min(times[4:]) * 1e3, max(times[4:]) * 1e3],
        "tokens_per_second": case.batch * case.length / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "policy_gib": policy_gib(model, case),
        "losses": losses,
        "trained": sum(parameter.numel() for parameter in trained),
    }
    if options.profile:
        figures["shares"] = timeline.shares(timeline.recorded(step))
        figures["rates"] = timeline.rates()
    return figures


if __name__ == "__main__":
    sys.exit(main())
