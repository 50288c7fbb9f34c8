//! Reading, splitting, tokenising and packing of training text.
//!
//! [`prepare`] is the whole way: files become [`Record`]s ([`Files`], one [`Reader`] a format), two sides that share no
//! text ([`split`]), [`Example`]s of tokens ([`Tokenizer`]) and [`Packed`] rows, which give [`Batch`]es.

pub mod audit;
mod batch;
mod batches;
mod chat;
mod columns;
mod divided;
mod example;
mod few;
mod formats;
mod guard;
mod json;
mod labelled;
pub mod near;
mod order;
mod pack;
mod prepare;
mod random;
mod reader;
mod record;
mod rows;
mod source;
mod split;
mod split_files;
mod stream;
mod swaps;
mod template;
mod terms;
mod tokenizer;
mod union;
mod whole;

pub use batch::{Batch, IGNORE};
pub use batches::{Batches, Evaluation};
pub use columns::Columns;
pub use example::Example;
pub use few::Few;
pub use formats::{Frame, Frames};
pub use labelled::{
    Labelled, LabelledBatches, PreparedTexts, Texts, prepare_texts, prepare_whole_texts,
};
pub use order::epoch_order;
pub use pack::{Layout, Packed, Packing};
pub use prepare::{DataConfig, DataReport, Prepared, Skipped, prepare};
pub use reader::{EXTENSIONS, Files, MAX_RECORD_BYTES, Reader, expand, open};
pub use record::{Content, Digest, Item, Reason, Record, Skip};
pub use rows::{Rows, RowsReport, prepare_rows};
pub use source::{BatchSource, Sequential, Shuffled};
pub use split::{Sides, Split, SplitPlan, divide, split};
pub use split_files::{Records, SplitConfig, SplitFile, SplitResult, records, split_files};
pub use swaps::Swap;
pub use template::{ChatTemplate, Conversation};
pub use terms::Terms;
pub use tokenizer::Tokenizer;
pub use whole::{Whole, prepare_whole};
