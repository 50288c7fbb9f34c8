"""Records of Debian's packages with labels, read on this machine and never redistributed.

`packages` fetches them (`apt-get download`, unpacked by `dpkg-deb -x`) into a folder:

    apt-get update
    apt-get download dict-foldoc fortunes fortunes-de

`python benches/real_records.py FOLDER [PACKAGE...]` does the same and leaves the .deb files there.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = ("dict-foldoc", "fortunes", "fortunes-de")
TOPICS = (
    "art", "computers", "men-women", "politics", "science", "songs-poems", "wisdom", "work",
)  # fmt: skip

Rows = list[tuple[str, str]]  # text and label

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_TAG = re.compile(r"<([a-z ,/-]+)>")
_LONGEST_HEAD = 400  # characters of an entry in which its subject's tag stands
_SHORTEST_FORTUNE = 16  # characters


def packages(folder: Path, given: Path | None, names: Sequence[str] = PACKAGES) -> Path:
    """Unpacks the packages' files, fetched or from `given`, a folder of .deb files.

    Raises OSError where a package is not in `given`, or cannot be fetched.
    """
    archives = folder if given is None else given
    if given is None:
        download(folder, names)
    for name in names:
        found = sorted(archives.glob(f"{name}_*.deb"))
        if not found:
            raise FileNotFoundError(f"{archives} has no {name}_*.deb")
        _run("dpkg-deb", "-x", str(found[-1]), str(folder / "files"))
    return folder / "files"


def download(folder: Path, names: Sequence[str]) -> None:
    """Fetches the packages' .deb files into a folder. Raises OSError."""
    # apt's own user may not write here: it then says so and goes on as this one.
    _run("apt-get", "-q", "download", *names, folder=folder)


def _run(*command: str, folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not there: this takes Debian or Ubuntu") from None
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()} (apt-get update first?)")


def foldoc(files: Path) -> Rows:
    """Entries of the Free On-line Dictionary of Computing whose first subject is a frequent one."""
    folder = files / "usr/share/dictd"
    content = gzip.decompress((folder / "foldoc.dict.dz").read_bytes())
    places: set[tuple[int, int]] = set()
    for line in (folder / "foldoc.index").read_text(encoding="utf-8").splitlines():
        word, *place = line.split("\t")
        if not word.startswith("00"):  # the data base's own entries
            places.add((_number(place[0]), _number(place[1])))
    rows: Rows = []
    for start, length in sorted(places):
        entry = content[start : start + length].decode("utf-8", "replace")
        tag = _TAG.search(entry[:_LONGEST_HEAD])
        if tag is not None:
            text = " ".join((entry[: tag.start()] + entry[tag.end() :]).split())
            rows.append((text, tag[1].split(",")[0].strip()))
    frequent = {label for label, _ in Counter(label for _, label in rows).most_common(8)}
    return [row for row in rows if row[1] in frequent]


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def descriptions() -> Rows:
    """One-line descriptions of the packages that apt knows, with their section of the archive."""
    listed = subprocess.run(
        ["apt-cache", "dumpavail"], capture_output=True, check=True
    ).stdout.decode("utf-8", "replace")
    rows: Rows = []
    for stanza in listed.split("\n\n"):
        fields = dict(
            line.split(": ", 1)
            for line in stanza.splitlines()
            if ": " in line and not line.startswith(" ")
        )
        text = fields.get("Description") or fields.get("Description-en")
        if text and "Section" in fields:
            rows.append((text, fields["Section"].rsplit("/", 1)[-1]))
    return rows


def fortunes(files: Path) -> Rows:
    """Fortunes of eight topics by their file, but for the shortest ones."""
    folder = files / "usr/share/games/fortunes"
    return [
        (text, topic)
        for topic in TOPICS
        for text in cookies(folder / topic)
        if len(text) >= _SHORTEST_FORTUNE
    ]


def german(files: Path) -> list[str]:
    """German fortunes, to plant among English ones."""
    folder = files / "usr/share/games/fortunes/de"
    return list(cookies(folder / "sprueche"))


def cookies(path: Path) -> Iterator[str]:
    """What the lines of one per cent sign separate."""
    content = path.read_bytes().decode("utf-8", "replace")
    for text in re.split(r"^%.*$", content, flags=re.MULTILINE):
        if text.strip():
            yield text.strip()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    try:
        download(target, sys.argv[2:] or PACKAGES)
    except OSError as error:
        sys.exit(str(error))
