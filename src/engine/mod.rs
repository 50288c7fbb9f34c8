//! The torch-free fine-tuning engine, on candle and the CPU.

mod model;

pub use model::{Mode, Model, Parameter, Segment};
