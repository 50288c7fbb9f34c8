//! The pyo3 faces, one file a subject. They convert arguments, call the core and convert results.

#![allow(
    clippy::needless_pass_by_value,
    reason = "pyo3 hands arguments over by value"
)]

pub mod adapter;
#[cfg(feature = "engine")]
mod caller;
#[cfg(target_arch = "x86_64")]
pub mod cpu_lora;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
pub mod cuda_blocks;
#[cfg(feature = "cuda")]
pub mod cuda_cross_entropy;
#[cfg(feature = "cuda")]
pub mod cuda_lora;
#[cfg(feature = "cuda")]
pub mod cuda_small;
#[cfg(feature = "engine")]
pub mod engine;
#[cfg(feature = "engine")]
mod frames;
#[cfg(feature = "engine")]
mod learner;
pub mod memory;
pub mod quant;
#[cfg(feature = "engine")]
pub mod rows;
#[cfg(feature = "engine")]
pub mod template;
pub mod threads;
