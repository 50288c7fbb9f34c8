//! What stands between the linear layers of a transformer, on PyTorch's memory: see `ferrotune.ops.cuda_blocks`.

use pyo3::prelude::*;

use crate::cuda::glu::{self, Activation, Operands};
use crate::cuda::rms_norm::{self, Norm};
use crate::cuda::rope::{self, Heads, Sizes, Tables};
use crate::cuda::{Address, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// gate, up, rows, columns, stride, dtype, activation
#[derive(FromPyObject)]
pub struct Gated(u64, u64, u64, u32, u64, String, String);

impl Gated {
    fn get(&self) -> Result<Operands> {
        Ok(Operands {
            gate: self.0,
            up: self.1,
            rows: self.2,
            columns: self.3,
            stride: self.4,
            dtype: DType::from_torch_name(&self.5)?,
            activation: Activation::from_name(&self.6)?,
        })
    }
}

/// Writes `activation(gate) * up` to `out`.
#[pyfunction]
pub fn cuda_glu(device: usize, stream: u64, given: Gated, out: u64) -> Result<()> {
    let given = given.get()?;
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda_blocks` allocated `out` by the operands' shape.
    unsafe { glu::forward(device, stream, &given, out) }?;
    Ok(())
}

/// Writes the gradients of gate and up, their rows `grad_stride` apart, and `activation(gate) * up` unless `out` is 0.
#[pyfunction]
pub fn cuda_glu_backward(
    device: usize,
    stream: u64,
    given: Gated,
    grad: u64,
    out: u64,
    grads: (u64, u64),
    grad_stride: u64,
) -> Result<()> {
    let given = given.get()?;
    let device = Device::get(device)?;
    // SAFETY: as above.
    unsafe { glu::backward(device, stream, &given, grad, out, grads, grad_stride) }?;
    Ok(())
}

/// rows, columns, dtype, weight, whether it is f32 beside another dtype, offset, epsilon
#[derive(FromPyObject)]
pub struct Normalised(u64, u32, String, u64, bool, f32, f32);

impl Normalised {
    fn get(&self) -> Result<Norm> {
        Ok(Norm {
            rows: self.0,
            columns: self.1,
            dtype: DType::from_torch_name(&self.2)?,
            weight: self.3,
            wide: self.4,
            offset: self.5,
            epsilon: self.6,
        })
    }
}

/// Writes the normalised x (or x + residual, written to `sum`) to `out`, and 1 / rms of its rows to `inverse`.
#[pyfunction]
pub fn cuda_rms_norm(
    device: usize,
    stream: u64,
    norm: Normalised,
    x: u64,
    residual: (u64, u64),
    out: u64,
    inverse: u64,
) -> Result<()> {
    let norm = norm.get()?;
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda_blocks` allocated the outputs by the shape of x.
    unsafe { rms_norm::forward(device, stream, &norm, x, residual, out, inverse) }?;
    Ok(())
}

/// Writes the gradient of x to `out`, and the weight's to the second of `weight`, whose first has room for partial sums,
/// unless they are 0.
#[pyfunction]
pub fn cuda_rms_norm_backward(
    device: usize,
    stream: u64,
    norm: Normalised,
    x: (u64, u64),
    grad: (u64, u64),
    out: u64,
    weight: (u64, u64),
) -> Result<()> {
    let norm = norm.get()?;
    let device = Device::get(device)?;
    // SAFETY: as above.
    unsafe { rms_norm::backward(device, stream, &norm, x, grad, out, weight) }?;
    Ok(())
}

/// Rows of the partial sums; None where rows are too long for the kernel.
#[pyfunction]
pub fn cuda_rms_norm_partial_rows(
    device: usize,
    rows: u64,
    columns: u32,
    dtype: &str,
) -> Result<Option<u64>> {
    let dtype = DType::from_torch_name(dtype)?;
    Ok(rms_norm::partial_rows(
        Device::get(device)?,
        rows,
        columns,
        dtype,
    ))
}

/// read, written, strides of batch, head and position of the one and of the other
type Turned = (u64, u64, [u64; 3], [u64; 3]);

/// Turns queries and keys by their positions' angles, or back; `tables` are cos, sin and the strides of batch and
/// position, `sizes` batch, length, heads of q, of k, head size and the part of it that is turned.
#[pyfunction]
pub fn cuda_rope(
    device: usize,
    stream: u64,
    q: Turned,
    k: Turned,
    tables: (u64, u64, [u64; 2]),
    sizes: (u64, u32, u32, u32, u32, u32),
    dtype: &str,
    backward: bool,
) -> Result<()> {
    let (batch, length, q_heads, k_heads, head, rotary) = sizes;
    if rotary % 2 != 0 || rotary > head {
        return Err(Error::argument(format!(
            "rotary must be even and at most the head size {head}, not {rotary}"
        )));
    }
    let heads = |(from, to, strides, to_strides): Turned| Heads {
        from,
        to,
        strides,
        to_strides,
    };
    let (cos, sin, strides): (Address, Address, _) = tables;
    let tables = Tables { cos, sin, strides };
    let sizes = Sizes {
        batch,
        length,
        q_heads,
        k_heads,
        head,
        rotary,
    };
    let dtype = DType::from_torch_name(dtype)?;
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda_blocks` allocated the outputs by the shapes of q and k.
    unsafe {
        rope::rope(
            device,
            stream,
            heads(q),
            heads(k),
            &tables,
            sizes,
            dtype,
            backward,
        )
    }?;
    Ok(())
}
