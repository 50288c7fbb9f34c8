"""`ferrotune merge`."""

from pathlib import Path
from typing import Annotated, Literal

from ..kinds import StrPath
from ..options import Option, SettingError, collect
from ..registry import command
from ..results import MergeResult
from ..shared import MODEL, RUN, Model


@command(
    "merge",
    examples=("ferrotune merge --model llama/ --adapter my-run/adapter --output merged/",),
)
def merge(
    model: Model,
    adapter: Annotated[
        StrPath, Option("folder of a LoRA or (IA)³ adapter for the model", group=MODEL)
    ],
    output: Annotated[
        StrPath, Option("folder of the merged model; must be new or empty", group=RUN)
    ],
    *,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        Option("type of the merged weights", group=RUN, unset="the model's"),
    ] = None,
) -> MergeResult:
    """Add an adapter to its model's weights and write a Hugging Face folder.

    Returns:
        A MergeResult: the folder, its files, and how many modules had an adapter.

    Raises:
        SettingError, ValueError, FormatError, OSError, NotImplementedError: as in
        `ferrotune.train`; a folder that is not empty is a SettingError.
    """
    arguments = locals()
    import json

    from .. import _native, files

    settings = collect(merge, arguments)
    if files.is_taken(Path(settings["output"])):
        raise SettingError(f"{settings['output']} is not empty: give a new output folder")
    found = json.loads(_native.merge(json.dumps(settings)))
    return MergeResult(
        Path(found["output"]),
        tuple(found["files"]),
        found["merged_modules"],
        tuple(found["warnings"]),
    )
