"""The records of a comparison: read, and refused where they cannot be compared."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..options import SettingError
from .prompts import Record, answer, question


def read(
    settings: Mapping[str, Any], paths: Sequence[str], tables: Mapping[str, Any]
) -> tuple[list[Record], int]:
    """The records of some files under the columns' standard names, and how many were skipped."""
    from .. import _native

    names = ("text_column", "prompt_column", "completion_column", "label_column")
    config = {name: settings[name] for name in names}
    config |= {"data": list(paths), "heldout": 0.0, "group": None, "sequence_length": 1}
    config |= {"packing": False, "seed": 0}
    found = json.loads(_native.records(json.dumps(config), dict(tables)))
    return found["records"], found["skipped_total"]


def check(
    train: Sequence[Record],
    test: Sequence[Record],
    names: tuple[str, str] = ("data", "test_data"),
    who: str = "compare",
) -> None:
    """Raises SettingError for records that cannot be compared; `names` are their settings'."""
    for name, records in zip(names, (train, test), strict=True):
        shapes = {tuple(sorted(one.keys() - {"group"})) for one in records}
        if shapes not in ({("label", "text")}, {("completion", "prompt")}):
            raise SettingError(
                f"{name}: {who} reads records with text and label, or with prompt and "
                "completion, all of one kind; name the columns with text_column and label_column, "
                "or prompt_column and completion_column"
            )
    first, second = names
    if train[0].keys() != test[0].keys():
        raise SettingError(f"{first} and {second} hold records of different kinds")
    if "label" not in test[0]:
        return
    seen = {question(one).strip() for one in train}
    both = sum(question(one).strip() in seen for one in test)
    if both:
        raise SettingError(
            f"{both} of {len(test)} {second} texts are in {first} too, with their answers: give "
            f"{first} apart, as `ferrotune split` writes it"
        )
    unseen = sorted({answer(one) for one in test} - {answer(one) for one in train})
    if unseen:
        shown = ", ".join(map(repr, unseen[:10]))
        raise SettingError(f"{second} have labels that {first} never show: {shown}")
    if len({answer(one) for one in train}) < 2:
        raise SettingError(f"{first} have one label alone, which leaves nothing to tell apart")
