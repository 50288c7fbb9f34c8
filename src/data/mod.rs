//! Reading, splitting, tokenising and packing of training text.

mod batch;
mod source;

pub use batch::{Batch, IGNORE};
pub use source::BatchSource;
