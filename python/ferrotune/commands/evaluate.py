"""`ferrotune eval`."""

from pathlib import Path
from typing import Annotated, Any

from ..kinds import DataSources
from ..metrics import ClassificationMetrics, GenerationMetrics
from ..options import Option, SettingError, collect
from ..registry import command
from ..results import EvaluateResult
from ..shared import (
    DATA,
    Adapter,
    BatchSize,
    Blocksize,
    CompletionColumn,
    Data,
    DoubleQuant,
    LabelColumn,
    LoadedQuantType,
    MessagesColumn,
    Model,
    Progress,
    PromptColumn,
    SequenceLength,
    TextColumn,
    Threads,
)


@command(
    "eval",
    examples=(
        "ferrotune eval --model llama/ --data test.jsonl",
        "ferrotune eval --model llama/ --adapter my-run/adapter --quant-type nf4 --data test.txt",
        "ferrotune eval --model llama/ --data test.csv --demonstrations train.csv --shots 8",
    ),
)
def evaluate(
    model: Model,
    data: Data,
    adapter: Adapter = None,
    *,
    quant_type: LoadedQuantType = None,
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
    batch_size: BatchSize = 16,
    eval_tokens: Annotated[
        int | None,
        Option(
            "most tokens to read (texts, for a classification model)",
            unit="tokens",
            group=DATA,
            unset="all",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        Option(
            "demonstrations in each prompt, of labels in turn",
            unit="records",
            group=DATA,
        ),
    ] = None,
    demonstrations: Annotated[
        DataSources | None, Option("files that the demonstrations are drawn from", group=DATA)
    ] = None,
    repeats: Annotated[
        int, Option("draws of demonstrations, from this seed and the next ones", group=DATA)
    ] = 1,
    seed: Annotated[
        int, Option("of the intervals' bootstrap, and of the demonstrations", group=DATA)
    ] = 0,
    threads: Threads = None,
    progress: Progress = True,
) -> EvaluateResult:
    """Measure a language model's loss on text files, or a classifier's accuracy on labelled ones.

    Of a language model: loss, perplexity and bits per byte. Of a classification model: accuracy,
    macro-F1, Matthews' correlation, calibration error, a table of the classes and the confusion
    matrix, on records with `text` and `label`. Each has a 95 % interval from 1,000 bootstrap
    resamples of the rows.

    With `shots`, a language model is asked in context: so many of the `demonstrations`, drawn by
    `seed`, stand before each prompt. Records have `prompt` and `completion` (the loss of the
    completion), or `text` and `label` (the label is the likeliest of all of the demonstrations');
    `repeats` draws give the spread. Every prompt has to fit into `sequence_length`.

    An adapter from method "qlora" was trained over a 4-bit model: `quant_type="nf4"` evaluates
    it over the same weights. `ferrotune.eval` is the same function.

    Returns:
        An EvaluateResult: the loss is the mean in nats per token over every token with a loss;
        with `shots`, `few_shot` has each draw's measures and their spread.

    Raises:
        SettingError, ValueError, FormatError, OSError, NotImplementedError: as in
        `ferrotune.train`.
    """
    arguments = locals()
    import json

    from .. import _native
    from ..frames import named
    from ..progress import open_display

    tables: dict[str, Any] = {}
    for name in ("data", "demonstrations"):
        arguments[name] = named(arguments[name], tables)
    settings = collect(evaluate, arguments)
    if shots is not None:
        from ..comparing import in_context

        return in_context.evaluate(settings, tables)
    for name, default in (("shots", None), ("demonstrations", None), ("repeats", 1)):
        if settings.pop(name) != default:
            raise SettingError(f"{name} is for demonstrations in the prompt: give shots, too")
    title = f"evaluation of {Path(settings['model']).name}"
    display = open_display(settings.pop("progress"), title)

    def relay(line: str) -> bool:
        event = json.loads(line)
        if event["event"] != "eval":  # that is the result
            display.event(event)
        return True

    try:
        found = json.loads(_native.evaluate(json.dumps(settings), relay, tables))
    finally:
        display.close()
    names = ("loss", "perplexity", "bits_per_byte", "tokens", "seconds", "tokens_per_second")
    generation, classification = found.get("generation"), found.get("classification")
    return EvaluateResult(
        **{name: found[name] for name in names},
        skipped=found["skipped"],
        generation=generation and GenerationMetrics.from_native(generation),
        classification=classification and ClassificationMetrics.from_native(classification),
    )


eval = evaluate
