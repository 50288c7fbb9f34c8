//! The mask that dropout applies.

use super::device::Device;
use super::error::Result;
use super::launch::{Address, Grid, Parameters, Stream};
use crate::dtype::DType;

const THREADS: u32 = 256;
/// Elements a thread writes: those of one Philox call.
const LANES: u64 = 8;

/// `kernels/dropout.cu`'s `DropoutMask`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct DropoutMask {
    out: Address,
    seed: Address,
    elements: u64,
    stream: u64,
    threshold: u32,
    scale: f32,
}

// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for DropoutMask {}
const _: () = assert!(size_of::<DropoutMask>() == 40);

/// What [`crate::lora`]'s dropout multiplies with: 0, or 1 / (1 - p), for `elements` elements at `out`.
///
/// `seed` is the address of a 64-bit integer, `index` the Philox stream.
///
/// # Safety
/// `out` has room for `elements` of `dtype` and is aligned to 16 bytes; both addresses are `device`'s.
///
/// # Errors
/// The launch failed.
pub unsafe fn dropout_mask(
    device: &Device,
    stream: Stream,
    out: Address,
    dtype: DType,
    elements: u64,
    p: f32,
    seed: Address,
    index: u64,
) -> Result<()> {
    if elements == 0 {
        return Ok(());
    }
    let kernel = match dtype {
        DType::F32 => "dropout_mask_f32",
        DType::F16 => "dropout_mask_f16",
        DType::BF16 => "dropout_mask_bf16",
    };
    let parameters = DropoutMask {
        out,
        seed,
        elements,
        stream: index,
        threshold: (f64::from(p) * 65_536.0).round() as u32,
        scale: 1.0 / (1.0 - p),
    };
    let grid = Grid::cover(elements, u64::from(THREADS) * LANES, THREADS);
    // SAFETY: the caller's promise.
    unsafe { device.launch(kernel, grid, stream, &parameters) }
}
