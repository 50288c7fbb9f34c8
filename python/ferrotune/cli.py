"""The command line: one parser, whose subcommands come from the registry."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import ranks
from .options import SettingError, nearest
from .registry import Command, Invocation, commands

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# Wrong values, broken files, paths that cannot be used, and what this build has no code for.
_BAD_INPUT = (
    ValueError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    NotImplementedError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    0: done. 2: bad input. 1: a run that failed, data that an audit stops. 130: interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show an arrow shows "?"
            stream.reconfigure(errors="replace")
    try:
        try:
            return _run(words)
        finally:  # --help leaves by SystemExit
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        _complain(f"interrupted{f': {stop}' if str(stop) else ''}", words)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; Python would complain again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        _complain(f"error: {describe(error)}", words)
        return exit_code(error)


def exit_code(error: BaseException) -> int:
    return EXIT_BAD_INPUT if isinstance(error, _BAD_INPUT) else EXIT_FAILED


def describe(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
        return f"{os.fsdecode(error.filename)}: {os.strerror(error.errno)}"
    if isinstance(error, ImportError) and "_native" in str(error):
        return "ferrotune's native extension is missing or broken: install ferrotune again"
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | RuntimeError | OSError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _complain(line: str, words: Sequence[str]) -> None:
    if not ranks.is_first() and line.endswith(ranks.SAID_ELSEWHERE):
        return
    if "--debug" in words:
        import traceback

        traceback.print_exc()
    print(line, file=sys.stderr)


def _run(words: list[str]) -> int:
    from .parser import build_parser

    known = commands()
    if words and not words[0].startswith("-") and words[0] not in known:
        raise SettingError(f"no command {words[0]!r}{nearest(words[0], known)}")
    parser = build_parser(known)
    values = vars(parser.parse_args(words))
    if values.pop("version", False):
        from .version import version

        print(f"ferrotune {version()}")
        return 0
    name = values.pop("command", None)
    if name is None:
        parser.print_help()
        return 0
    values.pop("debug", None)
    as_json = values.pop("json", False)
    result = known[name].run(_gather(known[name], values, as_json))
    if result is not None and ranks.is_first():
        _show(result, as_json)
    return getattr(result, "exit_code", 0)


def _gather(command: Command, values: dict[str, Any], as_json: bool) -> Invocation:
    """The command line's values over those of its --config."""
    from .options import check, settings_of

    settings = settings_of(command.function)
    for name in values.keys() & settings.keys():
        join = settings[name].kind.join
        values[name] = values[name] if join is None else join(values[name])
    path = values.pop("config", None)
    in_file: dict[str, Any] = {}
    if path is not None:
        from .config import read_toml

        in_file = check(command.function, read_toml(path), source=path)
    merged = {**in_file, **values}
    for name, setting in settings.items():
        if setting.required and name not in merged:
            raise SettingError(
                f"{command.name} needs {setting.flag} (or {name} = … in a --config file); "
                f"ferrotune {command.name} --help shows an example"
            )
    return Invocation(merged, frozenset(in_file) - frozenset(values), as_json)


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    if not sys.stdout.isatty():  # plain lines of any length: nothing folded, cut or padded
        print(result)
        return
    from rich.console import Console

    Console(highlight=False).print(result)
