//! The torch-free fine-tuning engine, on candle and the CPU.

mod model;
pub mod models;
pub mod ops;

pub use model::{Mode, Model, Parameter, Segment};
