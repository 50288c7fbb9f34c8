"""`ferrotune audit`."""

from pathlib import Path
from typing import Annotated, Any

from ..auditing import AuditResult
from ..kinds import DataSources, StrPath
from ..options import Option, collect
from ..registry import command
from ..shared import (
    DATA,
    RUN,
    CompletionColumn,
    LabelColumn,
    MessagesColumn,
    PromptColumn,
    SequenceLength,
    TextColumn,
    Threads,
)

CHECKS = "checks"


@command(
    "audit",
    examples=(
        "ferrotune audit reviews.csv --html audit.html",
        "ferrotune audit train.jsonl --heldout-data test.jsonl --model llama/ --json",
    ),
)
def audit(
    data: Annotated[
        DataSources,
        Option(
            "files or folders: .txt, .jsonl, .csv, .tsv, .parquet, .arrow, also .gz and .zst; in "
            "Python also a Dataset, a pandas or polars frame",
            unit="one or more",
            group=DATA,
            positional=True,
        ),
    ],
    *,
    heldout_data: Annotated[
        DataSources, Option("files to evaluate on, which must not be in the data", group=DATA)
    ] = (),
    model: Annotated[
        StrPath | None,
        Option(
            "model folder whose tokenizer and chat template are to be used: finds records that "
            "are too long and those of which nothing is trained",
            group=CHECKS,
            unset="no check on tokens",
        ),
    ] = None,
    sequence_length: SequenceLength = 128,
    packing: Annotated[
        bool, Option("several records in one row; longer ones go on in another", group=CHECKS)
    ] = True,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    messages_column: MessagesColumn = None,
    label_column: LabelColumn = None,
    near_duplicates: Annotated[
        float,
        Option(
            "similarity of near duplicates, by their character 5-grams (Jaccard); 0 for no check",
            unit="0 to 1",
            group=CHECKS,
        ),
    ] = 0.8,
    predict_labels: Annotated[
        bool,
        Option(
            "hold labels against predictions from the other records (five-fold "
            "cross-validation), which takes longest",
            group=CHECKS,
        ),
    ] = True,
    examples: Annotated[
        int, Option("records that a finding shows", unit="records", group=CHECKS)
    ] = 5,
    html: Annotated[
        StrPath | None,
        Option("write a page with plots and examples here", group=RUN, unset="no page"),
    ] = None,
    threads: Threads = None,
) -> AuditResult:
    """Find what is wrong with data before a run: duplicates, leaks, labels, secrets, and more.

    Every check gives a finding, also one that found nothing. `result.severity` is the worst of
    them; "stop" says that training would be meaningless, and `ferrotune audit` then ends with
    exit code 1. `ferrotune.train` makes the same checks at its start, those on tokens aside, and
    labels are held against predictions where records times labels are at most 400,000.

    Memory grows with the records themselves, by 200 bytes each for near duplicates, 16 for exact
    ones and their leaks, and, where labels are predicted, by the words of at most 200,000 labelled
    records. Languages are told for at most 100,000 records. Every other check keeps counts, and the
    places of the records that it finds.

    Args:
        data, heldout_data: files and folders, or tables in memory.

    Returns:
        An AuditResult: a table in a terminal, `to_dict()` for JSON, `save_html(path)`, and a view
        in Jupyter. Likely secrets are masked in all of them.

    Raises:
        SettingError, ValueError, FormatError, OSError: as in `ferrotune.train`.
    """
    arguments = locals()
    import json

    from .. import _native
    from ..frames import named

    tables: dict[str, Any] = {}
    for name in ("data", "heldout_data"):
        arguments[name] = named(arguments[name], tables)
    settings = collect(audit, arguments)
    target = settings.pop("html")
    # Of the data's settings, these two are about splits.
    whole = {**settings, "heldout": 0.0, "seed": 0}
    result = AuditResult.from_native(json.loads(_native.audit(json.dumps(whole), tables)))
    if target is not None:
        result.save_html(Path(target))
    return result
