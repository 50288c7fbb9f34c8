"""The subcommands: a module in `ferrotune.commands` registers its function with `@command`."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Invocation:
    """One call from a command line: the settings that were given, and which came from --config."""

    values: Mapping[str, Any]
    from_file: frozenset[str] = frozenset()
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its function owns the settings, its docstring's first line is the summary."""

    name: str
    function: Callable[..., Any]
    examples: tuple[str, ...]
    run: Callable[[Invocation], object]

    @property
    def summary(self) -> str:
        return (self.function.__doc__ or "").strip().partition("\n")[0]


_COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    *,
    examples: tuple[str, ...],
    run: Callable[[Invocation], object] | None = None,
) -> Callable[[Function], Function]:
    """Registers a function as subcommand `name`.

    `run` replaces the plain call where the command line does more than the function; what it
    returns is printed, None is not.
    """

    def register(function: Function) -> Function:
        def call(invocation: Invocation) -> object:
            return function(**invocation.values)

        _COMMANDS[name] = Command(name, function, examples, run or call)
        return function

    return register


@functools.cache
def _load() -> None:
    import pkgutil
    from importlib import import_module

    from . import commands

    for module in pkgutil.iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}")


def commands() -> Mapping[str, Command]:
    """Every subcommand by name, in the order in which their modules list themselves."""
    _load()
    return dict(sorted(_COMMANDS.items()))
