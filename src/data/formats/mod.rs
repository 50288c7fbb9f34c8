//! One reader a file format.

use std::path::Path;

use crate::error::{Error, Result};

mod arrow;
mod columnar;
mod csv;
mod frame;
mod input;
mod jsonl;
mod lines;
mod object;
mod parquet;
mod text;

pub(super) use self::arrow::Arrow;
pub(super) use self::csv::Csv;
pub(super) use self::frame::FrameReader;
pub use self::frame::{Frame, Frames};
pub(super) use self::input::Packing;
pub(super) use self::jsonl::JsonLines;
pub(super) use self::parquet::Parquet;
pub(super) use self::text::Text;

/// Calls a library on a file's content: its panic is the file's error.
fn guarded<R>(path: &Path, call: impl FnOnce() -> R) -> Result<R> {
    // Nothing is read after an error.
    crate::data::guard::guarded(call)
        .map_err(|problem| Error::format(path, format!("the file is damaged: {problem}")))
}

/// Says how to turn a file of another encoding into one that can be read.
const CONVERT: &str = "convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8 FILE`";
