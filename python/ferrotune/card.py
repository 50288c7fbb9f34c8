"""Model cards: Markdown under the front matter that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import tables
from .results import WHOLE_MODEL, TrainResult
from .tables import Table
from .version import version

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# The settings that say something about the weights, in the order of train's signature.
_SHOWN = (
    "engine", "task", "method", "trained_layers", "r", "lora_alpha", "lora_dropout", "use_rslora",
    "rank_pattern", "alpha_pattern", "target_modules", "feedforward_modules",
    "num_virtual_tokens", "prompt_tuning_init", "adapter_variant", "reduction_factor",
    "quant_type", "blocksize", "double_quant",
    "sequence_length", "packing", "batch_size", "gradient_accumulation", "epochs", "max_steps",
    "max_seconds", "learning_rate", "warmup_steps", "schedule", "min_learning_rate_ratio",
    "weight_decay", "beta1", "beta2", "eps", "max_grad_norm", "seed", "heldout", "test", "group",
    "eval_every", "eval_tokens", "patience", "bias_column", "bias_terms", "split_seed", "shots",
    "repeats",
)  # fmt: skip
_LORA = ("lora", "qlora")
_LORA_ALONE = set(_SHOWN[4:10])
_MODULES_ALONE = {"target_modules", "feedforward_modules"}
_PROMPTS = ("prompt", "prefix")
_QUANTISED_ALONE = {"quant_type", "blocksize", "double_quant"}


def render(
    result: TrainResult,
    settings: Mapping[str, Any],
    files: Sequence[tuple[str, int, str]],
    in_weights: bool = True,
) -> str:
    """The card of a run; `in_weights` places it in the weights' folder, else in the run's.

    `files` are the data's (path, bytes, SHA-256).
    """
    base = base_name(settings["model"])
    curves = "" if in_weights else "\n\n![Loss curves](curves.png)"
    sections = (
        _front_matter(base, settings["method"], result),
        f"# {_title(base, settings['method'])}\n\n{_summary(result, settings, base)}",
        f"## Results\n\n{_results(result).markdown()}{_classes(result)}{_words(result)}{curves}",
        *_bias(result, in_weights),
        f"## Limits\n\n{_bullets(limits(result, settings))}",
        f"## Use\n\n{_use(result, settings, in_weights)}",
        f"## Data\n\n{_data(result, files)}",
        f"## Settings\n\n{_settings(settings).markdown()}",
    )
    return "\n\n".join(sections) + "\n"


def base_name(model: str) -> str:
    """The base model's name on the Hub where its config.json tells it, else its folder's name."""
    folder = Path(model)
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        name = ""
    if isinstance(name, str) and _HUB_NAME.fullmatch(name):
        return name
    return folder.resolve().name


def _words(result: TrainResult) -> str:
    forgetting = result.forgetting and result.forgetting.sentence()
    said = (result.verdict and result.verdict.text, forgetting)
    return "".join(f"\n\n{text}" for text in said if text)


def _bias(result: TrainResult, in_weights: bool) -> tuple[str, ...]:
    if result.bias is None:
        return ()
    plot = "" if in_weights else "\n\n![How groups are treated](bias.png)"
    return (f"## Bias\n\n{result.bias.markdown()}{plot}",)


def _classes(result: TrainResult) -> str:
    """The classes' measures and the confusion matrix on the test split, or else held out."""
    found, side = result.classification, "held-out"
    if result.test is not None and result.test.classification is not None:
        found, side = result.test.classification, "test"
    if found is None:
        return ""
    note = (
        f"On {tables.count(found.examples)} {side} texts; in brackets the 95 % interval of 1,000 "
        "bootstrap resamples of them."
    )
    return f"\n\n{note}\n\n{found.markdown()}"


