//! Reading, splitting, tokenising and packing of training text.

mod batch;

pub use batch::{Batch, IGNORE};
