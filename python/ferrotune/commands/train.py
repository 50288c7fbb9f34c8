"""`ferrotune train`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from ..kinds import NO_TABLE, DataSources, StrPath
from ..options import Option, collect
from ..registry import Invocation, command
from ..results import TrainResult
from ..shared import (
    DATA,
    HELDOUT,
    MODEL,
    RUN,
    TRAINING,
    BatchSize,
    Blocksize,
    CompletionColumn,
    Data,
    DoubleQuant,
    Group,
    LabelColumn,
    MessagesColumn,
    Model,
    NearDuplicates,
    Progress,
    PromptColumn,
    SequenceLength,
    Stratify,
    TextColumn,
    Threads,
)

DEFAULT_OUTPUT = "ferrotune-run"

# QLoRA's 2e-4 (Dettmers et al. 2023, table 9) moves the few adapter weights; all weights at once
# want about a tenth of it. (IA)³'s is of its paper (Liu et al. 2022, section 3.3); prompts and
# prefixes have PEFT's examples' for AdamW, bottleneck adapters the middle one of the three that
# Houlsby et al. (2019) tried.
_LEARNING_RATES = {
    "lora": 2e-4, "qlora": 2e-4, "ia3": 3e-3, "prompt": 3e-2, "prefix": 1e-2, "adapter": 3e-4,
    "full": 2e-5, "freeze": 2e-5,
}  # fmt: skip


def _call(invocation: Invocation) -> TrainResult:
    """A config file from an earlier run names that run's folder: run again, beside it."""
    import sys

    from .. import files, ranks

    values = dict(invocation.values)
    if "output" in invocation.from_file and not values.get("resume"):
        named = Path(values["output"])
        values["output"] = files.free_sibling(named)
        if values["output"] != named and ranks.is_first():
            print(f"{named} holds a run already: writing {values['output']}", file=sys.stderr)
    return train(**values)


