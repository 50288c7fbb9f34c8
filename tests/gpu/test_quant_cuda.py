"""4-bit kernels, bit for bit: beside the operations in plain PyTorch, and beside bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ferrotune.ops import cuda, reference
from ferrotune.ops.types import BLOCKSIZES, Quant4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Odd, tiny, with blocks that straddle rows, with and without the fast way of the transposed kernel.
SHAPES = [
    (1, 1), (1, 2), (3, 5), (7, 33), (1, 4097), (64, 64), (5, 129), (8, 16), (16, 48), (12, 80),
    (24, 80), (129, 96), (264, 272), (1000, 1001), (96, 4096), (4096, 40),
]  # fmt: skip


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: -0 and 0 differ, a NaN is itself."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(width)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values whose scale changes along the tensor, with a stretch of zeros."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cuda")
    flat = values.view(-1)
    flat *= torch.linspace(0.01, 3, flat.numel(), device="cuda")
    flat[flat.numel() // 3 : flat.numel() // 2] = 0
    return values.to(dtype)


def weight(
    shape: tuple[int, ...], quant_type: str, blocksize: int, nested: bool, seed: int = 0
) -> Quant4bit:
    """Random codes and absmax: every code in every place."""
    generator = torch.Generator("cuda").manual_seed(seed)
    elements = 1
    for size in shape:
        elements *= size
    blocks = -(-elements // blocksize)

    def uniform(count: int) -> torch.Tensor:
        return torch.rand(count, device="cuda", generator=generator) + 0.01

    def octets(count: int) -> torch.Tensor:
        drawn = torch.randint(0, 256, (count,), device="cuda", generator=generator)
        return drawn.to(torch.uint8)

    from ferrotune import _native

    return Quant4bit(
        packed=octets((elements + 1) // 2).unsqueeze(1),
        absmax=octets(blocks) if nested else uniform(blocks),
        nested_absmax=uniform(-(-blocks // 256)) if nested else None,
        nested_code=torch.from_numpy(_native.dynamic_map()).cuda() if nested else None,
        nested_offset=torch.tensor(1.7071, device="cuda") if nested else None,
        quant_type=quant_type,
        blocksize=blocksize,
        nested_blocksize=256 if nested else 0,
        shape=shape,
        dtype=torch.bfloat16,
    )


def expected(quant: Quant4bit, dtype: torch.dtype) -> torch.Tensor:
    """By PyTorch on the device; FP4's code 8 is -0, as in bitsandbytes' CUDA code."""
    out = reference.dequantize_4bit(quant, torch.float32)
    if quant.quant_type == "fp4":
        packed = quant.packed.reshape(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: out.numel()]
        out = torch.where((codes == 8).reshape(out.shape), -0.0, out)
    return out.to(dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_is_exact(blocksize: int, quant_type: str, nested: bool) -> None:
    for number, shape in enumerate(SHAPES):
        quant = weight(shape, quant_type, blocksize, nested, seed=number)
        for dtype in DTYPES:
            want = expected(quant, dtype)
            assert same(cuda.dequantize_4bit(quant, dtype), want), (shape, dtype)
            got = cuda.dequantize_4bit(quant, dtype, transpose=True)
            assert same(got, want.t()), (shape, dtype, "transposed")


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_dequantize_at_any_alignment(offset: int) -> None:
    quant = weight((96, 160), "nf4", 64, True)
    storage = torch.zeros(quant.packed.numel() + offset, dtype=torch.uint8, device="cuda")
    storage[offset:] = quant.packed.view(-1)
    moved = quant._replace(packed=storage[offset:])
    for transpose in (False, True):
        want = cuda.dequantize_4bit(quant, torch.bfloat16, transpose)
        assert same(cuda.dequantize_4bit(moved, torch.bfloat16, transpose), want)


def test_dequantize_other_forms() -> None:
    quant = weight((64, 96), "nf4", 64, True)
    want = cuda.dequantize_4bit(quant, torch.bfloat16)
    for storage in (torch.bfloat16, torch.float32):
        moved = quant._replace(packed=quant.packed.view(-1).view(storage))
        assert same(cuda.dequantize_4bit(moved, torch.bfloat16), want)
    assert quant.nested_offset is not None
    half = quant._replace(nested_offset=quant.nested_offset.half())
    assert same(cuda.dequantize_4bit(half, torch.float32), expected(half, torch.float32))
    flat = quant._replace(shape=(64 * 96,))
    assert same(cuda.dequantize_4bit(flat, torch.bfloat16), want.view(-1))
    cube = quant._replace(shape=(4, 16, 96))
    assert same(cuda.dequantize_4bit(cube, torch.bfloat16), want.view(4, 16, 96))
    with pytest.raises(ValueError, match="only a matrix"):
        cuda.dequantize_4bit(cube, torch.bfloat16, transpose=True)
    with pytest.raises(ValueError, match="must all be on cuda"):
        cuda.dequantize_4bit(quant._replace(absmax=quant.absmax.cpu()), torch.bfloat16)
    empty = weight((0, 96), "nf4", 64, False)
    assert cuda.dequantize_4bit(empty, torch.bfloat16).shape == (0, 96)
    assert cuda.dequantize_4bit(empty, torch.bfloat16, transpose=True).shape == (96, 0)
    wide = cuda.dequantize_4bit(quant, torch.float64)
    assert torch.equal(wide, reference.dequantize_4bit(quant, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_chooses_the_nearest(blocksize: int, quant_type: str, dtype: torch.dtype) -> None:
    """Without bitsandbytes: absmax are exact, errors at most half a step but for rounding."""
    for shape in [(1, 1), (3, 5), (64, 64), (5, 129), (129, 96), (1000, 1001)]:
        values = random(*shape, dtype=dtype)
        quant = cuda.quantize_4bit(values, blocksize, quant_type, False)
        flat = values.float().view(-1)
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
        assert same(quant.absmax, padded.abs().amax(1))
        assert quant.packed.dtype == torch.uint8
        assert quant.packed.shape == ((flat.numel() + 1) // 2, 1)
        book = expected(
            weight((1, 16), quant_type, 32, False)._replace(
                packed=torch.tensor([16 * (2 * i) + 2 * i + 1 for i in range(8)]).byte().cuda(),
                absmax=torch.ones(1, device="cuda"),
            ),
            torch.float32,
        ).view(-1)
        scaled = padded / padded.abs().amax(1, keepdim=True).clamp_min(1e-30)
        best = (scaled.unsqueeze(-1) - book).abs().amin(-1).view(-1)[: flat.numel()]
        packed = quant.packed.view(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: flat.numel()]
        zero = quant.absmax.repeat_interleave(blocksize)[: flat.numel()] == 0
        assert bool((codes[zero] == 0).all())
        error = (scaled.view(-1)[: flat.numel()] - book[codes.long()]).abs()
        assert bool((error[~zero] <= best[~zero] + 2e-6).all())


def test_quantize_at_any_alignment_and_stride() -> None:
    values = random(65, 130, dtype=torch.bfloat16)
    for view in (values[:, 1:], values.view(-1)[1:].view(-1), values.t()):
        got = cuda.quantize_4bit(view, 64, "nf4", True)
        moved = view.clone(memory_format=torch.contiguous_format)
        want = cuda.quantize_4bit(moved, 64, "nf4", True)
        for a, b in zip(got.tensors, want.tensors, strict=True):
            assert a is not None
            assert b is not None
            assert same(a, b)


def test_more_than_2_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    n, k = 65_544, 32_784  # n·k = 2³¹ + 1,310,848
    generator = torch.Generator("cuda").manual_seed(0)
    values = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    quant = cuda.quantize_4bit(values, 64, "nf4", True)
    # The last rows start on a block's boundary: quantised alone they give the same codes.
    rows = 64
    tail = cuda.quantize_4bit(values[-rows:], 64, "nf4", False)
    codes = quant.packed.view(-1)[-rows * k // 2 :]
    assert same(codes, tail.packed.view(-1))
    del values, tail
    straight = cuda.dequantize_4bit(quant, torch.bfloat16)
    blocks = rows * k // 64
    assert quant.nested_absmax is not None
    assert quant.nested_code is not None
    assert quant.nested_offset is not None
    place = torch.arange(quant.absmax.numel() - blocks, quant.absmax.numel(), device="cuda")
    scale = quant.nested_code[quant.absmax[place].long()] * quant.nested_absmax[place // 256]
    absmax = scale + quant.nested_offset
    plain = Quant4bit(
        codes, absmax, None, None, None, "nf4", 64, 0, (rows, k), torch.bfloat16
    )  # fmt: skip
    assert same(straight[-rows:], expected(plain, torch.bfloat16))
    turned = cuda.dequantize_4bit(quant, torch.bfloat16, transpose=True)
    for start in range(0, k, 4096):
        assert torch.equal(turned[start : start + 4096], straight[:, start : start + 4096].t())


# ---- beside bitsandbytes


def theirs(values: torch.Tensor, blocksize: int, quant_type: str, nested: bool) -> tuple[Any, Any]:
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.quantize_4bit(  # type: ignore[no-any-return]
        values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bitsandbytes_bits(
    blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for number, shape in enumerate(SHAPES):
        values = random(*shape, dtype=dtype, seed=number)
        packed, state = theirs(values, blocksize, quant_type, nested)
        quant = cuda.quantize_4bit(values, blocksize, quant_type, nested)
        assert same(quant.packed.view(-1), packed.view(-1)), shape
        assert same(quant.absmax, state.absmax), shape
        if nested:
            assert quant.nested_absmax is not None
            assert quant.nested_code is not None
            assert quant.nested_offset is not None
            assert same(quant.nested_absmax, state.state2.absmax), shape
            assert same(quant.nested_code, state.state2.code.to(values.device)), shape
            assert same(quant.nested_offset.view(1), state.offset.view(1)), shape
        # bitsandbytes transposes what one byte holds.
        want = functional.dequantize_4bit(packed, state).reshape(shape)
        got = cuda.dequantize_4bit(Quant4bit.from_bitsandbytes(packed, state), dtype)
        assert same(got, want), shape
        turned = cuda.dequantize_4bit(quant, dtype, transpose=True)
        assert same(turned, want.t()), shape


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_bits_of_hard_values(quant_type: str) -> None:
    """Midpoints and their neighbours, zeros of both signs, subnormals, the largest and smallest."""
    pytest.importorskip("bitsandbytes.functional")
    midpoints = [
        0.8480964004993439, 0.6106329262256622, 0.4599952697753906, 0.33967943489551544,
        0.23460740596055984, 0.13791173323988914, 0.045525018125772476, 0.03979014977812767,
        0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
        0.5016634166240692, 0.6427869200706482, 0.8614784181118011, 0.00260417, 0.0859375,
        0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333,
    ]  # fmt: skip
    near = torch.tensor(midpoints).view(torch.int32)
    around = torch.cat([(near + step).view(torch.float32) for step in range(-3, 4)])
    block = torch.cat([around, -around, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40])])
    block = torch.nn.functional.pad(block, (0, -block.numel() % 64))
    blocks = [block * scale for scale in (1.0, 0.37, 3e-3, 7.77, 1e30, 1e-30, 1e-38, 1e-39, 0.0)]
    blocks.append(torch.full_like(block, 3.4e38))
    values = torch.cat(blocks).cuda()
    for dtype in DTYPES:
        packed, state = theirs(values.to(dtype), 64, quant_type, False)
        quant = cuda.quantize_4bit(values.to(dtype), 64, quant_type, False)
        assert same(quant.packed.view(-1), packed.view(-1)), dtype
        assert same(quant.absmax, state.absmax), dtype
