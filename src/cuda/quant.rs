//! 4-bit quantisation and dequantisation, with the values of bitsandbytes' CUDA code.

use super::device::Device;
use super::error::Result;
use super::launch::{Address, Grid, Parameters, Stream};
use crate::dtype::{DType, QuantType};
use crate::error::Error;
use crate::quant::BLOCKSIZES;

/// A 4-bit tensor in a device's memory; see [`crate::quant`] for the format.
#[derive(Debug, Clone, Copy)]
pub struct Quantized {
    /// Two codes a byte, at any alignment.
    pub packed: Address,
    /// A block each: f32, or uint8 when nested.
    pub absmax: Address,
    pub nested: Option<Nested>,
    pub quant_type: QuantType,
    pub blocksize: usize,
}

/// How a double-quantised tensor's absmax are read.
#[derive(Debug, Clone, Copy)]
pub struct Nested {
    /// f32, a nested block each.
    pub absmax: Address,
    /// 256 f32.
    pub code: Address,
    /// One f32.
    pub offset: Address,
    /// Blocks a nested block, a power of two.
    pub blocksize: usize,
}

/// `kernels/common/quant.cuh`'s `Quant4bit`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Quant4bit {
    packed: Address,
    absmax: Address,
    nested_absmax: Address,
    nested_code: Address,
    nested_offset: Address,
    block_shift: u32,
    nested_shift: u32,
    fp4: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<Quant4bit>() == 56);

impl Quant4bit {
    pub(super) fn new(weight: &Quantized) -> std::result::Result<Self, Error> {
        let nested = weight.nested.unwrap_or(Nested {
            absmax: 0,
            code: 0,
            offset: 0,
            blocksize: 1,
        });
        if !nested.blocksize.is_power_of_two() {
            return Err(Error::argument(format!(
                "nested_blocksize must be a power of two, not {}",
                nested.blocksize
            )));
        }
        Ok(Self {
            packed: weight.packed,
            absmax: weight.absmax,
            nested_absmax: nested.absmax,
            nested_code: nested.code,
            nested_offset: nested.offset,
            block_shift: block_shift(weight.blocksize)?,
            nested_shift: nested.blocksize.trailing_zeros(),
            fp4: u32::from(weight.quant_type == QuantType::Fp4),
            reserved: 0,
        })
    }
}

fn block_shift(blocksize: usize) -> std::result::Result<u32, Error> {
    if BLOCKSIZES.contains(&blocksize) {
        return Ok(blocksize.trailing_zeros());
    }
    Err(Error::argument(format!(
        "blocksize must be one of {BLOCKSIZES:?}, not {blocksize}"
    )))
}

/// `kernels/dequantize.cuh`'s `Dequantize`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Dequantize {
    quant: Quant4bit,
    out: Address,
    elements: u64,
    early: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<Dequantize>() == 80);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Dequantize {}

/// `kernels/dequantize_transposed.cuh`'s `DequantizeTransposed`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DequantizeTransposed {
    quant: Quant4bit,
    out: Address,
    n: u64,
    k: u64,
}
const _: () = assert!(size_of::<DequantizeTransposed>() == 80);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for DequantizeTransposed {}

/// Names of a kernel's variants: by absmax (plain, nested), then type (f32, f16, bf16).
type Variants = [[&'static str; 3]; 2];

macro_rules! variants {
    ($name:literal) => {
        [
            [
                concat!($name, "_f32"),
                concat!($name, "_f16"),
                concat!($name, "_bf16"),
            ],
            [
                concat!($name, "_nested_f32"),
                concat!($name, "_nested_f16"),
                concat!($name, "_nested_bf16"),
            ],
        ]
    };
}

const STRAIGHT: Variants = variants!("dequantize_4bit");
const TRANSPOSED: Variants = variants!("dequantize_4bit_transposed");
const TRANSPOSED_ANY: Variants = variants!("dequantize_4bit_transposed_any");
const QUANTIZE: [[&str; 3]; 2] = [
    ["quantize_nf4_f32", "quantize_nf4_f16", "quantize_nf4_bf16"],
    ["quantize_fp4_f32", "quantize_fp4_f16", "quantize_fp4_bf16"],
];

const fn type_index(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

const STRAIGHT_THREADS: u32 = 256;
/// 16-byte stores a thread of the straight kernel makes.
const STRAIGHT_STORES: u64 = 4;

/// Writes the `elements` values of `weight` to `out`, each rounded once to `dtype`. `early`: the kernel before this one in
/// the stream, one of ours, uses neither; this one need not wait for it.
///
/// # Safety
/// The addresses are `device`'s; `weight`'s hold what its blocks need for `elements`, and `out` has room for them and is
/// aligned to 16 bytes.
///
/// # Errors
/// A block size that does not exist, or a launch that failed.
pub unsafe fn dequantize_4bit(
    device: &Device,
    stream: Stream,
    weight: &Quantized,
    out: Address,
    dtype: DType,
    elements: u64,
    early: bool,
) -> std::result::Result<(), Error> {
    let quant = Quant4bit::new(weight)?;
    if elements == 0 {
        return Ok(());
    }
    let kernel = STRAIGHT[usize::from(weight.nested.is_some())][type_index(dtype)];
    let per_thread = 16 / dtype.size() as u64 * STRAIGHT_STORES;
    let grid = Grid::cover(
        elements,
        u64::from(STRAIGHT_THREADS) * per_thread,
        STRAIGHT_THREADS,
    );
    let parameters = Dequantize {
        quant,
        out,
        elements,
        early: u32::from(early),
        reserved: 0,
    };
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &parameters) }?)
}

