"""Files that are either old or new, never half of each; and folders not yet taken."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes `content` (text as UTF-8) beside `path`, syncs it to disk and renames it.

    Raises OSError naming `path`; the file that was there, if any, is then unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _fill(file, data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # a full disk names no file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def _fill(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def is_taken(folder: Path) -> bool:
    """Whether something is there already: a file, or a folder with anything in it."""
    if folder.is_dir():
        return any(folder.iterdir())
    return folder.exists()


def free_sibling(folder: Path, taken: Callable[[Path], bool] = is_taken) -> Path:
    """`folder` itself where it is free, else the first free one of folder-2, folder-3, …"""
    candidate, number = folder, 1
    while taken(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def fingerprint(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 (hexadecimal) of a file's content."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
