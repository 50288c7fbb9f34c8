"""4-bit quantisation on numpy arrays, in bitsandbytes' formats and bit-equal to its CPU results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Quantized4bit", "dequantize_4bit", "quantize_4bit"]

QuantType = Literal["nf4", "fp4"]
DType = Literal["float32", "float16", "bfloat16"]


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized4bit:
    """A tensor in 4 bits an element.

    The tensor is flattened row-major into blocks of ``blocksize`` elements. Element 2i is the high
    nibble of ``packed[i]``, element 2i + 1 the low one. Block b is scaled by ``absmax[b]`` or,
    double-quantised, by
    ``nested_quant_map[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset``.
    """

    packed: npt.NDArray[np.uint8]
    """Codes, two a byte: [ceil(elements / 2)]."""
    absmax: npt.NDArray[np.float32] | npt.NDArray[np.uint8]
    """Largest magnitude of each block, or its 8-bit code with double quantisation: [blocks]."""
    quant_type: QuantType
    blocksize: int
    """Elements a block: 32, 64, 128, 256, 512, 1024, 2048 or 4096."""
    dtype: DType
    """Type of the tensor that was quantised."""
    shape: tuple[int, ...]
    """Shape of the tensor that was quantised."""
    nested_absmax: npt.NDArray[np.float32] | None = None
    """[ceil(blocks / nested_blocksize)]."""
    nested_quant_map: npt.NDArray[np.float32] | None = None
    """Values of the 8-bit codes: [256]."""
    nested_offset: float | None = None
    nested_blocksize: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        arrays = (self.packed, self.absmax, self.nested_absmax, self.nested_quant_map)
        return sum(array.nbytes for array in arrays if array is not None)

    def state_dict(self, prefix: str = "weight") -> dict[str, npt.NDArray[Any]]:
        """The arrays under bitsandbytes' checkpoint names, with ``prefix`` the weight's own name.

        Raises ``ValueError`` if the fields do not fit together.
        """
        from ferrotune import _native

        return dict(_native.quant_state_to_tensors(prefix, self))

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, npt.NDArray[Any]], prefix: str = "weight"
    ) -> Quantized4bit:
        """Reads a weight that bitsandbytes stored under the name ``prefix``.

        Raises ``KeyError`` if no 4-bit weight has that name, and ``FormatError``, naming the
        tensor, if one of its tensors is missing or does not fit.
        """
        import numpy as np

        from ferrotune import _native

        found = {
            name: (
                array.dtype.name,
                list(array.shape),
                _native_order(array).reshape(-1).view(np.uint8),
            )
            for name, array in tensors.items()
            if name == prefix or name.startswith(f"{prefix}.")
        }
        fields = _native.quant_state_from_tensors(prefix, found)
        if fields is None:
            raise KeyError(
                f"no 4-bit weight '{prefix}': '{prefix}.quant_state.bitsandbytes__nf4' is missing"
            )
        return cls(**fields)


def quantize_4bit(
    array: npt.NDArray[Any],
    *,
    blocksize: int = 64,
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
) -> Quantized4bit:
    """Quantises ``array`` to 4 bits an element, on all cores.

    ``array`` is float32, float16, or bfloat16: ml_dtypes' type, or uint16 for bfloat16's bits.
    ``blocksize`` is the elements that share an absmax (32 to 4096, powers of two). ``double_quant``
    quantises the absmax too, to 8 bits: 0.127 bits an element instead of 0.5 at blocksize 64.

    Raises ``TypeError`` for another type, and ``ValueError`` for another block size or type of
    code, and for a NaN or an infinity, naming its place.
    """
    from ferrotune import _native, threads

    threads.share_with_torch()
    dtype = _dtype_of(array)
    fields = _native.quantize_4bit(
        _bits(_native_order(array.reshape(-1)), dtype),
        list(array.shape),
        dtype,
        quant_type,
        blocksize,
        double_quant,
    )
    return Quantized4bit(**fields)


def dequantize_4bit(
    weight: Quantized4bit,
    *,
    dtype: DType | None = None,
    out: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """The values of ``weight``, as ``dtype`` (its own unless given); bfloat16 comes as uint16 bits.

    ``out`` is an array to fill instead of a new one: contiguous, of the weight's shape, and of
    ``dtype`` (its own type decides where ``dtype`` is not given). It is returned.

    Raises ``TypeError`` or ``ValueError`` if ``out`` or a field of ``weight`` does not fit.
    """
    import numpy as np

    from ferrotune import _native, threads

    threads.share_with_torch()
    if out is None:
        target: DType = weight.dtype if dtype is None else dtype
        out = np.empty(weight.shape, np.uint16 if target == "bfloat16" else np.dtype(target))
    else:
        target = _dtype_of(out)
        if dtype is not None and dtype != target:
            raise TypeError(f"out is {target}, but dtype is {dtype}")
        if out.shape != weight.shape:
            raise ValueError(
                f"out has shape {list(out.shape)}, but the weight has {list(weight.shape)}"
            )
        if not (out.flags.c_contiguous and out.flags.writeable and out.dtype.isnative):
            raise ValueError("out must be C-contiguous, writable and in this machine's byte order")
    _native.dequantize_4bit(weight, target, _bits(out.reshape(-1), target), 0)
    return out


def _dtype_of(array: npt.NDArray[Any]) -> DType:
    if not hasattr(array, "dtype"):
        raise TypeError(f"the array must be a numpy array, not {type(array).__name__}")
    name = str(array.dtype.name)
    if name == "float32":
        return "float32"
    if name == "float16":
        return "float16"
    if name in ("bfloat16", "uint16"):
        return "bfloat16"
    raise TypeError(
        f"the array must be float32, float16, bfloat16 or uint16 (bfloat16's bits), not {name}"
    )


def _native_order(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values, row-major and in this machine's byte order; a copy only where it must be."""
    import numpy as np

    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _bits(flat: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
    import numpy as np

    return flat if dtype == "float32" else flat.view(np.uint16)
