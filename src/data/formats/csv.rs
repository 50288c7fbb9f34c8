//! `.csv` and `.tsv`: values between commas or tabs, with a header, quoted as RFC 4180 does.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use ::csv::{ByteRecord, ErrorKind, ReaderBuilder};
use serde_json::{Map, Value};

use super::CONVERT;
use super::input::{Input, Packing, unreadable};
use crate::data::columns::{Cell, Columns, Selection};
use crate::data::reader::MAX_RECORD_BYTES;
use crate::data::record::Item;
use crate::data::stream::{BLOCK_BYTES, Block, Blocks};
use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 1 << 16;

pub struct Csv {
    path: PathBuf,
    reader: ::csv::Reader<Bounded>,
    /// Bytes that `reader` may still take in before it must have finished a row.
    budget: Arc<AtomicUsize>,
    /// `None` for a file of white space only.
    selection: Option<Arc<Selection>>,
    /// All columns' names, where each record keeps them all.
    whole: Option<Arc<[String]>>,
    number: usize,
    failed: bool,
}

impl Csv {
    pub fn open(path: &Path, delimiter: u8, columns: &Columns) -> Result<Self> {
        let budget = Arc::new(AtomicUsize::new(MAX_RECORD_BYTES + BUFFER_BYTES));
        let bounded = Bounded {
            input: Input::open(path)?,
            budget: Arc::clone(&budget),
        };
        let mut reader = ReaderBuilder::new()
            .delimiter(delimiter)
            .buffer_capacity(BUFFER_BYTES)
            .from_reader(bounded);
        let header = reader.byte_headers().map_err(|error| fail(path, &error))?;
        let names: Vec<String> = header
            .iter()
            .map(|name| String::from_utf8_lossy(name).trim().to_owned())
            .collect();
        let selection = if names.iter().all(String::is_empty) {
            None
        } else {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let found = columns.select(&names).map_err(|message| {
                Error::format(path, format!("{message} (line 1 is the header)"))
            })?;
            Some(Arc::new(found))
        };
        Ok(Self {
            path: path.to_owned(),
            reader,
            budget,
            selection,
            whole: columns.whole.then(|| names.into()),
            number: 0,
            failed: false,
        })
    }
}

impl Blocks for Csv {
    fn next_block(&mut self) -> Result<Option<Block>> {
        let Some(selection) = self.selection.clone().filter(|_| !self.failed) else {
            return Ok(None);
        };
        let first = self.number + 1;
        let mut rows = Vec::new();
        let mut bytes = 0;
        let mut failed = None;
        while bytes < BLOCK_BYTES {
            self.budget.store(MAX_RECORD_BYTES + BUFFER_BYTES, Relaxed);
            let mut row = ByteRecord::new();
            match self.reader.read_byte_record(&mut row) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    failed = Some(fail(&self.path, &error));
                    self.failed = true;
                    break;
                }
            }
            bytes += row.as_slice().len() + row.len() * size_of::<usize>();
            rows.push(row);
        }
        self.number += rows.len();
        if rows.is_empty() && failed.is_none() {
            return Ok(None);
        }
        let (path, whole) = (self.path.clone(), self.whole.clone());
        Ok(Some(Block::Parse(Box::new(move || {
            let rows = rows.iter().zip(first..);
            let items =
                rows.map(|(row, number)| item(&path, &selection, whole.as_deref(), row, number));
            items.chain(failed.map(Err)).collect()
        }))))
    }
}

fn item(
    path: &Path,
    selection: &Selection,
    whole: Option<&[String]>,
    row: &ByteRecord,
    number: usize,
) -> Result<Item> {
    let read = selection.columns();
    let read = read.map(|(_, column)| (column.name.as_str(), column.index));
    let all = whole.unwrap_or_default().iter().zip(0..);
    for (name, index) in read.chain(all.map(|(name, index)| (name.as_str(), index))) {
        if let Err(error) = std::str::from_utf8(&row[index]) {
            let line = row.position().map_or(0, ::csv::Position::line);
            let start = row.position().map_or(0, ::csv::Position::byte);
            return Err(Error::format(
                path,
                format!(
                    "invalid UTF-8 in column `{name}` of the row at line {line} (from byte {start}), {} bytes into the value; {CONVERT}",
                    error.valid_up_to()
                ),
            ));
        }
    }
    let value = |index: usize| String::from_utf8_lossy(&row[index]).into_owned();
    let item = selection.item(number, |column| Cell::Text(value(column.index)));
    Ok(item.with_row(whole.is_some(), || {
        let names = whole.unwrap_or_default().iter().zip(0..);
        let object: Map<String, Value> = names
            .map(|(name, index)| (name.clone(), value(index).into()))
            .collect();
        Value::Object(object).to_string()
    }))
}

fn fail(path: &Path, error: &::csv::Error) -> Error {
    let message = match error.kind() {
        ErrorKind::UnequalLengths {
            pos,
            expected_len,
            len,
        } => format!(
            "line {}: {len} fields where the header has {expected_len}; a field with a delimiter, a quote or a line break in it must be quoted",
            pos.as_ref().map_or(0, ::csv::Position::line)
        ),
        ErrorKind::Io(source) if source.kind() != std::io::ErrorKind::FileTooLarge => {
            let copy = match source.raw_os_error() {
                Some(code) => std::io::Error::from_raw_os_error(code),
                None => std::io::Error::new(source.kind(), source.to_string()),
            };
            return unreadable(path, Packing::of(path).0, copy);
        }
        _ => error.to_string(),
    };
    Error::format(path, message)
}

/// Stops a row that never ends (an unclosed quote takes in the rest of the file).
struct Bounded {
    input: Input,
    budget: Arc<AtomicUsize>,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(buffer)?;
        let left = self.budget.load(Relaxed);
        if read > left {
            return Err(std::io::Error::new(
                std::io::ErrorKind::FileTooLarge,
                format!(
                    "a row is longer than {} MiB; is a quote left open?",
                    MAX_RECORD_BYTES >> 20
                ),
            ));
        }
        self.budget.store(left - read, Relaxed);
        Ok(read)
    }
}
