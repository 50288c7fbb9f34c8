"""ferrotune.quantize_4bit and dequantize_4bit beside bitsandbytes' CPU results, bit for bit."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ferrotune import _native
from ferrotune.quant import DType, Quantized4bit, dequantize_4bit, quantize_4bit

torch = pytest.importorskip("torch", reason="parity is with torch and bitsandbytes")
F = pytest.importorskip("bitsandbytes.functional", reason="parity is with bitsandbytes")

Array = npt.NDArray[Any]
TYPES = ["nf4", "fp4"]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES: list[DType] = ["float32", "float16", "bfloat16"]


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Any:
    """bitsandbytes compiles its code for odd shapes, once a shape: eager gives the same sooner."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def tensor(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(0.02).to(getattr(torch, dtype))


def bits(x: Any) -> Array:
    """A torch tensor as numpy: bfloat16 as uint16."""
    array: Array = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def same_bits(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def comparable(values: Array) -> Array:
    """Values as bitsandbytes gives them on any CPU.

    Its code for CPUs without AVX-512 makes FP4's second zero -0 in every shape; ours is that of the
    code for AVX-512 everywhere. There both zeros count as one.
    """
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return values
    if values.dtype == np.uint16:  # bfloat16
        return np.where(values == 0x8000, np.uint16(0), values)
    found: Array = values + values.dtype.type(0)
    return found


def reference(q: Any, state: Any) -> Any:
    """bitsandbytes' values.

    Flattened where its AVX-512 code would take the wrong block's absmax: rows of a multiple of 16
    elements that blocks straddle.
    """
    shape = state.shape
    if len(shape) > 1 and shape[-1] % 16 == 0 and shape[-1] % state.blocksize:
        state.shape = torch.Size([shape.numel()])
    values = F.dequantize_4bit(q, state).reshape(shape)
    state.shape = shape
    return values


def check(x: Any, blocksize: int, quant_type: Any, double_quant: bool) -> None:
    q, state = F.quantize_4bit(
        x, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
    )
    ours = quantize_4bit(
        bits(x), blocksize=blocksize, quant_type=quant_type, double_quant=double_quant
    )
    assert same_bits(ours.packed, q.numpy().reshape(-1))
    assert same_bits(ours.absmax, state.absmax.numpy())
    if double_quant:
        assert ours.nested_absmax is not None
        assert ours.nested_quant_map is not None
        assert np.float32(ours.nested_offset).tobytes() == state.offset.numpy().tobytes()
        assert same_bits(ours.nested_absmax, state.state2.absmax.numpy())
        assert same_bits(ours.nested_quant_map, state.state2.code.numpy())
    for dtype in DTYPES:
        state.dtype = getattr(torch, dtype)
        values, expected = dequantize_4bit(ours, dtype=dtype), bits(reference(q, state))
        assert same_bits(comparable(values), comparable(expected)), dtype


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_parity(dtype: str, blocksize: int, quant_type: str, double_quant: bool) -> None:
    # Rows that blocks divide, straddle and exceed; odd sizes; each of bitsandbytes' code paths.
    for shape in [
        (64, 128),
        (33, 96),
        (17, 100),
        (7, 333),
        (5, 6),
        (4099,),
        (1,),
        (2, 3, 50),
        (5, 4096),
    ]:
        check(tensor(shape, dtype), blocksize, quant_type, double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_at_size(dtype: str) -> None:
    """More than 32,768 blocks: torch splits the sum behind the nested offset over its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(_rayon_threads())
    try:
        check(tensor((2048, 2816), dtype), 64, "nf4", True)
        check(tensor((1500, 1401), dtype), 32, "fp4", True)
    finally:
        torch.set_num_threads(threads)


def _rayon_threads() -> int:
    return int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)


@pytest.mark.parametrize("quant_type", TYPES)
def test_thresholds(quant_type: str) -> None:
    """Values on, just under and just over every threshold."""
    code = np.sort(F.get_4bit_type(quant_type, device="cpu").numpy())
    middle = ((code[:-1] + code[1:]) / np.float32(2)).astype(np.float32)
    one = np.float32(1)
    values = np.concatenate(
        [middle, np.nextafter(middle, -one), np.nextafter(middle, one), code, [one, -one]]
    )
    check(torch.from_numpy(values.astype(np.float32)), 64, quant_type, False)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", TYPES)
def test_zero_blocks(quant_type: str, double_quant: bool) -> None:
    x = tensor((5, 64), "float32")
    x[1:3] = 0
    check(x, 64, quant_type, double_quant)
    check(torch.zeros(200), 64, quant_type, double_quant)
    check(torch.cat([x.flatten(), torch.zeros(31)]), 64, quant_type, double_quant)


def test_tiny_values() -> None:
    """Absmax below 1e-38, where the scale stops growing.

    Rows of 66 keep bitsandbytes from the code that flushes subnormal bfloat16 to zero.
    """
    check(tensor((4, 66), "float32") * 1e-38, 64, "nf4", False)
    check(tensor((3, 33), "float32") * 1e-37, 64, "fp4", False)


def test_uniform_absmax() -> None:
    """One value everywhere: nothing is left to nest once the mean is taken off."""
    check(torch.full((40, 64), 0.37), 64, "nf4", True)


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(
        np.float32,
        # bitsandbytes takes the one byte of up to two values for a transposed weight, and fails
        # where that has three dimensions.
        hnp.array_shapes(max_dims=3, max_side=70).filter(
            lambda shape: len(shape) < 3 or math.prod(shape) > 2
        ),
        elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
    ),
    blocksize=st.sampled_from(BLOCKSIZES),
    quant_type=st.sampled_from(TYPES),
    double_quant=st.booleans(),
)
def test_parity_on_any_values(
    values: Array, blocksize: int, quant_type: str, double_quant: bool
) -> None:
    values = np.where(
        np.abs(values) < 1e-25, np.float32(0), values
    )  # AVX-512-BF16 flushes subnormal results
    check(torch.from_numpy(values), blocksize, quant_type, double_quant)


def test_straddling_blocks_keep_their_absmax() -> None:
    """Where bitsandbytes' AVX-512 code is wrong, the values are its reference code's."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    x = tensor((6, 48), "float32")
    q, state = F.quantize_4bit(x, blocksize=64, quant_type="nf4")
    expected = _dequantize_4bit_compute(
        q.reshape(-1), state.absmax, state.code, 64, x.shape, x.dtype
    )
    assert same_bits(
        dequantize_4bit(quantize_4bit(x.numpy(), double_quant=False)), expected.numpy()
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", TYPES)
def test_state_dict_is_bitsandbytes(quant_type: str, double_quant: bool) -> None:
    x = tensor((48, 90), "bfloat16")
    q, state = F.quantize_4bit(
        x, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
    )
    theirs = {"weight": q} | {
        f"weight.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    weight = quantize_4bit(bits(x), quant_type=quant_type, double_quant=double_quant)  # type: ignore[arg-type]
    ours = weight.state_dict()
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        if "quant_state" in key:
            assert json.loads(ours[key].tobytes()) == json.loads(bytes(value.tolist()))
        else:
            assert same_bits(ours[key], value.numpy()), key

    read = Quantized4bit.from_state_dict({key: value.numpy() for key, value in theirs.items()})
    assert same_bits(dequantize_4bit(read), bits(reference(q, state)))
    back = F.QuantState.from_dict(
        {
            key.removeprefix("weight."): torch.from_numpy(value.copy())
            for key, value in ours.items()
            if key != "weight"
        },
        device="cpu",
    )
    assert torch.equal(reference(torch.from_numpy(ours["weight"]), back), reference(q, state))


def test_state_dict_errors() -> None:
    tensors = quantize_4bit(np.ones((8, 64), np.float32)).state_dict("a.weight")
    with pytest.raises(KeyError, match=r"no 4-bit weight 'b\.weight'"):
        Quantized4bit.from_state_dict(tensors, "b.weight")
    for name in tensors:
        if "quant_state" not in name:
            missing = {key: value for key, value in tensors.items() if key != name}
            with pytest.raises(_native.FormatError, match=f"tensor '{name}': missing"):
                Quantized4bit.from_state_dict(missing, "a.weight")
    with pytest.raises(_native.FormatError, match="100 bytes"):
        Quantized4bit.from_state_dict(tensors | {"a.weight": np.zeros(100, np.uint8)}, "a.weight")
    with pytest.raises(
        _native.FormatError, match=r"a\.weight\.quant_map': is not the codebook of nf4"
    ):
        Quantized4bit.from_state_dict(
            tensors | {"a.weight.quant_map": np.ones(16, np.float32)}, "a.weight"
        )


def test_out_is_filled_and_returned() -> None:
    x = np.linspace(-1, 1, 6000, dtype=np.float32).reshape(60, 100)
    weight = quantize_4bit(x)
    for dtype in ("float32", "float16"):
        out = np.full((60, 100), np.nan, dtype)
        assert dequantize_4bit(weight, out=out) is out
        assert same_bits(out, dequantize_4bit(weight, dtype=dtype))
    with pytest.raises(ValueError, match=r"out has shape \[6000\], but the weight has \[60, 100\]"):
        dequantize_4bit(weight, out=np.empty(6000, np.float32))
    with pytest.raises(TypeError, match="out is float16, but dtype is float32"):
        dequantize_4bit(weight, dtype="float32", out=np.empty((60, 100), np.float16))
    with pytest.raises(TypeError, match="not float64"):
        dequantize_4bit(weight, out=np.empty((60, 100)))
    with pytest.raises(ValueError, match="C-contiguous"):
        dequantize_4bit(weight, out=np.empty((100, 60), np.float32).T)
    frozen = np.empty((60, 100), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        dequantize_4bit(weight, out=frozen)


def test_views_and_other_orders_are_read_as_they_look() -> None:
    x = np.random.default_rng(0).standard_normal((64, 130)).astype(np.float32)
    for view in (x.T, x[::2, 1:], np.asfortranarray(x)):
        assert same_bits(
            quantize_4bit(view).packed, quantize_4bit(np.ascontiguousarray(view)).packed
        )


@pytest.mark.parametrize("dtype", ["f4", "f2", "u2"])
def test_the_byte_order_of_another_machine(dtype: str) -> None:
    """uint16 holds bfloat16's bits: 1.5 to 2.5 here."""
    values = np.linspace(16320, 16416, 97) if dtype == "u2" else np.linspace(-1, 1, 97)
    ours, theirs = values.astype(f"<{dtype}"), values.astype(f">{dtype}")
    weight, swapped = quantize_4bit(ours), quantize_4bit(theirs)
    assert same_bits(weight.packed, swapped.packed)
    assert weight.state_dict().keys() == swapped.state_dict().keys()
    tensors = {
        name: array.astype(array.dtype.newbyteorder(">"))
        for name, array in weight.state_dict().items()
    }
    read = Quantized4bit.from_state_dict(tensors)
    assert same_bits(dequantize_4bit(read), dequantize_4bit(weight))
    with pytest.raises(ValueError, match="byte order"):
        dequantize_4bit(weight, out=np.empty(97, f">{dtype}"))


def test_empty() -> None:
    weight = quantize_4bit(np.empty((0, 5), np.float32))
    assert weight.packed.size == weight.absmax.size == 0
    assert weight.shape == (0, 5)
    assert dequantize_4bit(weight).shape == (0, 5)


def test_bad_arguments() -> None:
    x = np.ones(100, np.float32)
    with pytest.raises(ValueError, match="not 48"):
        quantize_4bit(x, blocksize=48)
    with pytest.raises(ValueError, match="not 'int4'"):
        quantize_4bit(x, quant_type="int4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a numpy array, not list"):
        quantize_4bit([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int64"):
        quantize_4bit(np.ones(100, np.int64))
    for bad, name in ((np.nan, "NaN"), (np.inf, "inf")):
        x[77] = bad
        with pytest.raises(ValueError, match=f"element 77 of the flattened tensor is {name}"):
            quantize_4bit(x)
