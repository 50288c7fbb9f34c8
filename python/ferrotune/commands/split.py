"""`ferrotune split`."""

from pathlib import Path
from typing import Annotated, Any

from ..kinds import StrPath
from ..options import Option, SettingError, collect
from ..registry import command
from ..results import SplitFile, SplitResult
from ..shared import (
    HELDOUT,
    RUN,
    CompletionColumn,
    Data,
    Group,
    LabelColumn,
    MessagesColumn,
    NearDuplicates,
    PromptColumn,
    Stratify,
    TextColumn,
)


@command(
    "split",
    examples=(
        "ferrotune split --data all.jsonl --heldout 0.1 --test 0.1 --output parts/",
        "ferrotune split --data reviews.csv --group author --output parts/",
    ),
)
def split(
    data: Data,
    output: Annotated[StrPath, Option("folder of the parts; must be new or empty", group=RUN)],
    *,
    heldout: Annotated[
        float, Option("part of the records to evaluate on", unit="share", group=HELDOUT)
    ] = 0.05,
    test: Annotated[
        float, Option("part of the records kept for a last test", unit="share", group=HELDOUT)
    ] = 0.0,
    group: Group = None,
    stratify: Stratify = True,
    near_duplicates: NearDuplicates = 0.8,
    text_column: TextColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    messages_column: MessagesColumn = None,
    label_column: LabelColumn = None,
    seed: Annotated[int, Option("another seed gives another split", group=HELDOUT)] = 0,
) -> SplitResult:
    """Divide data into files to train on, to evaluate on and to test on, without leaks.

    Writes `train.jsonl`, `heldout.jsonl` and, with `test`, `test.jsonl`, each record with all its
    columns under their own names. Lines of `.jsonl` stay as they are and values of `.csv` and
    `.tsv` become strings. Of `.parquet`, `.arrow` and frames numbers, truth values, lists and
    objects stay what they are; dates and times become strings in ISO 8601, bytes strings of
    hexadecimal digits, and numbers that are not finite null. Equal texts, near
    duplicates and the records of a group are on one side. The same records and seed give the same
    sides on every machine, whatever the order of the files and the number of threads; the
    held-out side does not depend on `test`.

    Returns:
        A SplitResult: each file with its records, different texts and labels.

    Raises:
        SettingError, ValueError, FormatError, OSError: as in `ferrotune.train`; a folder that is
        not empty is a SettingError.
    """
    arguments = locals()
    import json

    from .. import _native, files
    from ..frames import named

    tables: dict[str, Any] = {}
    arguments["data"] = named(data, tables)
    settings = collect(split, arguments)
    if files.is_taken(Path(settings["output"])):
        raise SettingError(f"{settings['output']} is not empty: give a new output folder")
    # Of the data's settings, these two are about rows.
    whole = {**settings, "sequence_length": 1, "packing": False}
    found = json.loads(_native.split(json.dumps(whole), tables))
    parts = tuple(
        SplitFile(one["side"], Path(one["path"]), one["records"], one["texts"], one["labels"])
        for one in found["files"]
    )
    return SplitResult(parts, found["skipped_total"])
