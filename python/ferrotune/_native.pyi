from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from ferrotune.quant import Quantized4bit

class FormatError(ValueError): ...

def quantize_4bit(
    values: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    shape: list[int],
    dtype: str,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
) -> dict[str, Any]: ...
def dequantize_4bit(
    weight: Quantized4bit,
    dtype: str,
    out: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    start: int,
) -> None: ...
def quant_state_to_tensors(
    name: str, weight: Quantized4bit
) -> list[tuple[str, npt.NDArray[Any]]]: ...
def quant_state_from_tensors(
    name: str, tensors: dict[str, tuple[str, list[int], npt.NDArray[np.uint8]]]
) -> dict[str, Any] | None: ...

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