def _front_matter(base: str, method: str, result: TrainResult) -> str:
    adapter = method not in WHOLE_MODEL
    relation = "adapter" if adapter else "finetune"
    family = str(result.model.get("architecture", "")).partition("For")[0].lower()
    family = family.removesuffix("lmheadmodel") or "llama"
    task = "text-generation" if result.classification is None else "text-classification"
    tags = [method, "ferrotune", family, f"base_model:{relation}:{base}"]
    library = "transformers"
    if adapter:
        library = "ferrotune" if method == "adapter" else "peft"
    lines = [
        f"base_model: {json.dumps(base)}",
        f"base_model_relation: {relation}",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _title(base: str, method: str) -> str:
    return f"{base}, fine-tuned" if method in WHOLE_MODEL else f"{base}, {method} adapter"


def _summary(result: TrainResult, settings: Mapping[str, Any], base: str) -> str:
    layers = settings["trained_layers"]
    how = {
        "lora": "LoRA adapters",
        "qlora": f"LoRA adapters over {settings['quant_type'].upper()} weights",
        "ia3": "(IA)³ vectors",
        "prompt": f"{settings.get('num_virtual_tokens')} virtual tokens before each text",
        "prefix": f"{settings.get('num_virtual_tokens')} virtual keys and values in every layer",
        "adapter": f"{str(settings.get('adapter_variant')).capitalize()} bottleneck adapters",
        "full": "every weight trained",
        "freeze": f"the head{f' and the last {layers} blocks' if layers else ''} trained",
    }[settings["method"]]
    folder = Path(settings["model"]).resolve().name
    where = "" if folder == base else f" (`{folder}`)"
    return (
        f"{base}{where} fine-tuned with [ferrotune](https://pypi.org/project/ferrotune/) "
        f"{version()}: {how}, {tables.count(result.steps)} steps over "
        f"{tables.count(result.tokens)} tokens."
    )


def _results(result: TrainResult) -> Table:
    last = tables.loss_text(result.heldout_loss_last)
    rows = [row for row in result.rows() if row[0] != "output"]
    unit = "token" if result.classification is None else "label"
    rows.insert(2, ("held-out loss, last evaluation", f"{last} nats per {unit}"))
    if result.data.get("heldout_tokens") is not None:
        rows.insert(3, ("held-out tokens", tables.count(result.data["heldout_tokens"])))
    return Table("Results", tuple(rows))


def limits(result: TrainResult, settings: Mapping[str, Any]) -> list[str]:
    """What the run does not show, and what its reader should know of it."""
    limits = []
    if result.heldout_loss_before is None:
        limits.append("No data was held out: nothing here says how the model does on new text.")
    elif settings["heldout_data"]:
        limits.append(
            "The held-out loss is that of the files named below, which also chose the best "
            "weights: expect a little more on other text."
        )
    else:
        by = f"by `{settings['group']}`" if settings["group"] else "record by record"
        limits.append(
            f"The held-out text comes from the same files as the training text, split {by}, and "
            "also chose the best weights: it says little about text from elsewhere."
        )
    if result.test is not None:
        read = "and was read once, at the end"
        if result.bias is not None:
            read = "though it was read before training, too, to compare how groups are treated"
        limits.append(f"The test split chose nothing {read}: its numbers are the ones to go by.")
    seeds = f"One run with one seed ({settings['seed']})"
    if result.repeats:
        seeds = f"{len(result.repeats)} runs, seeds {settings['seed']} to {result.repeats[-1].seed}"
    limits.append(
        f"{seeds}; an evaluation reads at most {tables.count(settings['eval_tokens'])} tokens."
    )
    known = "the loss on the held-out text alone: no task,"
    if result.classification is not None:
        known = "how the held-out texts are classified:"
    lost = "" if result.forgetting else ", nor what the model lost of what it knew before"
    bias = ", no bias but what is said above" if result.bias else ", no bias"
    limits.append(f"Known here is {known} no safety{bias}{lost}.")
    skipped, cut = result.data.get("skipped_total") or 0, result.data.get("truncated") or 0
    if skipped or cut:
        limits.append(
            f"Records that were skipped: {tables.count(skipped)}; truncated: {tables.count(cut)}."
        )
    if result.stop_reason != "finished":
        limits.append(f"Training ended before its last planned step: {result.stop_reason}.")
    if settings["method"] == "qlora":
        limits.append(
            f"The adapter was trained over the {settings['quant_type'].upper()} weights: over the "
            "unquantised model its loss differs a little from the one above."
        )
    return limits


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _use(result: TrainResult, settings: Mapping[str, Any], in_weights: bool) -> str:
    """The run's card names the paths of the run; the weights' card travels, and cannot."""
    model, weights = str(settings["model"]), str(result.weights)
    if in_weights:
        base = base_name(model)
        model = base if "/" in base else f"path/to/{base}"
        weights = f"path/to/this/{result.weights.name}"
    classifies = result.classification is not None
    cls = f"AutoModelFor{'SequenceClassification' if classifies else 'CausalLM'}"
    if settings["method"] in WHOLE_MODEL:
        transformers = (
            f"from transformers import {cls}, AutoTokenizer\n\n"
            f"model = {cls}.from_pretrained({weights!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({weights!r})"
        )
        if classifies:
            return _code("With transformers", transformers) + "\n\n" + _evaluated(f"{weights!r}")
        ours = f'ferrotune.generate({weights!r}, "…")'
        return _code("With transformers", transformers) + "\n\n" + _ours(ours)
    if settings["method"] == "adapter":
        call = f"{model!r}, adapter={weights!r}"
        return (
            _evaluated(call)
            if classifies
            else _ours(f'ferrotune.generate({model!r}, "…", {weights!r})')
        )
    quantised = settings["method"] == "qlora"
    extra = ", BitsAndBytesConfig" if quantised else ""
    config = (
        "quantization = BitsAndBytesConfig(\n"
        "    load_in_4bit=True,\n"
        f'    bnb_4bit_quant_type="{settings["quant_type"]}",\n'
        f"    bnb_4bit_use_double_quant={settings['double_quant']},\n"
        ")\n"
        if quantised
        else ""
    )
    argument = ", quantization_config=quantization" if quantised else ""
    if classifies:
        extra = f", AutoConfig{extra}"
        config += f"config = AutoConfig.from_pretrained({weights!r})  # the labels\n"
        argument = f", config=config{argument}"
    peft = (
        "from peft import PeftModel\n"
        f"from transformers import {cls}, AutoTokenizer{extra}\n\n"
        f"{config}"
        f"base = {cls}.from_pretrained({model!r}{argument})\n"
        f"model = PeftModel.from_pretrained(base, {weights!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({model!r})"
    )
    four_bit = f', quant_type="{settings["quant_type"]}"' if quantised else ""
    ours = f'ferrotune.generate({model!r}, "…", {weights!r}{four_bit})'
    note = (
        "\n\nbitsandbytes' block size is 64 there; this run's was "
        f"{settings['blocksize']}, so its 4-bit weights differ a little."
        if quantised and settings["blocksize"] != 64
        else ""
    )
    if classifies:
        call = f"{model!r}, adapter={weights!r}{four_bit}"
        return _code("With PEFT", peft) + note + "\n\n" + _evaluated(call)
    return _code("With PEFT", peft) + note + "\n\n" + _ours(ours)


def _evaluated(arguments: str) -> str:
    """How a classifier is measured on labelled texts."""
    first, _, rest = arguments.partition(", ")
    call = f'ferrotune.eval({first}, "test.jsonl"{", " if rest else ""}{rest})'
    return _code("With ferrotune", f"import ferrotune\n\nprint({call})")


def _ours(call: str) -> str:
    return _code("With ferrotune", f"import ferrotune\n\nprint({call}.text)")


def _code(label: str, lines: str) -> str:
    return f"{label}:\n\n```python\n{lines}\n```"


def counts(result: TrainResult) -> str:
    """How many records and tokens there were to train on and to evaluate on."""
    found = result.data
    facts = [
        (label, found[key])
        for key, label in (
            ("train_records", "training records"),
            ("train_tokens", "training tokens"),
            ("heldout_records", "held-out records"),
            ("heldout_tokens", "held-out tokens"),
            ("test_records", "test records"),
        )
        if found.get(key)
    ]
    return ", ".join(f"{tables.count(value)} {label}" for label, value in facts)


def _data(result: TrainResult, files: Sequence[tuple[str, int, str]]) -> str:
    known = counts(result)
    if not files:
        return f"{known}, from tables in memory."
    rows = (f"| `{Path(path).name}` | {size:,} | `{digest}` |" for path, size, digest in files)
    table = "\n".join(["| file | bytes | SHA-256 |", "| --- | ---: | --- |", *rows])
    return f"{known}.\n\n{table}" if known else table


def _settings(settings: Mapping[str, Any]) -> Table:
    hidden = set() if settings["method"] in _LORA else set(_LORA_ALONE)
    hidden |= (
        _MODULES_ALONE if settings["method"] in (*WHOLE_MODEL, *_PROMPTS, "adapter") else set()
    )
    hidden |= {"num_virtual_tokens"} if settings["method"] not in _PROMPTS else set()
    hidden |= {"adapter_variant", "reduction_factor"} if settings["method"] != "adapter" else set()
    hidden |= {"prompt_tuning_init"} if settings["method"] != "prompt" else set()
    hidden |= {"trained_layers"} if settings["method"] != "freeze" else set()
    hidden |= _QUANTISED_ALONE if settings["method"] != "qlora" else set()
    rows = [
        (name, shown(settings[name]))
        for name in _SHOWN
        if name not in hidden and settings.get(name) not in (None, {}, [])
    ]
    return Table("Settings", tuple(rows))


def shown(value: Any) -> str:
    """A setting's value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
