//! CUDA operations on PyTorch's memory: device addresses, sizes and raw streams as plain integers.
//! `ferrotune.ops.cuda` allocates, checks types and devices, and keeps tensors alive.

use std::collections::HashMap;

use pyo3::prelude::*;

use crate::cuda::quant::{self, Nested, Quantized};
use crate::cuda::{self, Device};
use crate::dtype::{DType, QuantType};
use crate::error::{Error, Result};

/// (version of the driver's API, or None without a driver; the version needed), 13000 for CUDA 13.0.
#[pyfunction]
pub fn cuda_driver() -> (Option<i32>, i32) {
    (cuda::driver_version(), cuda::DRIVER_NEEDED)
}

/// Devices that the driver shows.
#[pyfunction]
pub fn cuda_devices() -> Result<usize> {
    Ok(cuda::device_count()?)
}

/// The embedded fatbins by the names of their `.cu` files, for the tools that look into them.
#[pyfunction]
pub fn cuda_images() -> HashMap<&'static str, &'static [u8]> {
    cuda::IMAGES.iter().copied().collect()
}

/// What Python is told of a device, as a dict.
#[derive(IntoPyObject)]
pub struct DeviceFacts {
    name: &'static str,
    capability: (i32, i32),
    multiprocessors: u32,
    /// Compute capabilities times ten of the machine code that runs and of the PTX that it was made from.
    code: (i32, i32),
    kernels: Vec<&'static str>,
}

/// Loads every kernel onto a device; a second call does nothing.
#[pyfunction]
pub fn cuda_prepare(py: Python<'_>, device: usize) -> Result<DeviceFacts> {
    let device = py.detach(|| Device::prepare(device))?;
    Ok(DeviceFacts {
        name: &device.name,
        capability: device.capability,
        multiprocessors: device.multiprocessors,
        code: (device.code.machine, device.code.source),
        kernels: device.kernels(),
    })
}

/// Writes the mask that dropout applies, `elements` of `dtype` at `out`; `seed` is the address of an int64.
#[pyfunction]
pub fn cuda_dropout_mask(
    device: usize,
    stream: u64,
    out: u64,
    dtype: &str,
    elements: u64,
    p: f32,
    seed: u64,
    index: u64,
) -> Result<()> {
    if !(0.0..=1.0).contains(&p) {
        return Err(Error::argument(format!("p must be in [0, 1], not {p}")));
    }
    let dtype = DType::from_torch_name(dtype)?;
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda` allocated `out` and checked `seed`.
    unsafe { cuda::dropout::dropout_mask(device, stream, out, dtype, elements, p, seed, index) }?;
    Ok(())
}

/// A 4-bit tensor's parts as Python passes them; without double quantisation the nested ones are 0.
#[derive(FromPyObject)]
pub struct Weight(
    u64,    // packed
    u64,    // absmax
    u64,    // nested absmax
    u64,    // nested code
    u64,    // nested offset
    String, // quant_type
    usize,  // blocksize
    usize,  // nested_blocksize
);

impl Weight {
    pub(super) fn get(&self) -> Result<Quantized> {
        let nested = Nested {
            absmax: self.2,
            code: self.3,
            offset: self.4,
            blocksize: self.7,
        };
        Ok(Quantized {
            packed: self.0,
            absmax: self.1,
            nested: (self.2 != 0).then_some(nested),
            quant_type: QuantType::from_name(&self.5)?,
            blocksize: self.6,
        })
    }
}

/// Writes the values of a 4-bit weight `[n, k]` to `out`, `[n, k]` or transposed `[k, n]`, rounded once to `dtype`.
#[pyfunction]
pub fn cuda_dequantize_4bit(
    device: usize,
    stream: u64,
    weight: Weight,
    out: u64,
    dtype: &str,
    n: u64,
    k: u64,
    transpose: bool,
) -> Result<()> {
    let dtype = DType::from_torch_name(dtype)?;
    let weight = weight.get()?;
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda` allocated `out`, and `Quant4bit.check` compared the parts with the shape.
    unsafe {
        if transpose {
            quant::dequantize_4bit_transposed(device, stream, &weight, out, dtype, n, k)
        } else {
            quant::dequantize_4bit(device, stream, &weight, out, dtype, n * k, false)
        }
    }
}

/// Quantises `elements` values of `dtype`: codes to `packed`, an f32 a block to `absmax`.
#[pyfunction]
pub fn cuda_quantize_4bit(
    device: usize,
    stream: u64,
    values: u64,
    dtype: &str,
    elements: u64,
    quant_type: &str,
    blocksize: usize,
    packed: u64,
    absmax: u64,
) -> Result<()> {
    let dtype = DType::from_torch_name(dtype)?;
    let quant_type = QuantType::from_name(quant_type)?;
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda` allocated the outputs by `elements`.
    unsafe {
        quant::quantize_4bit(
            device, stream, values, dtype, elements, quant_type, blocksize, packed, absmax,
        )
    }
}

/// Quantises the absmax of `blocks` blocks, less the f32 at `offset`, to the values at `code`: a byte each to `codes`, an
/// f32 for every 256 of them to `nested_absmax`.
#[pyfunction]
pub fn cuda_quantize_absmax(
    device: usize,
    stream: u64,
    absmax: u64,
    blocks: u64,
    offset: u64,
    code: u64,
    codes: u64,
    nested_absmax: u64,
) -> Result<()> {
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda` allocated the outputs by `blocks`.
    unsafe {
        quant::quantize_absmax(
            device,
            stream,
            absmax,
            blocks,
            offset,
            code,
            codes,
            nested_absmax,
        )
    }?;
    Ok(())
}
