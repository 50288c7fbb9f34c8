//! The pyo3 faces, one file a subject. They convert arguments, call the core and convert results.

pub mod adapter;
pub mod quant;
