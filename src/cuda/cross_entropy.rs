//! Softmax cross-entropy over a chunk of logits, which become their gradient.

use super::device::Device;
use super::error::Result;
use super::launch::{Address, Grid, Parameters, Stream};
use crate::dtype::DType;
use crate::error::Error;

/// `kernels/cross_entropy.cu`'s `CrossEntropyPrepare`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CrossEntropyPrepare {
    labels: Address,
    divisor: Address,
    facts: Address,
    rows: u64,
    ignore_index: i64,
    classes: u32,
    mode: u32,
    lift: f32,
    reserved: u32,
}
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for CrossEntropyPrepare {}
const _: () = assert!(size_of::<CrossEntropyPrepare>() == 56);

/// `kernels/cross_entropy.cuh`'s `CrossEntropy`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CrossEntropy {
    logits: Address,
    labels: Address,
    losses: Address,
    multiplier: Address,
    ignore_index: i64,
    stride: u64,
    classes: u32,
    cached: u32,
    smoothing: f32,
    softcap: f32,
    gradient: u32,
    reserved: u32,
}
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for CrossEntropy {}
const _: () = assert!(size_of::<CrossEntropy>() == 72);

/// `kernels/cross_entropy.cu`'s `ScaleGradient`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ScaleGradient {
    out: Address,
    from: Address,
    scale: Address,
    grad: Address,
    elements: u64,
}
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for ScaleGradient {}
const _: () = assert!(size_of::<ScaleGradient>() == 40);

const PREPARE_THREADS: u32 = 1024;
const SCALE_THREADS: u32 = 256;
/// Elements a thread scales.
const SCALE_LANES: u64 = 8;

/// What the sum of the losses is divided by.
#[derive(Debug, Clone, Copy)]
pub enum Divisor {
    One,
    /// The number of rows that are not ignored.
    Counted,
    /// An f32.
    At(Address),
}

/// The labels that losses are of.
#[derive(Debug, Clone, Copy)]
pub struct Labels {
    /// An i64 a row.
    pub at: Address,
    pub rows: u64,
    /// The label of rows without a loss.
    pub ignore_index: i64,
    pub classes: u32,
}

/// Writes four f32 to `facts`: the divisor; the multiplier of the logits' gradients, `lift` times the mantissa of
/// 1 / divisor; what is left of that as a scale of gradients, a power of two; 1 if every label is ignored or a class, or 0.
///
/// # Safety
/// The addresses are `device`'s and have what is read and room for what is written.
///
/// # Errors
/// The launch failed.
pub unsafe fn prepare(
    device: &Device,
    stream: Stream,
    labels: Labels,
    divisor: Divisor,
    lift: f32,
    facts: Address,
) -> Result<()> {
    let parameters = CrossEntropyPrepare {
        labels: labels.at,
        divisor: match divisor {
            Divisor::At(address) => address,
            Divisor::One | Divisor::Counted => 0,
        },
        facts,
        rows: labels.rows,
        ignore_index: labels.ignore_index,
        classes: labels.classes,
        mode: u32::from(matches!(divisor, Divisor::Counted)),
        lift,
        reserved: 0,
    };
    let grid = Grid::cover(1, 1, PREPARE_THREADS);
    // SAFETY: the caller's promise.
    unsafe { device.launch("cross_entropy_prepare", grid, stream, &parameters) }
}

/// Logits `[rows, classes]` whose rows start `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Logits {
    pub at: Address,
    pub dtype: DType,
    pub stride: u64,
}

/// What is computed of the logits.
#[derive(Debug, Clone, Copy)]
pub struct Loss {
    /// Label smoothing, from 0 to 1.
    pub smoothing: f32,
    /// Logits are `softcap * tanh(logits / softcap)`; 0: they are as they are.
    pub softcap: f32,
    /// The address of an f32: the logits become their gradient times this. 0: they stay.
    pub multiplier: Address,
}

const KERNELS: [[&str; 3]; 2] = [
    [
        "cross_entropy_f32",
        "cross_entropy_f16",
        "cross_entropy_bf16",
    ],
    [
        "cross_entropy_softcap_f32",
        "cross_entropy_softcap_f16",
        "cross_entropy_softcap_bf16",
    ],
];
/// The kernel's shared memory beside the row's.
const FIXED_SHARED: u64 = 512;
/// Up to this many bytes of a row, two blocks of threads share a multiprocessor.
const SMALL_ROW: u64 = 108 << 10;
const VECTOR: u64 = 16;

