"""Quantisation and masks by ferrotune's CUDA kernels, on PyTorch's memory and current stream.

Nothing here allocates but through PyTorch, waits for the device, or loads code after ``prepare``:
all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch

from . import reference
from .types import Quant4bit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NAMES",
    "address",
    "dequantize_4bit",
    "dropout_mask",
    "parts",
    "prepare",
    "prepared_stream",
    "quantize_4bit",
    "raw_stream",
    "usable",
]

# The element types that kernels take, as the native calls name them.
NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_NESTED_BLOCKSIZE = 256
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent from CPU builds


@functools.cache
def usable(index: int) -> bool:
    """Whether the kernels run on device ``index``; warns once with the reason if not."""
    from .. import _native

    if torch.version.cuda is None:
        return False  # ROCm shows its devices as CUDA's
    try:
        _ready(index)
    except _native.CudaError as error:
        warnings.warn(
            f"ferrotune's CUDA kernels are not used on device {index}, PyTorch's own operations "
            f"are: {error}",
            stacklevel=5,
        )
        return False
    return True


def prepare(device: torch.device | int | str | None = None) -> None:
    """Loads every kernel onto a device (the current one unless given), once.

    Operations do so at their first call; before a CUDA graph is captured it must have happened.

    Raises ``CudaError`` without a driver or device, with a driver that is too old, and in a process
    forked after CUDA was in use; ``RuntimeError`` during a capture.
    """
    from .. import _native

    index = device if isinstance(device, int) else _index(device)
    _ready(index)
    _native.cuda_prepare(index)  # in a forked child, what the parent made ready is of no use


def _index(device: torch.device | str | None) -> int:
    index = None if device is None else torch.device(device).index
    if index is None:
        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    return index


@functools.cache
def _ready(index: int) -> None:
    from .. import _native

    if not _native.has_cuda:
        raise _native.CudaError("this build of ferrotune has no CUDA kernels")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ferrotune's kernels cannot be loaded while a CUDA graph is captured: call "
            "ferrotune.ops.cuda.prepare(device) before"
        )
    _native.cuda_prepare(index)
    _dynamic_map(index)


@functools.cache
def _dynamic_map(index: int) -> Tensor:
    """The 256 values of nested absmax, f32; made once, as a copy from the host ends a capture."""
    from .. import _native

    return torch.from_numpy(_native.dynamic_map()).to(torch.device("cuda", index))


def raw_stream(index: int) -> int:
    """PyTorch's current stream of a device, asked for at every call."""
    assert _raw_stream is not None
    return _raw_stream(index)  # type: ignore[no-any-return]


def prepared_stream(x: Tensor) -> tuple[int, int]:
    """The index of x's device, ready for calls, and PyTorch's current stream there."""
    index = x.device.index
    _ready(index)
    return index, raw_stream(index)


def quantize_4bit(values: Tensor, blocksize: int, quant_type: str, double_quant: bool) -> Quant4bit:
    """The codes and absmax of bitsandbytes' CUDA code; a NaN becomes code 0."""
    from .. import _native

    source = values.detach().contiguous()
    index = source.device.index
    _ready(index)
    elements = source.numel()
    blocks = -(-elements // blocksize)
    packed = source.new_empty((elements + 1) // 2, 1, dtype=torch.uint8)
    absmax = source.new_empty(blocks, dtype=torch.float32)
    stream = raw_stream(index)
    _native.cuda_quantize_4bit(
        index,
        stream,
        source.data_ptr(),
        _name(source.dtype),
        elements,
        quant_type,
        blocksize,
        packed.data_ptr(),
        absmax.data_ptr(),
    )
    nested_absmax = code = offset = None
    if double_quant:
        offset = absmax.mean()
        code = _dynamic_map(index).clone()
        codes = source.new_empty(blocks, dtype=torch.uint8)
        nested_absmax = source.new_empty(-(-blocks // _NESTED_BLOCKSIZE), dtype=torch.float32)
        _native.cuda_quantize_absmax(
            index,
            stream,
            absmax.data_ptr(),
            blocks,
            offset.data_ptr(),
            code.data_ptr(),
            codes.data_ptr(),
            nested_absmax.data_ptr(),
        )
        absmax = codes
    return Quant4bit(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_code=code,
        nested_offset=offset,
        quant_type=quant_type,
        blocksize=blocksize,
        nested_blocksize=_NESTED_BLOCKSIZE if double_quant else 0,
        shape=tuple(values.shape),
        dtype=values.dtype,
    )


def dequantize_4bit(quant: Quant4bit, dtype: torch.dtype, transpose: bool = False) -> Tensor:
    """W in ``dtype``, or its transpose ``[k, n]`` laid out as such; bitsandbytes' bits.

    The parts must fit together: ``Quant4bit.check``.
    """
    if dtype not in NAMES:
        found = reference.dequantize_4bit(quant, dtype)
        return found.t().contiguous() if transpose else found
    from .. import _native

    device = quant.packed.device
    for part in quant[1:5]:
        if part is not None and part.device != device:
            raise ValueError(f"the parts of a 4-bit weight must all be on {device}")
    shape = quant.shape
    k = shape[-1] if shape else 1
    n = 1
    for size in shape[:-1]:
        n *= size
    if transpose and len(shape) != 2:
        raise ValueError(f"only a matrix can be transposed, not shape {list(shape)}")
    _ready(device.index)
    out = torch.empty((k, n) if transpose else shape, dtype=dtype, device=device)
    weight, _alive = parts(quant)
    _native.cuda_dequantize_4bit(
        device.index,
        raw_stream(device.index),
        weight,
        out.data_ptr(),
        NAMES[dtype],
        n,
        k,
        transpose,
    )
    return out


def parts(quant: Quant4bit) -> tuple[tuple[int, int, int, int, int, str, int, int], Tensor | None]:
    """A 4-bit weight as native calls take it, and what must outlive the call beside it."""
    offset = quant.nested_offset
    if offset is not None and offset.dtype != torch.float32:
        offset = offset.float()  # whole checkpoints may have been cast
    numbers = (
        quant.packed.data_ptr(),
        quant.absmax.data_ptr(),
        address(quant.nested_absmax),
        address(quant.nested_code),
        address(offset),
        quant.quant_type,
        quant.blocksize,
        quant.nested_blocksize,
    )
    return numbers, offset


def address(tensor: Tensor | None) -> int:
    """Of its first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _name(dtype: torch.dtype) -> str:
    name = NAMES.get(dtype)
    if name is None:
        raise TypeError(f"values must be float32, float16 or bfloat16, not {dtype}")
    return name


def dropout_mask(
    rows: int,
    columns: int,
    p: float,
    seed: Tensor,
    stream: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> Tensor:
    """What dropout multiplies an ``[rows, columns]`` input by: 0 or 1/(1 - p), in ``dtype``.

    ``seed`` is an int64 of one element on the device; see ``ops.dropout_seed``.
    """
    from .. import _native

    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError("seed must be an int64 tensor of one element")
    if device is not None and seed.device != device:
        raise ValueError(f"seed is on {seed.device}, not on {device}")
    index = seed.device.index
    _ready(index)
    out = torch.empty(rows, columns, dtype=dtype, device=seed.device)
    _native.cuda_dropout_mask(
        index,
        raw_stream(index),
        out.data_ptr(),
        _name(dtype),
        out.numel(),
        p,
        seed.data_ptr(),
        stream,
    )
    return out
