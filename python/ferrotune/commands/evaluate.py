"""`ferrotune eval`."""

from pathlib import Path
from typing import Annotated, Any

from ..metrics import ClassificationMetrics, GenerationMetrics
from ..options import Option, collect
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
    seed: Annotated[int, Option("of the intervals' bootstrap", group=DATA)] = 0,
    threads: Threads = None,
    progress: Progress = True,
) -> EvaluateResult:
    """Measure a language model's loss on text files, or a classifier's accuracy on labelled ones.

    Of a language model: loss, perplexity and bits per byte. Of a classification model: accuracy,
    macro-F1, Matthews' correlation, calibration error, a table of the classes and the confusion
    matrix, on records with `text` and `label`. Each has a 95 % interval from 1,000 bootstrap
    resamples of the rows.

    An adapter from method "qlora" was trained over a 4-bit model: `quant_type="nf4"` evaluates
    it over the same weights. `ferrotune.eval` is the same function.

    Returns:
        An EvaluateResult: the loss is the mean in nats per token over every token with a loss.

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
    arguments["data"] = named(data, tables)
    settings = collect(evaluate, arguments)
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
