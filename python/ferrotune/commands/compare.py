"""`ferrotune compare`."""

from pathlib import Path
from typing import Annotated, Any

from ..comparing.result import CompareResult
from ..kinds import DataSources, StrPath
from ..options import Option, SettingError, collect
from ..registry import command
from ..shared import (
    DATA,
    MODEL,
    RUN,
    Adapter,
    BatchSize,
    Blocksize,
    CompletionColumn,
    DoubleQuant,
    LabelColumn,
    LoadedQuantType,
    Progress,
    PromptColumn,
    TextColumn,
    Threads,
)

DEFAULT_OUTPUT = "ferrotune-compare"
LONGEST = 512  # tokens


@command(
    "compare",
    examples=(
        "ferrotune compare --run my-run --test-data test.csv",
        "ferrotune compare --model gpt2/ --adapter a/ --data train.csv --test-data test.csv",
        "ferrotune compare --model bert/ --tuned run/model --data train.csv --test-data test.csv",
    ),
)
def compare(
    model: Annotated[
        StrPath | None, Option("folder of the base model", group=MODEL, unset="the run's")
    ] = None,
    data: Annotated[
        DataSources | None, Option("files of the training records", group=DATA, unset="the run's")
    ] = None,
    test_data: Annotated[
        DataSources | None,
        Option(
            "files of records that neither training nor retrieval saw",
            group=DATA,
            unset="the run's",
        ),
    ] = None,
    adapter: Adapter = None,
    output: Annotated[
        StrPath | None,
        Option(
            "folder of the result; must be new or empty",
            group=RUN,
            unset=f"{DEFAULT_OUTPUT}, or comparison in the run's folder, numbered if taken",
        ),
    ] = None,
    *,
    run: Annotated[
        StrPath | None,
        Option(
            "folder of a finished training run: the fine-tuned model is its, and its report.html "
            "gets the comparison",
            group=RUN,
        ),
    ] = None,
    tuned: Annotated[
        StrPath | None,
        Option("folder of a model of which every weight was trained", group=MODEL),
    ] = None,
    shots: Annotated[int, Option("training records in a prompt", unit="records", group=DATA)] = 4,
    neighbours: Annotated[
        int, Option("training records that vote on a label", unit="records", group=DATA)
    ] = 5,
    quant_type: LoadedQuantType = None,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    label_column: LabelColumn = None,
    sequence_length: Annotated[
        int | None,
        Option(
            "longest sequence, prompt and answer together",
            unit="tokens",
            group=DATA,
            unset=f"{LONGEST}, or what the model takes where that is less",
        ),
    ] = None,
    batch_size: BatchSize = 16,
    seed: Annotated[int, Option("of the examples in prompts and the bootstrap", group=DATA)] = 0,
    threads: Threads = None,
    progress: Progress = True,
) -> CompareResult:
    """Measure whether fine-tuning was worth it, beside prompts, retrieval and TF-IDF.

    On the same test records: the base model as it is, with training records in its prompt (drawn
    from `seed`, and found by BM25), a vote of the nearest training records, TF-IDF with logistic
    regression, and the fine-tuned model. Records have `text` and `label` (accuracy and macro-F1; a
    language model's label is the likeliest one behind the prompt) or `prompt` and `completion` (the
    loss of the completion, nats per token; BM25 searches by the prompt). Every quality and every
    difference to the fine-tuned model has a 95 % bootstrap interval, paired for differences.

    With `run`, base and fine-tuned model, data, test files and columns are those of the run where
    they are not given, and its `report.html` gets table, plot and guide as a section, in place of
    the last comparison's. A run that is trained on writes its page anew, without one.

    Give `data` the training records alone: a test record among them would be found by retrieval.
    Test records whose text is among them are an error. The folder gets `compare.json`,
    `compare.png` and `README.md`, with a guide to fine-tuning against retrieval. Needs
    `ferrotune[compare]`.

    Returns:
        A CompareResult.

    Raises:
        SettingError, ValueError, FormatError, OSError, NotImplementedError: as in
        `ferrotune.train`.
        ImportError: bm25s or scikit-learn is missing.
    """
    arguments = locals()
    import dataclasses
    import json
    import sys

    from .. import files
    from ..comparing import of_run, records
    from ..comparing.contenders import ask_all, positions
    from ..comparing.guide import guide
    from ..comparing.judging import judge
    from ..comparing.plot import compare_figure
    from ..comparing.retrieval import libraries
    from ..frames import named
    from ..plots import png

    tables: dict[str, Any] = {}
    for name in ("data", "test_data"):
        arguments[name] = named(arguments[name], tables)
    settings = collect(compare, arguments)
    libraries()
    if run is not None:
        settings = of_run.settings_with(Path(run), settings)
    for name in ("model", "data", "test_data"):
        if not settings[name]:
            flag = name.replace("_", "-")
            raise SettingError(f"compare needs --{flag} ({name}), or --run with what a run has")
    if (settings["adapter"] is None) == (settings["tuned"] is None):
        raise SettingError("compare needs the fine-tuned model: give one of adapter, tuned and run")
    if sequence_length is None:
        taken = positions(settings["tuned"] or settings["model"], settings["adapter"])
        settings["sequence_length"] = min(LONGEST, taken or LONGEST)
    for name in ("shots", "neighbours"):
        if settings[name] < 1:
            raise SettingError(f"{name} must be at least 1, not {settings[name]}")
    default = Path(DEFAULT_OUTPUT) if run is None else Path(run, "comparison")
    folder = Path(output) if output is not None else files.free_sibling(default)
    if files.is_taken(folder):
        raise SettingError(f"{folder} is not empty: give a new output folder")

    def tell(what: str) -> None:
        if progress:
            print(f"compare: {what}", file=sys.stderr, flush=True)

    sides = []
    for name in ("data", "test_data"):
        found, skipped = records.read(settings, settings[name], tables)
        sides.append(found)
        if skipped:
            tell(f"{skipped} records of {name} cannot be used, and are left out")
    train, test = sides
    records.check(train, test)
    for name in ("shots", "neighbours"):
        if settings[name] > len(train):
            raise SettingError(f"{name} is {settings[name]}, but data hold {len(train)} records")
    said, left_out = ask_all(settings, train, test, tell)
    contenders = judge(said, test, settings["seed"])
    measure = "accuracy" if "label" in test[0] else "loss"
    result = CompareResult(
        measure, len(test), contenders, left_out, guide(contenders, measure), folder
    )
    folder.mkdir(parents=True, exist_ok=True)
    settings["output"] = str(folder)
    del settings["progress"]
    content = {"result": result.to_dict(), "settings": settings}
    plot = png(compare_figure(result))
    files.write_atomic(folder / "compare.json", json.dumps(content, indent=2) + "\n")
    files.write_atomic(folder / "compare.png", plot)
    files.write_atomic(folder / "README.md", result.markdown())
    if run is None:
        return result
    page = of_run.add_to_page(Path(run), result, settings, plot)
    return dataclasses.replace(result, report=page)
