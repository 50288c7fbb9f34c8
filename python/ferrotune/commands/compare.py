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
    Data,
    DoubleQuant,
    LabelColumn,
    LoadedQuantType,
    Model,
    Progress,
    PromptColumn,
    TextColumn,
    Threads,
)

DEFAULT_OUTPUT = "ferrotune-compare"


@command(
    "compare",
    examples=(
        "ferrotune compare --model gpt2/ --adapter a/ --data train.csv --test-data test.csv",
        "ferrotune compare --model bert/ --tuned run/model --data train.csv --test-data test.csv",
    ),
)
def compare(
    model: Model,
    data: Data,
    test_data: Annotated[
        DataSources, Option("files of records that neither training nor retrieval saw", group=DATA)
    ],
    adapter: Adapter = None,
    output: Annotated[
        StrPath | None,
        Option(
            "folder of the report; must be new or empty",
            group=RUN,
            unset=f"{DEFAULT_OUTPUT}, numbered if taken",
        ),
    ] = None,
    *,
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
        int, Option("longest sequence, prompt and answer together", unit="tokens", group=DATA)
    ] = 512,
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
    import json
    import sys

    from .. import files
    from ..comparing.contenders import ask_all
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
    if (adapter is None) == (tuned is None):
        raise SettingError("compare needs the fine-tuned model: give one of adapter and tuned")
    for name in ("shots", "neighbours"):
        if settings[name] < 1:
            raise SettingError(f"{name} must be at least 1, not {settings[name]}")
    folder = Path(output) if output is not None else files.free_sibling(Path(DEFAULT_OUTPUT))
    if files.is_taken(folder):
        raise SettingError(f"{folder} is not empty: give a new output folder")
    train = _records(settings, settings["data"], tables)
    test = _records(settings, settings["test_data"], tables)
    _check(train, test)

    def tell(what: str) -> None:
        if progress:
            print(f"compare: {what}", file=sys.stderr, flush=True)

    said, left_out = ask_all(settings, train, test, tell)
    contenders = judge(said, test, settings["seed"])
    measure = "accuracy" if "label" in test[0] else "loss"
    result = CompareResult(
        measure, len(test), contenders, left_out, guide(contenders, measure), folder
    )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"result": result.to_dict(), "settings": settings}
    files.write_atomic(folder / "compare.json", json.dumps(content, indent=2) + "\n")
    files.write_atomic(folder / "compare.png", png(compare_figure(result)))
    files.write_atomic(folder / "README.md", result.markdown())
    return result


def _records(
    settings: dict[str, Any], paths: list[str], tables: dict[str, Any]
) -> list[dict[str, Any]]:
    import json

    from .. import _native

    names = ("text_column", "prompt_column", "completion_column", "label_column")
    config = {name: settings[name] for name in names}
    config |= {"data": paths, "heldout": 0.0, "group": None, "sequence_length": 1}
    config |= {"packing": False, "seed": 0}
    found: list[dict[str, Any]] = json.loads(_native.records(json.dumps(config), tables))
    return found


def _check(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    """Raises SettingError for records that cannot be compared."""
    from ..comparing.prompts import answer, question

    for name, records in (("data", train), ("test_data", test)):
        shapes = {tuple(sorted(one.keys() - {"group"})) for one in records}
        if shapes not in ({("label", "text")}, {("completion", "prompt")}):
            raise SettingError(
                f"{name}: compare reads records with text and label, or with prompt and "
                "completion, all of one kind; name the columns with text_column and label_column, "
                "or prompt_column and completion_column"
            )
    if train[0].keys() != test[0].keys():
        raise SettingError("data and test_data hold records of different kinds")
    seen = {question(one).strip() for one in train}
    both = sum(question(one).strip() in seen for one in test)
    if both and "label" in test[0]:
        raise SettingError(
            f"{both} of {len(test)} test texts are in the training data, where retrieval would "
            "find them: give data apart, as `ferrotune split` writes it"
        )
    unseen = sorted({answer(one) for one in test} - {answer(one) for one in train})
    if "label" in test[0] and unseen:
        raise SettingError(
            f"test_data have labels that data never show: {', '.join(map(repr, unseen[:10]))}"
        )
    if "label" in test[0] and len({answer(one) for one in train}) < 2:
        raise SettingError("data have one label alone, which leaves nothing to tell apart")
