//! The driver: is it there, is it new enough, and is this the process that started it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{result, sys};

use super::error::{CudaError, Result, during};

/// Lowest `cuDriverGetVersion` that can load the kernels: they are built by CUDA 13.0.
pub const DRIVER_NEEDED: i32 = 13_000;

/// Process that initialised the driver; 0 before.
static OWNER: AtomicU32 = AtomicU32::new(0);

/// Version of the driver's API (13000 for CUDA 13.0); None without a driver.
pub fn driver_version() -> Option<i32> {
    static VERSION: OnceLock<Option<i32>> = OnceLock::new();
    *VERSION.get_or_init(|| {
        // SAFETY: asks the dynamic loader for libcuda by its names.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let mut version = 0;
        // SAFETY: the library is there, and `version` is a valid place for an int.
        let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
        (status == sys::CUresult::CUDA_SUCCESS).then_some(version)
    })
}

/// Initialises the driver once.
///
/// # Errors
/// No driver, one that is too old, or a process forked after CUDA was in use.
pub(super) fn initialise() -> Result<()> {
    static DONE: OnceLock<std::result::Result<(), (sys::CUresult, String)>> = OnceLock::new();
    check_process()?;
    DONE.get_or_init(|| start().map(|()| OWNER.store(std::process::id(), Ordering::Relaxed)))
        .clone()
        .map_err(|(code, message)| CudaError::new(code, message))
}

fn start() -> std::result::Result<(), (sys::CUresult, String)> {
    let Some(version) = driver_version() else {
        let message = "no NVIDIA driver (libcuda) was found on this machine";
        return Err((sys::CUresult::CUDA_ERROR_NO_DEVICE, message.into()));
    };
    if version < DRIVER_NEEDED {
        let message = format!(
            "the NVIDIA driver supports CUDA {}, but ferrotune's kernels need CUDA {}: install a driver of the 580 \
             series or newer",
            dotted(version),
            dotted(DRIVER_NEEDED)
        );
        return Err((sys::CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, message));
    }
    result::init().map_err(|error| (error.0, "cuInit failed".to_owned()))
}

/// "13.0" for 13000.
fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// # Errors
/// In a child forked after the parent initialised CUDA, whose handles mean nothing here.
pub(super) fn check_process() -> Result<()> {
    let owner = OWNER.load(Ordering::Relaxed);
    if owner == 0 || owner == std::process::id() {
        return Ok(());
    }
    Err(CudaError::new(
        sys::CUresult::CUDA_ERROR_NOT_INITIALIZED,
        "CUDA cannot be used in a process forked after its parent used it: start workers with \
         multiprocessing's method 'spawn' or 'forkserver'",
    ))
}

/// Devices that the driver shows; 0 without a driver.
///
/// # Errors
/// As for an operation, except that a missing driver or device is none.
pub fn device_count() -> Result<usize> {
    match initialise() {
        Ok(()) => Ok(result::device::get_count().map_err(during("counting devices"))? as usize),
        Err(error) if error.code == sys::CUresult::CUDA_ERROR_NO_DEVICE as i32 => Ok(0),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_in_words() {
        assert_eq!(dotted(12_080), "12.8");
        assert_eq!(dotted(DRIVER_NEEDED), "13.0");
    }

    #[test]
    fn without_a_driver_one_clear_error() {
        if driver_version().is_some() {
            return;
        }
        assert_eq!(device_count().unwrap(), 0);
        let error = initialise().unwrap_err().to_string();
        assert!(
            error.starts_with("CUDA_ERROR_NO_DEVICE: no NVIDIA driver"),
            "{error}"
        );
    }
}
