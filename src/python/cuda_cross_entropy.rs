//! Cross-entropy on PyTorch's CUDA memory, as plain integers; `ferrotune.ops.cuda_cross_entropy` allocates and keeps
//! tensors alive.

use pyo3::prelude::*;

use crate::cuda::cross_entropy::{self as native, Divisor, Labels, Logits, Loss, Unscaled};
use crate::cuda::{Address, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Labels as Python passes them.
#[derive(FromPyObject)]
pub struct RowLabels(
    u64, // labels: an int64 a row
    u64, // rows
    i64, // ignore_index
    u32, // classes
);

impl RowLabels {
    fn get(&self) -> Labels {
        Labels {
            at: self.0,
            rows: self.1,
            ignore_index: self.2,
            classes: self.3,
        }
    }
}

/// Writes four f32 to `facts`: what the sum of the losses is divided by, for `reduction` "sum", "mean" or, with the
/// address of an f32, that; the multiplier of the logits' gradients; the scale of what is computed of them; 1 if every
/// label is valid, or 0.
#[pyfunction]
pub fn cuda_cross_entropy_prepare(
    device: usize,
    stream: u64,
    labels: RowLabels,
    reduction: &str,
    divisor: Address,
    lift: f32,
    facts: Address,
) -> Result<()> {
    let divisor = match (divisor, reduction) {
        (0, "sum") => Divisor::One,
        (0, "mean") => Divisor::Counted,
        (address, "mean") => Divisor::At(address),
        (_, other) => {
            return Err(Error::argument(format!(
                "reduction must be 'mean', or 'sum' without a divisor, not '{other}'"
            )));
        }
    };
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda_cross_entropy` allocated `facts` and checked the labels.
    unsafe { native::prepare(device, stream, labels.get(), divisor, lift, facts) }?;
    Ok(())
}

/// Writes every row's loss, an f32, and in place of the logits, unless `multiplier` is 0, their gradients times the f32
/// at that address. Rows of logits are `stride` elements apart.
#[pyfunction]
pub fn cuda_cross_entropy(
    device: usize,
    stream: u64,
    logits: u64,
    dtype: &str,
    stride: u64,
    labels: RowLabels,
    smoothing: f32,
    softcap: f32,
    multiplier: Address,
    losses: Address,
) -> Result<()> {
    let logits = Logits {
        at: logits,
        dtype: DType::from_torch_name(dtype)?,
        stride,
    };
    let loss = Loss {
        smoothing,
        softcap,
        multiplier,
    };
    let device = Device::get(device)?;
    // SAFETY: as above, for the logits and the losses.
    unsafe { native::cross_entropy(device, stream, logits, labels.get(), loss, losses) }
}

/// Writes `gradient * scale * grad`, of two f32 by address, to `out` in `out_dtype`.
#[pyfunction]
pub fn cuda_scale_gradient(
    device: usize,
    stream: u64,
    gradient: u64,
    dtype: &str,
    elements: u64,
    scale: Address,
    grad: Address,
    out: Address,
    out_dtype: &str,
) -> Result<()> {
    let gradient = Unscaled {
        at: gradient,
        dtype: DType::from_torch_name(dtype)?,
        elements,
    };
    let out_dtype = DType::from_torch_name(out_dtype)?;
    let device = Device::get(device)?;
    // SAFETY: as above, for `gradient` and `out`.
    unsafe { native::scale_gradient(device, stream, gradient, scale, grad, out, out_dtype) }
}
