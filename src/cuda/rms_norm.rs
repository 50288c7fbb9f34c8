//! RMSNorm, with a residual added before it.

use super::device::Device;
use super::error::Result;
use super::launch::{Address, Grid, Parameters, Stream, aligned};
use crate::dtype::DType;

const THREADS: u32 = 256;
const WARP: u32 = 32;
/// Vectors of 16 bytes that a thread keeps of a row.
const KEPT: u32 = 4;
/// Blocks a multiprocessor: of those that the weight's gradient is summed in, and of those that stay.
const SUMMING: u64 = 2;
/// Of a block that stays, for rows that come: `kernels/rms_norm_sm90a.cuh`'s `NORM90_SHARED`.
const SHARED: u32 = 104 << 10;
/// Columns of [`weight_sums`]' blocks.
const SUMMED: u64 = 32;

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

/// `kernels/rms_norm.cuh`'s `NormWeight`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct NormWeight {
    partial: Address,
    out: Address,
    groups: u32,
    columns: u32,
}

// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for NormWeight {}
const _: () = assert!(size_of::<NormWeight>() == 24);

/// Rows of the partial sums of [`backward`] for the gradient of a weight of `columns`; `None` where rows are too long
/// for it.
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
    // SAFETY: the caller's promise.
    unsafe { launch(device, stream, norm, "", &parameters) }
}

/// The gradient of x to `out`, `residual` (0: none) added to it, from that of [`forward`]'s `out`; and, unless `partial`
/// is 0, the weight's to `grad_weight`, in the weight's type.
///
/// # Safety
/// As [`forward`], whose `inverse` this is; `partial` has room for [`partial_rows`] rows of f32.
///
/// # Errors
/// A launch failed.
pub unsafe fn backward(
    device: &Device,
    stream: Stream,
    norm: &Norm,
    (x, inverse): (Address, Address),
    (grad, residual): (Address, Address),
    out: Address,
    (partial, grad_weight): (Address, Address),
) -> Result<()> {
    let parameters = parameters(norm, x, (residual, 0), grad, out, (inverse, partial));
    let weight = partial != 0;
    let which = if weight {
        "_backward_weight"
    } else {
        "_backward"
    };
    // SAFETY: the caller's promise.
    unsafe { launch(device, stream, norm, which, &parameters) }?;
    if weight {
        // SAFETY: as above.
        unsafe { weight_sums(device, stream, norm, partial, grad_weight) }?;
    }
    Ok(())
}

/// # Safety
/// As [`backward`], after the partial sums.
unsafe fn weight_sums(
    device: &Device,
    stream: Stream,
    norm: &Norm,
    partial: Address,
    out: Address,
) -> Result<()> {
    let groups = partial_rows(device, norm.rows, norm.columns, norm.dtype).unwrap_or(0);
    let sums = NormWeight {
        partial,
        out,
        groups: groups as u32,
        columns: norm.columns,
    };
    let kernel = match (norm.wide, norm.dtype) {
        (true, _) | (_, DType::F32) => "norm_weight_f32",
        (_, DType::F16) => "norm_weight_f16",
        (_, DType::BF16) => "norm_weight_bf16",
    };
    let grid = Grid::cover(norm.columns.into(), SUMMED, THREADS);
    // SAFETY: the caller's promise.
    unsafe { device.launch(kernel, grid, stream, &sums) }
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

/// `which` kernel, in the form that is the fastest for these rows.
///
/// # Safety
/// As the caller's.
unsafe fn launch(
    device: &Device,
    stream: Stream,
    norm: &Norm,
    which: &str,
    parameters: &RmsNorm,
) -> Result<()> {
    if norm.rows == 0 || norm.columns == 0 {
        return Ok(());
    }
    let lanes = 16 / norm.dtype.size() as u32;
    let dtype = match norm.dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
    };
    let staying = SUMMING * u64::from(device.multiprocessors);
    let short = is_short(norm.columns, lanes);
    let kept = norm.columns.div_ceil(THREADS * lanes).next_power_of_two();
    if device.capability == (9, 0)
        && norm.dtype != DType::F32
        && parameters.vectors != 0
        && !short
        && kept <= KEPT
        && norm.rows > staying
        && parameters.grad != 0
    {
        let grid = Grid {
            blocks: (staying as u32, 1, 1),
            threads: THREADS,
            shared: SHARED,
        };
        let kernel = format!("rms_norm90{which}_{dtype}_{kept}");
        // SAFETY: the caller's promise.
        return unsafe { device.launch(&kernel, grid, stream, parameters) };
    }
    let (form, per_block, threads) = if short {
        ("_short", u64::from(THREADS / WARP), THREADS)
    } else if parameters.grad == 0 && parameters.vectors != 0 && kept <= KEPT / 2 {
        ("_half", 1, THREADS / 2)
    } else {
        ("", 1, THREADS)
    };
    let blocks = match partial_rows(device, norm.rows, norm.columns, norm.dtype) {
        Some(groups) if parameters.partial != 0 => groups / per_block,
        _ => norm.rows.div_ceil(per_block),
    };
    let kernel = format!("rms_norm{which}{form}_{dtype}");
    let grid = Grid::cover(blocks, 1, threads);
    // SAFETY: the caller's promise.
    unsafe { device.launch(&kernel, grid, stream, parameters) }
}
