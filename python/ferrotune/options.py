"""Settings, derived from function signatures: each name, type, default and help text exists once.

A parameter annotated `Annotated[type, Option(...)]` is a setting: a keyword in Python, an option
(with dashes) on the command line, a key in TOML. Other parameters are Python's alone.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from .kinds import Kind, KindError, kind_of

REQUIRED = inspect.Parameter.empty


class SettingError(ValueError):
    """A setting that does not exist, is missing, or has a value of the wrong type."""


@dataclass(frozen=True, slots=True)
class Option:
    """What a signature cannot say about a setting.

    `unset` says what the default None means; `group` is the heading in --help. On a command line
    a `positional` setting needs no flag before its words.
    """

    help: str
    unit: str = ""
    group: str = "settings"
    unset: str = "none"
    positional: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of one function."""

    name: str
    option: Option
    kind: Kind
    nullable: bool
    default: Any

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def default_text(self) -> str:
        if self.default is None:
            return self.option.unset
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        if isinstance(self.default, Mapping | list | tuple):
            return " ".join(map(str, self.default)) or "none"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def accept(self, value: object) -> Any:
        """The value as JSON and TOML can hold it. Raises SettingError."""
        if value is None and self.nullable:
            return None
        try:
            return self.kind.accept(value)
        except KindError as error:
            raise SettingError(f"{self.name} {error}") from None


@functools.cache
def settings_of(function: Callable[..., Any]) -> Mapping[str, Setting]:
    """The settings of `function`, in the order of its signature."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        # Python 3.10 makes `Annotated[T, …] = None` an Optional[Annotated[T, …]].
        parts = _members(hints.get(parameter.name))
        hint = next((part for part in parts if typing.get_origin(part) is Annotated), None)
        if hint is None:
            continue
        annotated, *extras = typing.get_args(hint)
        option = next((extra for extra in extras if isinstance(extra, Option)), None)
        if option is None:
            continue
        members = _members(annotated)
        nullable = type(None) in members
        if nullable and parameter.default is not None:
            raise TypeError(f"{parameter.name}: TOML has no null, so only None can be the default")
        kind = kind_of([member for member in members if member is not type(None)])
        found[parameter.name] = Setting(
            parameter.name, option, kind, nullable, _plain(parameter.default)
        )
    return types.MappingProxyType(found)


def collect(
    function: Callable[..., Any], values: Mapping[str, object], source: str = ""
) -> dict[str, Any]:
    """Every setting of `function` with a checked value: the given one, or else its default.

    Names in `values` that are Python's alone are left out. Raises SettingError.
    """
    checked = check(function, values, source)
    complete = {}
    for name, setting in settings_of(function).items():
        if name in checked:
            complete[name] = checked[name]
        elif setting.required:
            raise SettingError(f"{name} is missing: give {setting.flag}, or {name} in --config")
        else:
            complete[name] = setting.default
    return complete


def check(
    function: Callable[..., Any], values: Mapping[str, object], source: str = ""
) -> dict[str, Any]:
    """The settings among `values`, checked. `source` names the file they come from, for errors."""
    settings = settings_of(function)
    hidden = set(inspect.signature(function).parameters) - set(settings) if not source else set()
    place = f"{source}: " if source else ""
    checked = {}
    for name, value in values.items():
        if name in hidden:
            continue
        if name not in settings:
            raise SettingError(f"{place}unknown setting {name!r}{nearest(name, settings)}")
        try:
            checked[name] = settings[name].accept(value)
        except SettingError as error:
            raise SettingError(f"{place}{error}") from None
    return checked


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name most like `name`, or the known names if none is."""
    import difflib

    names = list(known)
    folded = {candidate.replace("-", "_").lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.replace("-", "_").lower(), folded, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {folded[close[0]]!r}?"
    return f"; known: {', '.join(names)}"


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]


def _plain(default: Any) -> Any:
    """Immutable defaults of a signature as the JSON types they stand for."""
    if isinstance(default, tuple):
        return list(default)
    return dict(default) if isinstance(default, Mapping) else default