/// How many threads take a row of `bytes`, and how many of its 16-byte vectors they keep in shared memory.
fn row_plan(device: &Device, bytes: u64) -> (u32, u64) {
    let most = u64::from(device.shared) - FIXED_SHARED;
    let threads = if bytes <= SMALL_ROW.min(most / 2) {
        512
    } else {
        1024
    };
    (threads, bytes.min(most) / VECTOR)
}

/// Writes an f32 a row to `losses`, 0 for ignored rows and NaN for labels that are no class.
///
/// # Safety
/// As for [`prepare`]; `logits.at` is aligned to 16 bytes, and memory of `stride` elements is each row's.
///
/// # Errors
/// A stride that is too short or no multiple of 16 bytes, or a launch that failed.
pub unsafe fn cross_entropy(
    device: &Device,
    stream: Stream,
    logits: Logits,
    labels: Labels,
    loss: Loss,
    losses: Address,
) -> std::result::Result<(), Error> {
    let size = logits.dtype.size() as u64;
    if !(logits.stride * size).is_multiple_of(VECTOR) || logits.stride < u64::from(labels.classes) {
        return Err(Error::argument(format!(
            "rows of {} logits need a stride of that at least, and of a multiple of 16 bytes, not {}",
            labels.classes, logits.stride
        )));
    }
    if labels.rows == 0 {
        return Ok(());
    }
    let (threads, cached) = row_plan(device, u64::from(labels.classes) * size);
    let parameters = CrossEntropy {
        logits: logits.at,
        labels: labels.at,
        losses,
        multiplier: loss.multiplier,
        ignore_index: labels.ignore_index,
        stride: logits.stride,
        classes: labels.classes,
        cached: cached as u32,
        smoothing: loss.smoothing,
        softcap: loss.softcap,
        gradient: u32::from(loss.multiplier != 0),
        reserved: 0,
    };
    let kernel = KERNELS[usize::from(loss.softcap != 0.0)][match logits.dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }];
    let grid = Grid {
        shared: (cached * VECTOR) as u32,
        ..Grid::cover(labels.rows, 1, threads)
    };
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &parameters) }?)
}

/// A gradient that was computed before the one it follows from was known.
#[derive(Debug, Clone, Copy)]
pub struct Unscaled {
    pub at: Address,
    pub dtype: DType,
    pub elements: u64,
}

/// Writes `gradient * scale * grad` to `out`, rounded once to `dtype`: the gradient's own, or any from f32.
///
/// # Safety
/// As for [`prepare`]; `scale` and `grad` are an f32 each, `gradient` and `out` are aligned to 16 bytes.
///
/// # Errors
/// Two types that no kernel takes, or a launch that failed.
pub unsafe fn scale_gradient(
    device: &Device,
    stream: Stream,
    gradient: Unscaled,
    scale: Address,
    grad: Address,
    out: Address,
    dtype: DType,
) -> std::result::Result<(), Error> {
    let kernel = match (gradient.dtype, dtype) {
        (DType::F32, DType::F32) => "scale_gradient_f32_f32",
        (DType::F32, DType::F16) => "scale_gradient_f32_f16",
        (DType::F32, DType::BF16) => "scale_gradient_f32_bf16",
        (DType::F16, DType::F16) => "scale_gradient_f16_f16",
        (DType::BF16, DType::BF16) => "scale_gradient_bf16_bf16",
        (from, to) => {
            return Err(Error::argument(format!(
                "a gradient in {from:?} cannot be scaled to {to:?}"
            )));
        }
    };
    if gradient.elements == 0 {
        return Ok(());
    }
    let parameters = ScaleGradient {
        out,
        from: gradient.at,
        scale,
        grad,
        elements: gradient.elements,
    };
    let grid = Grid::cover(
        gradient.elements,
        u64::from(SCALE_THREADS) * SCALE_LANES,
        SCALE_THREADS,
    );
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &parameters) }?)
}
