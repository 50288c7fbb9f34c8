"""Data that is in memory: Hugging Face data sets, pandas and polars frames, Arrow tables.

The settings of a run are text, so a table among the data gets a name there; the native side takes
the tables by these names through Arrow's PyCapsule interface, which shares their buffers.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard


class ArrowTable(Protocol):
    """What pyarrow tables, polars frames and pandas frames (2.2 and newer) have in common."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


Tables = dict[str, Any]


def named(data: object, tables: Tables) -> object:
    """`data` with a name in place of each table; the tables go into `tables`.

    Raises TypeError for a Hugging Face data set that has no table to share.
    """
    if _is_table(data):
        return [_name(data, tables)]
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return [_name(one, tables) if _is_table(one) else one for one in data]
    return data


def _is_table(value: object) -> TypeGuard[Any]:
    return hasattr(value, "__arrow_c_stream__") or _library(value) == "datasets"


def _library(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def _name(value: Any, tables: Tables) -> str:
    table = _arrow(value)
    kind = f"{_library(value)}.{type(value).__name__}"
    name = f"<{kind} {len(tables) + 1}>"
    tables[name] = table
    return name


def _arrow(value: Any) -> Any:
    """The object itself or, of a Hugging Face data set, its Arrow table."""
    if _library(value) != "datasets":
        return value
    if hasattr(value, "keys"):
        splits = ", ".join(map(repr, value.keys()))
        raise TypeError(f"data is a DatasetDict: give one of its splits ({splits})")
    if not hasattr(value, "with_format") or not hasattr(value, "__len__"):
        raise TypeError(
            f"data is a datasets.{type(value).__name__}, whose records are not in memory: "
            "give a Dataset, or its files"
        )
    # Without selections the table is the data set's own, memory-mapped; with them, a copy in order.
    return value.with_format("arrow")[:]
