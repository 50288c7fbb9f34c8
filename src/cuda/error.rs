//! What the driver reports, under CUDA's own names.

use cudarc::driver::{DriverError, sys};

/// A CUDA call that failed, or could not be made. Python: `CudaError`, with `.code`.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {message}")]
pub struct CudaError {
    /// `CUresult`'s number.
    pub code: i32,
    /// `CUresult`'s name, such as `CUDA_ERROR_OUT_OF_MEMORY`.
    pub name: String,
    pub message: String,
}

impl CudaError {
    /// An error of our own under the name that fits best.
    pub(super) fn new(code: sys::CUresult, message: impl Into<String>) -> Self {
        Self {
            code: code as i32,
            name: format!("{code:?}"),
            message: message.into(),
        }
    }
}

/// For `map_err`: says what was being done.
pub(super) fn during(what: &str) -> impl FnOnce(DriverError) -> CudaError + '_ {
    move |error| {
        let said = error.error_string().map(|text| text.to_string_lossy());
        let said = said.unwrap_or_default();
        CudaError::new(error.0, format!("{what}: {said}"))
    }
}

pub(super) type Result<T> = std::result::Result<T, CudaError>;
