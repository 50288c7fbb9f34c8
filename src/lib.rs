//! ferrotune: LoRA and QLoRA fine-tuning at the speed of the frozen model.
//!
//! Dependencies point one way: `python` → `engine`, `data`, `adapter` → `folder`, `lora`, `quant` → `error`, `dtype`, `file`.

pub mod adapter;
#[cfg(feature = "engine")]
pub mod data;
pub mod dtype;
#[cfg(feature = "engine")]
pub mod engine;
pub mod error;
pub mod file;
pub mod folder;
pub mod lora;
pub mod matmul;
pub mod parallel;
pub mod quant;
pub mod scratch;
pub mod simd;

#[cfg(feature = "python")]
mod python;

#[cfg(feature = "python")]
#[pyo3::pymodule(name = "_native")]
mod native {
    #[pymodule_export]
    use crate::error::FormatError;
    #[pymodule_export]
    use crate::python::adapter::{match_targets, read_adapter, write_adapter};
    #[cfg(feature = "engine")]
    #[pymodule_export]
    use crate::python::engine::{compute, evaluate, generate, merge, train};
    #[pymodule_export]
    use crate::python::memory::{dequantize_4bit_at, dropout_at};
    #[pymodule_export]
    use crate::python::quant::{
        dequantize_4bit, quant_state_from_tensors, quant_state_to_tensors, quantize_4bit,
    };
    #[pymodule_export]
    use crate::python::threads::use_openmp;

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
