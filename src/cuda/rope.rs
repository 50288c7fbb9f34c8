//! Rotary position embeddings of queries and keys, in one launch.

use super::device::Device;
use super::error::Result;
use super::launch::{Address, Grid, Parameters, Stream, aligned};
use crate::dtype::DType;

const MOST_THREADS: u32 = 256;
const WARP: u32 = 32;
/// Heads of a thread.
const HEADS: u32 = 4;

/// `kernels/rope.cu`'s `Heads`: a tensor `[batch, heads, length, head size]` read and one written, by their strides in
/// elements; the last one is 1.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub from: Address,
    pub to: Address,
    /// Of batch, head and position.
    pub strides: [u64; 3],
    pub to_strides: [u64; 3],
}

/// Cosines and sines `[1 or batch, length, rotary]`, alike laid out.
#[derive(Debug, Clone, Copy)]
pub struct Tables {
    pub cos: Address,
    pub sin: Address,
    /// Of batch and position, in elements.
    pub strides: [u64; 2],
}

/// How many there are of everything.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: u64,
    pub length: u32,
    pub q_heads: u32,
    pub k_heads: u32,
    /// Elements of a head, and those of them that are turned: an even number.
    pub head: u32,
    pub rotary: u32,
}

/// `kernels/rope.cu`'s `Rope`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Rope {
    q: Heads,
    k: Heads,
    cos: Address,
    sin: Address,
    table_strides: [u64; 2],
    length: u32,
    q_heads: u32,
    k_heads: u32,
    head: u32,
    rotary: u32,
    backward: u32,
    vectors: u32,
    reserved: u32,
}

// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Rope {}
const _: () = assert!(size_of::<Rope>() == 192);

/// Turns each pair (i, i + rotary/2) of a head by its position's angle; with `backward`, back.
///
/// # Safety
/// The addresses are `device`'s and hold, or have room for, what the sizes and strides say; what is written overlaps
/// nothing that is read.
///
/// # Errors
/// The launch failed.
pub unsafe fn rope(
    device: &Device,
    stream: Stream,
    q: Heads,
    k: Heads,
    tables: &Tables,
    sizes: Sizes,
    dtype: DType,
    backward: bool,
) -> Result<()> {
    let tokens = sizes.batch * u64::from(sizes.length);
    if tokens == 0 || sizes.q_heads + sizes.k_heads == 0 || sizes.head == 0 {
        return Ok(());
    }
    let size = dtype.size() as u64;
    let mut bytes = vec![q.from, q.to, k.from, k.to, tables.cos, tables.sin];
    let strides = [&q.strides, &q.to_strides, &k.strides, &k.to_strides];
    bytes.extend(strides.into_iter().flatten().map(|stride| stride * size));
    bytes.extend(tables.strides.map(|stride| stride * size));
    bytes.push(u64::from(sizes.rotary / 2) * size);
    bytes.push(u64::from(sizes.head) * size);
    let vectors = aligned(&bytes);
    let lanes = if vectors { 16 / dtype.size() as u32 } else { 1 };
    let items = sizes.rotary / 2 / lanes + (sizes.head - sizes.rotary) / lanes;
    let parameters = Rope {
        q,
        k,
        cos: tables.cos,
        sin: tables.sin,
        table_strides: tables.strides,
        length: sizes.length,
        q_heads: sizes.q_heads,
        k_heads: sizes.k_heads,
        head: sizes.head,
        rotary: sizes.rotary,
        backward: u32::from(backward),
        vectors: u32::from(vectors),
        reserved: 0,
    };
    let kernel = match dtype {
        DType::F32 => "rope_f32",
        DType::F16 => "rope_f16",
        DType::BF16 => "rope_bf16",
    };
    let wanted = ((sizes.q_heads + sizes.k_heads).div_ceil(HEADS) * items).next_multiple_of(WARP);
    let grid = Grid::cover(tokens, 1, wanted.min(MOST_THREADS));
    // SAFETY: the caller's promise.
    unsafe { device.launch(kernel, grid, stream, &parameters) }
}
