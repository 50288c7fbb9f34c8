//! RMSNorm, with a residual added before it.

use super::device::Device;
use super::error::Result;
use super::launch::{Address, Grid, Parameters, Stream, aligned};
use crate::dtype::DType;

const THREADS: u32 = 256;
const WARP: u32 = 32;
/// Vectors of 16 bytes that a thread keeps of a row.
const KEPT: u32 = 4;
/// Blocks a multiprocessor that the weight's gradient is summed in.
const SUMMING: u64 = 2;

/// Rows and what is normalised in them.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    pub rows: u64,
    pub columns: u32,
    pub dtype: DType,
    /// `[columns]` of `dtype`, or f32 with `wide`.
    pub weight: Address,
    pub wide: bool,
    /// Added to the weight: 1 for Gemma's.
    pub offset: f32,
    pub epsilon: f32,
}

/// `kernels/rms_norm.cuh`'s `RmsNorm`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RmsNorm {
    x: Address,
    residual: Address,
    sum: Address,
    weight: Address,
    grad: Address,
    out: Address,
    inverse: Address,
    partial: Address,
    rows: u64,
    columns: u32,
    epsilon: f32,
    offset: f32,
    wide: u32,
    vectors: u32,
    reserved: u32,
}

// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for RmsNorm {}
const _: () = assert!(size_of::<RmsNorm>() == 96);

/// Rows of partial sums that [`backward`] writes for the gradient of a weight of `columns`, and leaves to the caller to
/// add; `None` where rows are too long for it.
pub fn partial_rows(device: &Device, rows: u64, columns: u32, dtype: DType) -> Option<u64> {
    let lanes = 16 / dtype.size() as u32;
    let short = is_short(columns, lanes);
    let groups = if short { u64::from(THREADS / WARP) } else { 1 };
    let blocks = (SUMMING * u64::from(device.multiprocessors)).min(rows.div_ceil(groups));
    (short || columns <= THREADS * KEPT * lanes).then_some(blocks * groups)
}

/// Whether a warp takes a row.
fn is_short(columns: u32, lanes: u32) -> bool {
    columns <= WARP * KEPT * lanes
}

/// `out = (weight + offset) · x / √(mean(x²) + epsilon)`, and `1 / √…` of every row to `inverse` unless it is 0. With a
/// residual (not 0), `sum = x + residual` is written, rounded, and normalised in the place of x.
///
/// # Safety
/// The addresses are `device`'s: matrices `[rows, columns]` of the dtype, contiguous; `inverse` `[rows]` f32. Outputs
/// overlap nothing else.
///
/// # Errors
/// The launch failed.
pub unsafe fn forward(
    device: &Device,
    stream: Stream,
    norm: &Norm,
    x: Address,
    (residual, sum): (Address, Address),
    out: Address,
    inverse: Address,
) -> Result<()> {
    let parameters = parameters(norm, x, (residual, sum), 0, out, (inverse, 0));
    let lanes = 16 / norm.dtype.size() as u32;
    let short = is_short(norm.columns, lanes);
    let kernel = match (norm.dtype, short) {
        (DType::F32, false) => "rms_norm_f32",
        (DType::F16, false) => "rms_norm_f16",
        (DType::BF16, false) => "rms_norm_bf16",
        (DType::F32, true) => "rms_norm_short_f32",
        (DType::F16, true) => "rms_norm_short_f16",
        (DType::BF16, true) => "rms_norm_short_bf16",
    };
    let per_block = if short { THREADS / WARP } else { 1 };
    // SAFETY: the caller's promise.
    unsafe {
        launch(
            device,
            stream,
            kernel,
            norm.rows.div_ceil(per_block.into()),
            &parameters,
        )
    }
}

/// The gradient of x to `out`, `residual` (0: none) added to it, from that of [`forward`]'s `out`; and, unless `partial`
/// is 0, the sums that add up to the weight's.
///
/// # Safety
/// As [`forward`], whose `inverse` this is; `partial` has room for [`partial_rows`] rows of f32.
///
/// # Errors
/// The launch failed.
pub unsafe fn backward(
    device: &Device,
    stream: Stream,
    norm: &Norm,
    (x, inverse): (Address, Address),
    (grad, residual): (Address, Address),
    out: Address,
    partial: Address,
) -> Result<()> {
    let parameters = parameters(norm, x, (residual, 0), grad, out, (inverse, partial));
    let lanes = 16 / norm.dtype.size() as u32;
    let short = is_short(norm.columns, lanes);
    let kernel = match (norm.dtype, short, partial != 0) {
        (DType::F32, false, false) => "rms_norm_backward_f32",
        (DType::F16, false, false) => "rms_norm_backward_f16",
        (DType::BF16, false, false) => "rms_norm_backward_bf16",
        (DType::F32, true, false) => "rms_norm_backward_short_f32",
        (DType::F16, true, false) => "rms_norm_backward_short_f16",
        (DType::BF16, true, false) => "rms_norm_backward_short_bf16",
        (DType::F32, false, true) => "rms_norm_backward_weight_f32",
        (DType::F16, false, true) => "rms_norm_backward_weight_f16",
        (DType::BF16, false, true) => "rms_norm_backward_weight_bf16",
        (DType::F32, true, true) => "rms_norm_backward_weight_short_f32",
        (DType::F16, true, true) => "rms_norm_backward_weight_short_f16",
        (DType::BF16, true, true) => "rms_norm_backward_weight_short_bf16",
    };
    let per_block = u64::from(if short { THREADS / WARP } else { 1 });
    let summed = partial_rows(device, norm.rows, norm.columns, norm.dtype);
    let blocks = match summed {
        Some(groups) if partial != 0 => groups / per_block,
        _ => norm.rows.div_ceil(per_block),
    };
    // SAFETY: the caller's promise.
    unsafe { launch(device, stream, kernel, blocks, &parameters) }
}

fn parameters(
    norm: &Norm,
    x: Address,
    (residual, sum): (Address, Address),
    grad: Address,
    out: Address,
    (inverse, partial): (Address, Address),
) -> RmsNorm {
    let matrices = [x, residual, sum, grad, out, partial, norm.weight];
    let row = u64::from(norm.columns) * norm.dtype.size() as u64;
    RmsNorm {
        x,
        residual,
        sum,
        weight: norm.weight,
        grad,
        out,
        inverse,
        partial,
        rows: norm.rows,
        columns: norm.columns,
        epsilon: norm.epsilon,
        offset: norm.offset,
        wide: u32::from(norm.wide),
        vectors: u32::from(aligned(&matrices) && aligned(&[row])),
        reserved: 0,
    }
}

unsafe fn launch(
    device: &Device,
    stream: Stream,
    kernel: &str,
    blocks: u64,
    parameters: &RmsNorm,
) -> Result<()> {
    if parameters.rows == 0 || parameters.columns == 0 {
        return Ok(());
    }
    let grid = Grid::cover(blocks, 1, THREADS);
    // SAFETY: the caller's promise.
    unsafe { device.launch(kernel, grid, stream, parameters) }
}
