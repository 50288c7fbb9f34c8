"""The Rust extension's functions. stubtest holds this file to the code."""

# ---- adapter
from os import PathLike

import numpy as np
import numpy.typing as npt

class FormatError(ValueError): ...

_Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

def read_adapter(folder: str | PathLike[str]) -> tuple[str, dict[str, _Pair], list[str]]: ...
def write_adapter(
    folder: str | PathLike[str],
    config: str,
    modules: dict[str, _Pair],
    *,
    dtype: str = "float32",
    model_card: str = "",
) -> list[str]: ...
def match_targets(
    config: str,
    linear: list[str],
    *,
    other: list[str] = ...,
    output: str | None = None,
) -> tuple[list[tuple[str, tuple[int, float, float]]], list[str]]: ...
