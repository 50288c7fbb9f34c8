//! One reader a file format.

mod csv;
mod jsonl;
mod lines;
mod object;
mod parquet;
mod text;

pub(super) use self::csv::Csv;
pub(super) use self::jsonl::JsonLines;
pub(super) use self::parquet::Parquet;
pub(super) use self::text::Text;

/// Says how to turn a file of another encoding into one that can be read.
const CONVERT: &str = "convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8 FILE`";
