"""The argparse parser, built from the registered functions' settings."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .options import Setting, SettingError, nearest, settings_of
from .registry import Command
from .shared import RUN


class Parser(argparse.ArgumentParser):
    """Raises SettingError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, extra = self.parse_known_args(args, namespace)
        if extra:
            name = getattr(found, "command", None)
            raise SettingError(self._unknown(extra[0], name))
        return found

    def _unknown(self, word: str, name: str | None) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {word!r}"
        flag = word.partition("=")[0]
        known = self._option_string_actions if name is None else self._flags[name]
        return f"unknown option {flag!r}{nearest(flag, [k for k in known if k.startswith('--')])}"

    _flags: Mapping[str, Sequence[str]] = {}


def build_parser(known: Mapping[str, Command]) -> Parser:
    parser = Parser(
        prog="ferrotune",
        description="LoRA and QLoRA fine-tuning at the speed of the frozen model.",
        epilog="ferrotune COMMAND --help shows a command's settings, their units and defaults.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    _add_debug(parser)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    flags = {}
    for command in known.values():
        child = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            usage=_usage(command),
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )
        _fill(child, command)
        flags[command.name] = list(child._option_string_actions)
    parser._flags = flags
    return parser


def _usage(command: Command) -> str:
    required = (
        f"{setting.kind.metavar}{'' if setting.kind.join is None else '…'}"
        if setting.option.positional
        else f"{setting.flag} {setting.kind.metavar}"
        for setting in settings_of(command.function).values()
        if setting.required
    )
    return " ".join(["ferrotune", command.name, *required, "[settings]"])


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    grouped: dict[str, list[Setting]] = {}
    for setting in settings_of(command.function).values():
        grouped.setdefault(setting.option.group, []).append(setting)
    for heading in sorted(grouped, key=lambda heading: heading == RUN):
        group = parser.add_argument_group(heading)
        for setting in grouped[heading]:
            _add(group, setting)
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    general.add_argument(
        "--config",
        metavar="FILE.toml",
        default=argparse.SUPPRESS,
        help="read settings from a TOML file with the same names, underscores for dashes; "
        "the command line wins",
    )
    general.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the result as one line of JSON",
    )
    _add_debug(general)


def _add_debug(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show a traceback with an error",
    )


def _add(group: argparse._ArgumentGroup, setting: Setting) -> None:
    kind = setting.kind
    options: dict[str, Any] = {
        "dest": setting.name,
        "default": argparse.SUPPRESS,
        "help": _help(setting).replace("%", "%%"),
    }
    if kind.is_flag:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **options)
        return
    options |= {"type": _typed(setting), "metavar": kind.metavar}
    if kind.join is not None:
        options |= {"nargs": "+", "action": "extend"}
    if setting.option.positional:  # the flag is for those who write it as other commands have it
        dest = options.pop("dest")
        group.add_argument(dest, **{**options, "nargs": "?" if kind.join is None else "*"})
        options |= {"dest": dest, "help": "the same"}
    group.add_argument(setting.flag, **options)


def _help(setting: Setting) -> str:
    facts = [setting.option.unit] if setting.option.unit else []
    facts.append("required" if setting.required else f"default: {setting.default_text()}")
    return f"{setting.option.help} ({'; '.join(facts)})"


def _typed(setting: Setting) -> Any:
    def parse(word: str) -> Any:
        try:
            return setting.kind.parse(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