/// Threads along n and in all, and columns a thread, of the fast transposing kernel.
const TILE_LANES: u64 = 32;
const TILE_THREADS: u32 = 128;
const TILE_COLUMNS: u64 = 16;
/// Edge of the other kernel's tile, and its threads.
const ANY_TILE: u64 = 32;
const ANY_THREADS: u32 = 256;

/// Writes the transpose `[k, n]` of `weight` `[n, k]` to `out`, each value rounded once to `dtype`.
///
/// # Safety
/// As for [`dequantize_4bit`], with n·k elements; `out` need not be aligned.
///
/// # Errors
/// As for [`dequantize_4bit`].
pub unsafe fn dequantize_4bit_transposed(
    device: &Device,
    stream: Stream,
    weight: &Quantized,
    out: Address,
    dtype: DType,
    n: u64,
    k: u64,
) -> std::result::Result<(), Error> {
    let quant = Quant4bit::new(weight)?;
    if n == 0 || k == 0 {
        return Ok(());
    }
    let rows = 16 / dtype.size() as u64;
    let fast = n.is_multiple_of(rows)
        && k.is_multiple_of(TILE_COLUMNS)
        && weight.packed.is_multiple_of(TILE_COLUMNS / 2)
        && out.is_multiple_of(16);
    let (variants, tile, threads) = if fast {
        let along_k = u64::from(TILE_THREADS) / TILE_LANES * TILE_COLUMNS;
        (TRANSPOSED, (TILE_LANES * rows, along_k), TILE_THREADS)
    } else {
        (TRANSPOSED_ANY, (ANY_TILE, ANY_TILE), ANY_THREADS)
    };
    let grid = Grid::cover(n.div_ceil(tile.0) * k.div_ceil(tile.1), 1, threads);
    let kernel = variants[usize::from(weight.nested.is_some())][type_index(dtype)];
    let parameters = DequantizeTransposed { quant, out, n, k };
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &parameters) }?)
}

/// `kernels/quantize.cuh`'s `Quantize`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Quantize {
    values: Address,
    packed: Address,
    absmax: Address,
    elements: u64,
    block_shift: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<Quantize>() == 40);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Quantize {}

const QUANTIZE_THREADS: u32 = 512;
/// Elements a block of threads takes.
const QUANTIZE_ELEMENTS: u64 = 8192;

/// Quantises `elements` values of `dtype`: ceil(elements / 2) bytes to `packed`, an f32 a block to `absmax`.
///
/// # Safety
/// The addresses are `device`'s and have what is read and room for what is written; `packed` is aligned to 4 bytes.
///
/// # Errors
/// As for [`dequantize_4bit`].
pub unsafe fn quantize_4bit(
    device: &Device,
    stream: Stream,
    values: Address,
    dtype: DType,
    elements: u64,
    quant_type: QuantType,
    blocksize: usize,
    packed: Address,
    absmax: Address,
) -> std::result::Result<(), Error> {
    let block_shift = block_shift(blocksize)?;
    if elements == 0 {
        return Ok(());
    }
    let kernel = QUANTIZE[usize::from(quant_type == QuantType::Fp4)][type_index(dtype)];
    let parameters = Quantize {
        values,
        packed,
        absmax,
        elements,
        block_shift,
        reserved: 0,
    };
    let grid = Grid::cover(elements, QUANTIZE_ELEMENTS, QUANTIZE_THREADS);
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &parameters) }?)
}

/// `kernels/quantize_absmax.cu`'s `QuantizeAbsmax`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct QuantizeAbsmax {
    absmax: Address,
    offset: Address,
    code: Address,
    codes: Address,
    nested_absmax: Address,
    blocks: u64,
}
const _: () = assert!(size_of::<QuantizeAbsmax>() == 48);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for QuantizeAbsmax {}

const ABSMAX_THREADS: u32 = 256;

/// Double quantisation of `blocks` absmax, less the f32 at `offset`: a byte each to `codes`, an f32 for every 256 of them
/// to `nested_absmax`. `code` holds the 256 values of the bytes.
///
/// # Safety
/// The addresses are `device`'s and have what is read and room for what is written.
///
/// # Errors
/// The launch failed.
pub unsafe fn quantize_absmax(
    device: &Device,
    stream: Stream,
    absmax: Address,
    blocks: u64,
    offset: Address,
    code: Address,
    codes: Address,
    nested_absmax: Address,
) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    let parameters = QuantizeAbsmax {
        absmax,
        offset,
        code,
        codes,
        nested_absmax,
        blocks,
    };
    // A warp takes 256 blocks.
    let per_block = u64::from(ABSMAX_THREADS / 32) * 256;
    let grid = Grid::cover(blocks, per_block, ABSMAX_THREADS);
    // SAFETY: the caller's promise.
    unsafe { device.launch("quantize_absmax", grid, stream, &parameters) }
}
