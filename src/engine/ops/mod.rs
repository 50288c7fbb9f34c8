//! Fused operations on f32 slices, forward and backward, one layer a file.
//!
//! They are plain functions; the models put them into candle's graph a block at a time.

pub mod attention;
pub mod cross_entropy;
pub mod gelu;
pub mod norm;
pub mod rope;
pub mod swiglu;
