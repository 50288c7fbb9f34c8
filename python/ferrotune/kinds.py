"""The kinds of value a setting can have: read from a command line, checked from Python and TOML."""

import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .frames import ArrowTable

StrPath = str | os.PathLike[str]
StrPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Files, folders, and tables in memory (of which only the names ever become settings).
DataSources = StrPath | ArrowTable | Sequence[StrPath | ArrowTable]
NO_TABLE: Mapping[str, Any] = types.MappingProxyType({})

# The engine counts without a sign, and TOML's numbers have 64 bits with one.
_MOST = 2**63 - 1

_PATTERN_CHARACTERS = frozenset("*+?[](){}|^$\\")


class KindError(ValueError):
    """A value of the wrong kind; the text goes behind the setting's name."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one kind are read and checked."""

    metavar: str
    accept: Callable[[object], Any]  # a Python or TOML value, as JSON can hold it; KindError
    parse: Callable[[str], Any] = str  # one word of a command line; ValueError
    join: Callable[[list[Any]], Any] | None = None  # where several words make one value
    choices: tuple[str, ...] = ()
    is_flag: bool = False


def kind_of(members: Sequence[Any]) -> Kind:
    """The kind of a type annotation, given as the members of its union without None."""
    origins = {typing.get_origin(member) or member for member in members}
    if origins == {bool}:
        return Kind("", _bool, is_flag=True)
    if origins == {int}:
        return Kind("N", _int, _parse(int, _int))
    if origins == {float}:
        return Kind("X", _float, _parse(float, _float))
    if origins == {Literal}:
        return _choice(typing.get_args(members[0]))
    if origins == {str}:
        return Kind("TEXT", _text)
    if origins == {str, os.PathLike}:
        return Kind("PATH", _path)
    if origins - {ArrowTable} == {str, os.PathLike, Sequence}:
        return Kind("PATH", _paths, join=list)
    if origins == {Sequence}:
        return Kind("TEXT", _list, join=list)
    if origins == {str, Sequence}:
        return Kind("NAME", _text_or_list, join=_names_or_pattern)
    if origins == {Mapping}:
        return _table(_int if typing.get_args(members[0])[1] is int else _float)
    raise TypeError(f"no kind of setting for {members}")


def _found(value: object) -> str:
    if isinstance(value, str):
        return repr(value)
    names = {bool: "a boolean", int: "a whole number", float: "a number"}
    names |= {list: "a list", tuple: "a list", dict: "a table", type(None): "nothing"}
    return f"{value!r} ({names.get(type(value), type(value).__name__)})"


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise KindError(f"wants true or false, not {_found(value)}")
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise KindError(f"wants a whole number, not {_found(value)}")
    number = operator.index(value)
    if not 0 <= number <= _MOST:
        raise KindError(f"wants a whole number from 0 to 2^63 - 1, not {number}")
    return number


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise KindError(f"wants a number, not {_found(value)}")
    number = float(value)
    if not math.isfinite(number):
        raise KindError(f"wants a finite number, not {value!r}")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise KindError(f"wants text, not {_found(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # a command line's bytes that are not UTF-8
        raise KindError(f"wants text that UTF-8 can hold, not {value!r}") from None
    return value


def _path(value: object) -> str:
    text = _text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not text:
        raise KindError("wants a path, not ''")
    return text


def _list(value: object) -> list[str]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise KindError(f"wants a list of texts, not {_found(value)}")
    return [_text(item) for item in value]


def _paths(value: object) -> list[str]:
    if isinstance(value, str | os.PathLike):
        return [_path(value)]
    if isinstance(value, bytes) or not isinstance(value, Sequence):
        raise KindError(f"wants a path or a list of paths, not {_found(value)}")
    return [_path(item) for item in value]


def _text_or_list(value: object) -> str | list[str]:
    return value if isinstance(value, str) else _list(value)


def _choice(choices: tuple[str, ...]) -> Kind:
    def accept(value: object) -> str:
        if value not in choices:
            raise KindError(f"wants one of {', '.join(choices)}, not {_found(value)}")
        return str(value)

    return Kind("{" + ",".join(choices) + "}", accept, _parse(str, accept), choices=choices)


def _table(accept_item: Callable[[object], float]) -> Kind:
    convert = int if accept_item is _int else float

    def accept(value: object) -> dict[str, float]:
        if not isinstance(value, Mapping):
            raise KindError(f"wants a table, not {_found(value)}")
        return {_text(key): accept_item(item) for key, item in value.items()}

    def parse(word: str) -> tuple[str, float]:
        name, equals, item = word.rpartition("=")
        if not equals or not name:
            raise KindError(f"wants NAME=N, not {word!r}")
        return name, _parse(convert, accept_item)(item)

    return Kind("NAME=N", accept, parse, join=dict)


def _names_or_pattern(words: list[str]) -> str | list[str]:
    """Several names are a list; one word is text where it is a pattern or all-linear."""
    only = words[0] if len(words) == 1 else ""
    return only if only == "all-linear" or _PATTERN_CHARACTERS & set(only) else words


def _parse(convert: Callable[[str], Any], accept: Callable[[object], Any]) -> Callable[[str], Any]:
    def parse(word: str) -> Any:
        try:
            value: object = convert(word)
        except ValueError:
            value = word
        return accept(value)

    return parse