@command(
    "train",
    examples=(
        "ferrotune train --model llama/ --data train.jsonl --method qlora --epochs 2",
        "ferrotune train --model llama/ --data a.txt b.txt --max-seconds 600 --output my-run",
        "ferrotune train --config my-run/config.toml --resume",
    ),
    run=_call,
)
def train(
    model: Model,
    data: Data,
    output: Annotated[
        StrPath | None,
        Option(
            "folder of the run; must be new or empty unless the run is resumed",
            group=RUN,
            unset=f"{DEFAULT_OUTPUT}, numbered if taken",
        ),
    ] = None,
    *,
    engine: Annotated[
        Literal["auto", "embedded", "torch"],
        Option(
            "what computes: ferrotune's own engine on the CPU, or PyTorch with transformers and "
            "PEFT, on GPU or CPU; auto is torch where there are a GPU and these, else embedded",
            group=RUN,
        ),
    ] = "auto",
    task: Annotated[
        Literal["auto", "generation", "classification"],
        Option(
            "to continue texts, or to give a text its label; auto is what the model's class is for",
            group=MODEL,
        ),
    ] = "auto",
    method: Annotated[
        Literal["lora", "qlora", "ia3", "prompt", "prefix", "adapter", "freeze", "full"],
        Option(
            "LoRA adapters; LoRA adapters over a 4-bit model; vectors that scale activations, "
            "(IA)³; virtual tokens as input embeddings, or as keys and values of every layer; "
            "bottleneck layers; "
            "the head and the last blocks alone; or every weight",
            group=MODEL,
        ),
    ] = "qlora",
    trained_layers: Annotated[
        int,
        Option("blocks at the end that freeze trains beside the head", unit="blocks", group=MODEL),
    ] = 0,
    r: Annotated[int, Option("rank of the adapters", group=MODEL)] = 16,
    lora_alpha: Annotated[
        float, Option("numerator of the adapters' scaling, lora_alpha / r", group=MODEL)
    ] = 32.0,
    lora_dropout: Annotated[
        float, Option("dropout before the adapters", unit="probability", group=MODEL)
    ] = 0.0,
    use_rslora: Annotated[bool, Option("scale by lora_alpha / sqrt(r)", group=MODEL)] = False,
    target_modules: Annotated[
        str | Sequence[str] | None,
        Option(
            "linear layers that get an adapter: all-linear, name suffixes, or one regular "
            "expression for the whole name",
            group=MODEL,
            unset="all-linear; with ia3 PEFT's choice for the model",
        ),
    ] = None,
    feedforward_modules: Annotated[
        str | Sequence[str] | None,
        Option(
            "those of ia3's target_modules whose input is scaled, not their output",
            group=MODEL,
            unset="PEFT's choice for the model",
        ),
    ] = None,
    rank_pattern: Annotated[
        Mapping[str, int], Option("r for modules whose name matches", group=MODEL)
    ] = NO_TABLE,
    alpha_pattern: Annotated[
        Mapping[str, float], Option("lora_alpha for modules whose name matches", group=MODEL)
    ] = NO_TABLE,
    num_virtual_tokens: Annotated[
        int,
        Option("of prompt and prefix, before each text", unit="tokens", group=MODEL),
    ] = 20,
    prompt_tuning_init: Annotated[
        Literal["sample_vocab", "random"],
        Option(
            "where a prompt begins: at tokens drawn from the vocabulary, or at normal numbers of "
            "deviation 1 as in PEFT",
            group=MODEL,
        ),
    ] = "sample_vocab",
    adapter_variant: Annotated[
        Literal["houlsby", "pfeiffer"],
        Option("of adapter: layers behind attention and MLP, or behind the MLP alone", group=MODEL),
    ] = "pfeiffer",
    reduction_factor: Annotated[
        int, Option("hidden size by inner size of adapter's layers", group=MODEL)
    ] = 16,
    quant_type: Annotated[
        Literal["nf4", "fp4"], Option("4-bit type of the frozen weights in qlora", group=MODEL)
    ] = "nf4",
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    messages_column: MessagesColumn = None,
    label_column: LabelColumn = None,
    sequence_length: SequenceLength = 128,
    packing: Annotated[
        bool,
        Option("several records in one row; attention never crosses between them", group=DATA),
    ] = True,
    sort_by_length: Annotated[
        bool,
        Option("rows of about one length in a batch: less padding without packing", group=DATA),
    ] = False,
    audit: Annotated[
        Literal["stop", "warn", "off"],
        Option(
            "look at the data first: end the run where training would be meaningless, go on "
            "with a warning, or do not look",
            group=DATA,
        ),
    ] = "stop",
    batch_size: BatchSize = 16,
    gradient_accumulation: Annotated[
        int, Option("batches whose gradients make one step", unit="batches", group=TRAINING)
    ] = 1,
    epochs: Annotated[float, Option("passes over the data", group=TRAINING)] = 1.0,
    max_steps: Annotated[
        int | None, Option("steps to take, instead of epochs", group=TRAINING, unset="by epochs")
    ] = None,
    max_seconds: Annotated[
        float | None,
        Option("end after this long", unit="seconds", group=TRAINING, unset="no limit"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        Option(
            "highest learning rate",
            group=TRAINING,
            unset="2e-4; ia3 3e-3; prompt 3e-2; prefix 1e-2; adapter 3e-4; full, freeze 2e-5",
        ),
    ] = None,
    warmup_steps: Annotated[
        int, Option("steps of linear warm-up from 0", unit="steps", group=TRAINING)
    ] = 20,
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        Option("course of the learning rate after the warm-up", group=TRAINING),
    ] = "cosine",
    min_learning_rate_ratio: Annotated[
        float,
        Option("where the schedule ends", unit="share of the learning rate", group=TRAINING),
    ] = 0.1,
    weight_decay: Annotated[
        float, Option("AdamW's decoupled weight decay", unit="per learning rate", group=TRAINING)
    ] = 0.0,
    beta1: Annotated[float, Option("AdamW's decay of the mean", group=TRAINING)] = 0.9,
    beta2: Annotated[float, Option("AdamW's decay of the square", group=TRAINING)] = 0.999,
    eps: Annotated[float, Option("AdamW's epsilon", group=TRAINING)] = 1e-8,
    max_grad_norm: Annotated[
        float, Option("clip the gradient to this global norm; 0 for never", group=TRAINING)
    ] = 1.0,
    seed: Annotated[
        int, Option("of the split, the order, the adapters, dropout and shots", group=TRAINING)
    ] = 0,
    split_seed: Annotated[
        int | None, Option("of the split alone", group=HELDOUT, unset="seed")
    ] = None,
    shots: Annotated[
        int | None,
        Option(
            "few-shot: train on this many records of each label, or of all where there are no "
            "labels, drawn by seed",
            unit="records",
            group=DATA,
            unset="all records",
        ),
    ] = None,
    repeats: Annotated[
        int,
        Option(
            "runs under seed, seed + 1, … on the same split, to see how far a result is luck",
            unit="runs",
            group=RUN,
        ),
    ] = 1,
    heldout: Annotated[
        float, Option("part of the records kept out of training", unit="share", group=HELDOUT)
    ] = 0.05,
    heldout_data: Annotated[
        DataSources, Option("files to evaluate on instead of a part of the data", group=HELDOUT)
    ] = (),
    test: Annotated[
        float,
        Option(
            "part of the records kept for one test, at the end, with the best weights",
            unit="share",
            group=HELDOUT,
        ),
    ] = 0.0,
    test_data: Annotated[
        DataSources, Option("files to test on instead of a part of the data", group=HELDOUT)
    ] = (),
    forgetting: Annotated[
        DataSources,
        Option(
            "text of a language model's own domain: its loss before and after tells what the "
            "model forgot",
            group=HELDOUT,
        ),
    ] = (),
    group: Group = None,
    stratify: Stratify = True,
    near_duplicates: NearDuplicates = 0.8,
    eval_every: Annotated[
        int, Option("steps between evaluations", unit="steps", group=HELDOUT)
    ] = 50,
    eval_tokens: Annotated[
        int,
        Option(
            "most tokens (a classifier: texts) that an evaluation reads",
            unit="tokens",
            group=HELDOUT,
        ),
    ] = 32768,
    patience: Annotated[
        int | None,
        Option(
            "stop after this many evaluations without a new best",
            unit="evaluations",
            group=HELDOUT,
            unset="never",
        ),
    ] = None,
    bias_column: Annotated[
        str | None,
        Option(
            "column of the groups whose labels are compared, in every data file; for "
            "classification",
            group=HELDOUT,
            unset="none, or by bias_terms",
        ),
    ] = None,
    bias_terms: Annotated[
        Sequence[str],
        Option(
            "pairs of terms that name two groups, such as he/she: texts are compared with their "
            "terms swapped, and by the group they name",
            unit="FIRST/SECOND",
            group=HELDOUT,
        ),
    ] = (),
    checkpoint_every: Annotated[
        int, Option("steps between checkpoints", unit="steps", group=RUN)
    ] = 200,
    resume: Annotated[
        bool, Option("go on from the checkpoint in the output folder", group=RUN)
    ] = False,
    tensorboard: Annotated[
        bool, Option("also write TensorBoard event files, into the output folder", group=RUN)
    ] = False,
    threads: Threads = None,
    progress: Progress = True,
    on_event: Callable[[dict[str, Any]], bool | None] | None = None,
) -> TrainResult:
    """Fine-tune a Llama, GPT-2 or BERT model on texts, conversations or labels.

    Models are Hugging Face folders: Llama and GPT-2 for generation, all three for classification
    of texts by their `label`. A folder without a classification head gets a new one (its weights
    drawn from `seed`), whose labels are the data's; they are written as `id2label`. The
    dropout that a model's own config.json names is not applied; `lora_dropout` is.

    With `engine` "torch" the same run (data, order, initial values, evaluations, files) is computed
    by transformers, PEFT and ferrotune's layers: in bfloat16 on a GPU, in float32 on the CPU. Of
    several processes (`torchrun --nproc-per-node 2 -m ferrotune train …`) each takes its share of
    every batch, and the first one shows and writes. The run says which engine it has and why, and
    its `config.toml` names it.

    Every setting is also an option of `ferrotune train` (`ferrotune train --help` lists them with
    their units) and a key of its TOML config. The data is split by record, or by `group`, with near
    duplicates on one side and each label in its proportion; the model is evaluated on the held-out
    part before the first step, every `eval_every` steps and at the end, and the weights with the
    lowest held-out loss are kept. Where `test` or `test_data` asks for a test split, these weights
    are measured on all of it, once; it shares no text, near duplicate or group with the other
    sides. `forgetting` is read before the first step and at the end, up to `eval_tokens`, and so
    are the records of the test split (without one: of the held-out part) whose groups
    `bias_column` and `bias_terms` compare. First of all the
    data is audited (`ferrotune.audit`): what is
    found is shown as warnings and kept in the result's `data["audit"]`, and `audit` says whether
    the run ends where training would be meaningless.

    The run's folder holds `config.toml` (every setting, ready to run again), `metrics.jsonl`,
    `adapter/` in PEFT's format (of method "adapter" in ferrotune's own, see the README; `model/`,
    a Hugging Face folder, for methods "full" and "freeze"), `checkpoint/`, `curves.png`,
    `results.json`, `report.html` (all of it on one page) and a model card, `README.md`; with
    `tensorboard` also `tensorboard/`, event files by tensorboardX (`pip install
    'ferrotune[tensorboard]'`). A classifier's adapter has its head as PEFT's `modules_to_save`, and
    a config.json that names the labels.

    With `repeats` the run is made again under the next seeds (other shots, order, adapters and
    dropout; the same held-out part), each in a folder of its own under `repeats/`; the result is
    the first run's, with the spread of all of them.

    Args:
        data: files and folders, or tables in memory: a Hugging Face `Dataset`, a pandas or polars
            frame, an Arrow table. A table is read without a copy; `config.toml` has a name in its
            place, and only Python can run it again.
        learning_rate: None is 2e-4 for lora and qlora (QLoRA's value), 3e-3 for ia3 (its paper's),
            3e-2 for prompt, 1e-2 for prefix, 3e-4 for adapter and 2e-5 for full and
            freeze; small models take more, 1e-3 and above.
        on_event: called with each event of the trainer (a dict told apart by its key "event":
            data, model, step, eval, checkpoint, warning, stop); returning False ends the run
            after this step, with a checkpoint.

    Returns:
        A TrainResult: losses in nats per token (of a classifier: per label), tokens, seconds,
        paths, and the measures of the held-out part with their intervals.

    Raises:
        SettingError, ValueError: a setting that cannot be used.
        FormatError: a file whose content is not what its format requires (a ValueError).
        OSError: a file that cannot be read or written; what was written before stays whole.
        NotImplementedError: an architecture or type that the engine has no code for.
        RuntimeError: a run that failed, for example a loss that is no longer finite.
        TrainInterrupted: Ctrl-C, after a checkpoint was written (a KeyboardInterrupt).
    """
    arguments = locals()
    from ..frames import named
    from ..training import run

    tables: dict[str, Any] = {}
    for name in ("data", "heldout_data", "test_data", "forgetting"):
        arguments[name] = named(arguments[name], tables)
    settings = collect(train, arguments)
    if settings["learning_rate"] is None:
        settings["learning_rate"] = _LEARNING_RATES[method]
    if settings["target_modules"] is None and method != "ia3":
        settings["target_modules"] = "all-linear"
    return run(settings, DEFAULT_OUTPUT, on_event, tables)
