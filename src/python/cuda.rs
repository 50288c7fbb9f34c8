//! CUDA operations on PyTorch's memory: device addresses, sizes and raw streams as plain integers.
//! `ferrotune.ops.cuda` allocates, checks types and devices, and keeps tensors alive.

use pyo3::prelude::*;

use crate::cuda::{self, Device};
use crate::dtype::DType;
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

/// What Python is told of a device, as a dict.
#[derive(IntoPyObject)]
pub struct DeviceFacts {
    name: &'static str,
    capability: (i32, i32),
    multiprocessors: u32,
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
    if !(0.0..1.0).contains(&p) {
        return Err(Error::argument(format!(
            "p must be at least 0 and less than 1, not {p}"
        )));
    }
    let dtype = DType::from_torch_name(dtype)?;
    let device = Device::get(device)?;
    // SAFETY: `ferrotune.ops.cuda` allocated `out` and checked `seed`.
    unsafe { cuda::dropout::dropout_mask(device, stream, out, dtype, elements, p, seed, index) }?;
    Ok(())
}
