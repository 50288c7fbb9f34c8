//! Hopper's pass over x to the rank (`kernels/lora_down_sm90a.cuh`): its parameters and its launch.

use super::super::device::Device;
use super::super::launch::{Address, Grid, Parameters, Stream};
use super::gemm::{Matrix, Swizzle, TensorMap};
use super::kernels::{MAX_SEGMENTS, Masks, SEGMENT, Segment, Variants, variants};
use super::{Hopper, Input, Projection, few_calls};
use crate::error::Result;

const MAX_PANELS: usize = 12;
/// Of a cluster of two blocks.
const ROWS: u64 = 128;
const DEPTH: u64 = 64;
/// Of a block of this pass or of those in [`super::outer90`].
pub(super) const THREADS: u32 = 512;
pub(super) const SHARED: u32 = 225 << 10;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Down90 {
    x: TensorMap,
    panel: [TensorMap; MAX_PANELS],
    out: Address,
    bits: Address,
    masks: Masks,
    m: u64,
    steps: u32,
    reserved: u32,
    segments: [Segment; MAX_SEGMENTS],
    panel_of: [u8; 4 * MAX_SEGMENTS],
    row_of: [u8; MAX_SEGMENTS],
}
const _: () = assert!(size_of::<Down90>() == 1856);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Down90 {}

/// Whether this pass takes a group: on Hopper, where rows of x and of the adapters start on 16 bytes, and clusters
/// of [`ROWS`] rows fill the device.
pub fn takes(device: &Device, input: &Input, projections: &[Projection]) -> bool {
    let multiprocessors = u64::from(device.multiprocessors);
    let blocks = 2 * input.m.div_ceil(ROWS);
    let places = blocks.next_multiple_of(multiprocessors);
    let alignment = if input.planes == 1 { 8 } else { 16 };
    let used = match input.hopper {
        Hopper::Auto => 8 * blocks >= 7 * places,
        Hopper::Always => true,
        Hopper::Never => false,
    };
    used && device.capability == (9, 0)
        && matches!(input.planes, 1 | 3)
        && input.k.is_multiple_of(alignment)
        && input.x.is_multiple_of(16)
        && input.m.max(input.k) < 1 << 31
        && few_calls(input)
        && (input.planes > 1 || projections.iter().all(|one| one.lora_a.is_multiple_of(16)))
}

const KERNELS: Variants = variants!("lora_down90");
const KERNELS_PARTS: Variants = variants!("lora_down90_parts");

/// Writes H, and the mask if it is kept. `panels` are where each projection's A lies, `[planes, r, k]`.
///
/// # Safety
/// [`takes`] said yes; the addresses are `device`'s and hold what `kernels/lora_down_sm90a.cuh` says.
///
/// # Errors
/// A launch that failed.
pub unsafe fn launch(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    panels: &[Address],
    segments: ([Segment; MAX_SEGMENTS], usize),
    masks: Masks,
) -> Result<()> {
    let x = Matrix::new(input.x, input.m, input.k);
    let mut p = Down90 {
        x: x.map(input.dtype, DEPTH as u32, ROWS as u32, Swizzle::Bytes128)?,
        panel: [TensorMap::default(); MAX_PANELS],
        out: input.h,
        bits: input.bits,
        masks,
        m: input.m,
        steps: input.k.div_ceil(DEPTH) as u32,
        reserved: 0,
        segments: segments.0,
        panel_of: [0; 4 * MAX_SEGMENTS],
        row_of: [0; MAX_SEGMENTS],
    };
    let (mut maps, mut segment) = (0, 0);
    for (projection, panel) in projections.iter().zip(panels) {
        let columns = segment..segment + projection.segments();
        for plane in 0..input.planes as usize {
            let from = panel + 2 * plane as u64 * projection.r * input.k;
            let part = Matrix::new(from, projection.r, input.k);
            let rows = SEGMENT as u32;
            p.panel[maps] = part.map(input.dtype, DEPTH as u32, rows, Swizzle::Bytes128)?;
            p.panel_of[plane * MAX_SEGMENTS..][columns.clone()].fill(maps as u8);
            maps += 1;
        }
        for (i, row) in p.row_of[columns].iter_mut().enumerate() {
            *row = (SEGMENT as usize * i) as u8;
        }
        segment += projection.segments();
    }
    let grid = Grid {
        blocks: (2 * input.m.div_ceil(ROWS) as u32, 1, 1),
        threads: THREADS,
        shared: SHARED,
    };
    let kernels = if input.planes == 1 {
        KERNELS
    } else {
        KERNELS_PARTS
    };
    let kernel = kernels[input.dtype as usize][segments.1 - 1];
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &p) }?)
}
