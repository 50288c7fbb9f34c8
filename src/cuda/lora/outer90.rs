//! Hopper's passes over x and over the gradients (`kernels/lora_outer_sm90a.cuh`): their parameters and launches.

use super::super::device::Device;
use super::super::launch::{Address, Grid, Parameters, Stream};
use super::down90::{SHARED, THREADS};
use super::gemm::{Matrix, Swizzle, TensorMap};
use super::kernels::{
    DownOuter, MAX_SEGMENTS, Masks, Outer, SEGMENT, Segment, Variants, divide, variants,
};
use super::{Float16, Hopper, Input, few_calls};
use crate::error::Result;

const ROWS: u64 = 64;
const COLUMNS: u64 = 256;
/// Rows from which on these passes are the faster ones.
const MANY: u64 = 1024;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Outer90 {
    x: TensorMap,
    g: TensorMap,
    panel: TensorMap,
    bits: TensorMap,
    partial: Address,
    g_partial: Address,
    masks: Masks,
    m: u64,
    w: u64,
    g_column: u32,
    g_plane: u32,
    rows_per_range: u32,
    early: u32,
    kept: u32,
    reserved: u32,
    segments: [Segment; MAX_SEGMENTS],
}
const _: () = assert!(size_of::<Outer90>() == 704);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Outer90 {}

/// Whether a pass over `[m, w]` at `address` runs here: on Hopper, where rows start on 16 bytes.
pub fn takes(device: &Device, input: &Input, address: Address, w: u64) -> bool {
    let used = match input.hopper {
        Hopper::Auto => input.m >= MANY,
        Hopper::Always => true,
        Hopper::Never => false,
    };
    used && device.capability == (9, 0)
        && matches!(input.planes, 1 | 3)
        && w.is_multiple_of(8)
        && address.is_multiple_of(16)
        && input.m.max(w) < 1 << 31
        && (input.bits != 0 || few_calls(input))
}

/// Into how many ranges the rows are divided, and the rows of each.
pub fn ranges(device: &Device, m: u64, w: u64) -> (u64, u64) {
    divide(
        m,
        ROWS,
        w.div_ceil(COLUMNS),
        u64::from(device.multiprocessors),
    )
}

/// Blocks along the columns: partial sums of G.
pub fn column_blocks(w: u64) -> u64 {
    w.div_ceil(COLUMNS)
}

const OUTER: Variants = variants!("lora_outer90");
const OUTER_PARTS: Variants = variants!("lora_outer90_parts");
const DOWN_OUTER: Variants = variants!("lora_down_outer90");
const DOWN_OUTER_PARTS: Variants = variants!("lora_down_outer90_parts");

/// `bits`: the mask of an only projection, if it was kept, as 16-bit elements.
///
/// # Safety
/// [`takes`] said yes; the addresses are `device`'s and hold what `kernels/lora_outer_sm90a.cuh` says.
///
/// # Errors
/// A launch that failed.
pub unsafe fn outer(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    segments: usize,
    of: &Outer,
    bits: Option<Matrix>,
) -> Result<()> {
    let (ranges, rows) = ranges(device, of.m, of.w);
    let g = Matrix::new(of.g, of.m, u64::from(of.g_stride));
    let box_of_bits = |bits: Matrix| {
        let columns = COLUMNS as u32 / 16;
        bits.map(dtype, columns, ROWS as u32, Swizzle::Bytes32)
    };
    let p = Outer90 {
        x: box_of(dtype, Matrix::new(of.x, of.m, of.w))?,
        g: g.map(dtype, SEGMENT as u32, ROWS as u32, Swizzle::Bytes32)?,
        panel: TensorMap::default(),
        bits: bits.map_or_else(|| Ok(TensorMap::default()), box_of_bits)?,
        partial: of.partial,
        g_partial: 0,
        masks: of.masks,
        m: of.m,
        w: of.w,
        g_column: 0,
        g_plane: of.g_plane,
        rows_per_range: rows as u32,
        early: of.early,
        kept: u32::from(bits.is_some()),
        reserved: 0,
        segments: of.segments,
    };
    let kernels = if of.planes == 1 { OUTER } else { OUTER_PARTS };
    let kernel = kernels[dtype as usize][segments - 1];
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid(of.w, ranges), stream, &p) }?)
}

/// `h` is H of the whole group, and the projection's starts at `h_column`.
///
/// # Safety
/// As [`outer`].
///
/// # Errors
/// A launch that failed.
pub unsafe fn down_outer(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    segments: usize,
    of: &DownOuter,
    h: Address,
    h_column: u64,
) -> Result<()> {
    let (ranges, rows) = ranges(device, of.m, of.n);
    let h = Matrix::new(h, of.m, u64::from(of.h_stride));
    let width = u64::from(of.planes) * SEGMENT * segments as u64;
    let panel = Matrix::new(of.panel, of.n, width);
    let p = Outer90 {
        x: box_of(dtype, Matrix::new(of.grad, of.m, of.n))?,
        g: h.map(dtype, SEGMENT as u32, ROWS as u32, Swizzle::Bytes32)?,
        panel: panel.map(dtype, SEGMENT as u32, COLUMNS as u32, Swizzle::Bytes32)?,
        bits: TensorMap::default(),
        partial: of.panel_partial,
        g_partial: of.g_partial,
        masks: Masks::default(),
        m: of.m,
        w: of.n,
        g_column: h_column as u32,
        g_plane: of.h_plane,
        rows_per_range: rows as u32,
        early: 0,
        kept: 0,
        reserved: 0,
        segments: [Segment::default(); MAX_SEGMENTS],
    };
    let kernels = if of.planes == 1 {
        DOWN_OUTER
    } else {
        DOWN_OUTER_PARTS
    };
    let kernel = kernels[dtype as usize][segments - 1];
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid(of.n, ranges), stream, &p) }?)
}

fn box_of(dtype: Float16, matrix: Matrix) -> Result<TensorMap> {
    matrix.map(dtype, 64, ROWS as u32, Swizzle::Bytes128)
}

fn grid(w: u64, ranges: u64) -> Grid {
    Grid {
        blocks: (w.div_ceil(COLUMNS) as u32, ranges as u32, 1),
        threads: THREADS,
        shared: SHARED,
    }
}
