//! One error type for the core, and its one mapping to Python exceptions.

use std::path::{Path, PathBuf};

/// Everything that can go wrong, sorted by whose fault it is: the caller's input, the machine, or the run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument, setting or configuration value that cannot be used. Python: `ValueError`.
    #[error("{0}")]
    Argument(String),
    /// A shape, type or device this build has no code for. Python: `NotImplementedError`.
    #[error("{0}")]
    Unsupported(String),
    /// A file whose content is not what its format requires. Python: `FormatError`.
    #[error("{path}: {message}", path = path.display())]
    Format { path: PathBuf, message: String },
    /// The operating system refused. Python: the matching `OSError`.
    #[error("{path}: {source}", path = path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    /// A run that started from good input and failed all the same. Python: `RuntimeError`.
    #[error("{0}")]
    Run(String),
    /// The user asked to stop (Ctrl-C). Python: `KeyboardInterrupt`.
    #[error("interrupted")]
    Interrupted,
    #[cfg(feature = "engine")]
    #[error("{0}")]
    Candle(#[from] candle_core::Error),
    /// A CUDA call that failed. Python: `CudaError`.
    #[cfg(feature = "cuda")]
    #[error("{0}")]
    Cuda(#[from] crate::cuda::CudaError),
    #[cfg(feature = "python")]
    #[error("{0}")]
    Python(#[from] pyo3::PyErr),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn argument(message: impl Into<String>) -> Self {
        Self::Argument(message.into())
    }

    /// For `map_err`: anything that says what is wrong with an argument.
    pub fn argument_of(problem: impl std::fmt::Display) -> Self {
        Self::Argument(problem.to_string())
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::Unsupported(message.into())
    }

    pub fn run(message: impl Into<String>) -> Self {
        Self::Run(message.into())
    }

    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Format {
            path: path.as_ref().to_owned(),
            message: message.into(),
        }
    }

    /// For `map_err`: attaches the path that was being read or written.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, source }
    }
}

#[cfg(feature = "python")]
mod python {
    use super::Error;
    use pyo3::exceptions::{
        PyKeyboardInterrupt, PyNotImplementedError, PyOSError, PyRuntimeError, PyValueError,
    };
    #[cfg(feature = "cuda")]
    use pyo3::prelude::*;
    use pyo3::{PyErr, create_exception};

    create_exception!(
        ferrotune,
        FormatError,
        PyValueError,
        "A file whose content is not what its format requires."
    );

    create_exception!(
        ferrotune,
        CudaError,
        PyRuntimeError,
        "A CUDA call that failed, or could not be made; `code` is CUDA's number for it."
    );

    #[cfg(feature = "cuda")]
    fn cuda_error(code: i32, text: String) -> PyErr {
        Python::attach(|py| {
            let error = CudaError::new_err(text);
            match error.value(py).setattr("code", code) {
                Ok(()) => error,
                Err(other) => other,
            }
        })
    }

    impl From<Error> for PyErr {
        fn from(error: Error) -> Self {
            let text = error.to_string();
            match error {
                Error::Argument(_) => PyValueError::new_err(text),
                Error::Unsupported(_) => PyNotImplementedError::new_err(text),
                Error::Format { .. } => FormatError::new_err(text),
                // OSError(errno, strerror, filename) picks the subclass (FileNotFoundError, …) by itself.
                Error::Io { path, source } => match source.raw_os_error() {
                    Some(code) => PyOSError::new_err((
                        code,
                        source.to_string(),
                        path.to_string_lossy().into_owned(),
                    )),
                    None => PyOSError::new_err(text),
                },
                Error::Interrupted => PyKeyboardInterrupt::new_err(text),
                Error::Run(_) => PyRuntimeError::new_err(text),
                #[cfg(feature = "engine")]
                Error::Candle(_) => PyRuntimeError::new_err(text),
                #[cfg(feature = "cuda")]
                Error::Cuda(error) => cuda_error(error.code, text),
                Error::Python(error) => error,
            }
        }
    }
}

#[cfg(feature = "python")]
pub use python::{CudaError, FormatError};
