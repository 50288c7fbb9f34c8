//! The pyo3 faces, one file a subject. They convert arguments, call the core and convert results.

pub mod adapter;
#[cfg(feature = "engine")]
mod caller;
#[cfg(feature = "engine")]
pub mod engine;
pub mod quant;
