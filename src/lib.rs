//! ferrotune: LoRA and QLoRA fine-tuning at the speed of the frozen model.
//!
//! Dependencies point one way: `python` → `engine`, `data`, `adapter` → `folder`, `lora`, `product`, `quant` → `error`, `dtype`, `file`.
//! `cuda` stands beside the engine: `python` → `cuda` → `error`, `dtype`.

pub mod adapter;
#[cfg(feature = "cuda")]
pub mod cuda;
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
#[cfg(target_arch = "x86_64")]
pub mod product;
pub mod quant;
pub mod scratch;
pub mod simd;

#[cfg(feature = "python")]
mod python;

#[cfg(feature = "python")]
#[pyo3::pymodule(name = "_native")]
mod native {
    #[pymodule_export]
    use crate::error::{CudaError, FormatError};
    #[pymodule_export]
    use crate::python::adapter::{match_targets, read_adapter, write_adapter};
    #[cfg(target_arch = "x86_64")]
    #[pymodule_export]
    use crate::python::cpu_lora::{cpu_lora_at, cpu_product_at, cpu_product_units};
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::python::cuda::{
        cuda_dequantize_4bit, cuda_devices, cuda_driver, cuda_dropout_mask, cuda_images,
        cuda_prepare, cuda_quantize_4bit, cuda_quantize_absmax,
    };
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::python::cuda_blocks::{
        cuda_glu, cuda_glu_backward, cuda_rms_norm, cuda_rms_norm_backward,
        cuda_rms_norm_partial_rows, cuda_rope,
    };
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::python::cuda_cross_entropy::{
        cuda_cross_entropy, cuda_cross_entropy_prepare, cuda_scale_gradient,
    };
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::python::cuda_lora::{
        cuda_lora_backward, cuda_lora_carries, cuda_lora_forward, cuda_lora_forward_gated,
        cuda_lora_kept_bytes, cuda_lora_max_columns, cuda_lora_products, cuda_lora_workspace,
        cuda_product,
    };
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use crate::python::cuda_small::{cuda_small_division, cuda_small_linear};
    #[cfg(feature = "engine")]
    #[pymodule_export]
    use crate::python::engine::{audit, compute, evaluate, generate, merge, records, split, train};
    #[pymodule_export]
    use crate::python::memory::{dequantize_4bit_at, dropout_at};
    #[pymodule_export]
    use crate::python::quant::{
        dequantize_4bit, dynamic_map, quant_state_from_tensors, quant_state_to_tensors,
        quantize_4bit,
    };
    #[cfg(feature = "engine")]
    #[pymodule_export]
    use crate::python::rows::{epoch_order, prepare_rows};
    #[cfg(feature = "engine")]
    #[pymodule_export]
    use crate::python::template::{ChatTemplate, ChatTokenizer};
    #[pymodule_export]
    use crate::python::threads::use_openmp;

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Whether the CUDA kernels were built in.
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "Python's name for it")]
    const has_cuda: bool = cfg!(feature = "cuda");

    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        use pyo3::types::PyAnyMethods;
        // Instances carry their own; the class has it so that the attribute is always there.
        module.getattr("CudaError")?.setattr("code", 0)
    }
}
