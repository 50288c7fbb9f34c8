"""TOML files of settings: read, and written so that reading gives the same settings again."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .options import SettingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_BYTES = 1 << 20  # of a file of settings, which may name many data files
# A key of 64 parts: settings have one, and tomllib's time grows with the square of their number.
_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){63}""")


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and values of a TOML file. Raises OSError, and SettingError where it is not TOML."""
    with Path(path).open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise SettingError(f"{os.fspath(path)}: larger than {_MOST_BYTES >> 20} MiB")
    try:
        text = data.decode()
        deep = _DEEP_KEY.search(text) is not None
        settings = {} if deep else tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise SettingError(f"{os.fspath(path)}: not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{os.fspath(path)}: not TOML: {error}") from None
    except RecursionError:
        deep = True
    if deep:
        raise SettingError(f"{os.fspath(path)}: its keys or values are nested too deeply")
    return settings


def to_toml(settings: Mapping[str, Any], header: str = "") -> str:
    """Settings as TOML under `header`, each line of it a comment. None is an absent key."""
    import tomli_w

    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    present = {name: value for name, value in settings.items() if value is not None}
    return comment + tomli_w.dumps(present)
