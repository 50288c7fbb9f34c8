//! Reading, splitting, tokenising and packing of training text.
//!
//! [`prepare`] is the whole way: files become [`Record`]s ([`Files`], one [`Reader`] a format), two sides that share no
//! text ([`split`]), [`Example`]s of tokens ([`Tokenizer`]) and [`Packed`] rows, which give [`Batch`]es.

mod batch;
mod batches;
mod columns;
mod example;
mod formats;
mod pack;
mod prepare;
mod random;
mod reader;
mod record;
mod source;
mod split;
mod tokenizer;
mod whole;

pub use batch::{Batch, IGNORE};
pub use batches::{Batches, Evaluation};
pub use columns::Columns;
pub use example::Example;
pub use pack::{Packed, Packing};
pub use prepare::{DataConfig, DataReport, Prepared, Skipped, prepare};
pub use reader::{EXTENSIONS, Files, MAX_RECORD_BYTES, Reader, expand, open};
pub use record::{Content, Digest, Item, Reason, Record, Skip};
pub use source::{BatchSource, Sequential, Shuffled};
pub use split::{Sides, Split, split};
pub use tokenizer::Tokenizer;
pub use whole::{Whole, prepare_whole};
