//! `.csv`: comma-separated, with a header, quoted as RFC 4180 does.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use ::csv::{ByteRecord, ErrorKind, ReaderBuilder};

use super::CONVERT;
use crate::data::columns::{Cell, Columns, Selection};
use crate::data::reader::{MAX_RECORD_BYTES, Reader};
use crate::data::record::Item;
use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 1 << 16;

pub struct Csv {
    path: PathBuf,
    reader: ::csv::Reader<Bounded>,
    /// Bytes that `reader` may still take in before it must have finished a row.
    budget: Arc<AtomicUsize>,
    /// `None` for a file of white space only.
    selection: Option<Selection>,
    row: ByteRecord,
    number: usize,
}

impl Csv {
    pub fn open(path: &Path, columns: &Columns) -> Result<Self> {
        let budget = Arc::new(AtomicUsize::new(MAX_RECORD_BYTES + BUFFER_BYTES));
        let bounded = Bounded {
            file: File::open(path).map_err(Error::io(path))?,
            budget: Arc::clone(&budget),
        };
        let mut reader = ReaderBuilder::new()
            .buffer_capacity(BUFFER_BYTES)
            .from_reader(bounded);
        let header = reader.byte_headers().map_err(|error| fail(path, &error))?;
        let names: Vec<String> = header
            .iter()
            .map(|name| String::from_utf8_lossy(name).trim().to_owned())
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let selection = if names.iter().all(|name| name.is_empty()) {
            None
        } else {
            Some(columns.select(&names).map_err(|message| {
                Error::format(path, format!("{message} (line 1 is the header)"))
            })?)
        };
        Ok(Self {
            path: path.to_owned(),
            reader,
            budget,
            selection,
            row: ByteRecord::new(),
            number: 0,
        })
    }

    fn item(&mut self) -> Result<Option<Item>> {
        let Some(selection) = &self.selection else {
            return Ok(None);
        };
        self.budget.store(MAX_RECORD_BYTES + BUFFER_BYTES, Relaxed);
        let more = self
            .reader
            .read_byte_record(&mut self.row)
            .map_err(|error| fail(&self.path, &error))?;
        if !more {
            return Ok(None);
        }
        self.number += 1;
        for column in selection.columns() {
            if let Err(error) = std::str::from_utf8(&self.row[column.index]) {
                let line = self.row.position().map_or(0, ::csv::Position::line);
                let start = self.row.position().map_or(0, ::csv::Position::byte);
                return Err(Error::format(
                    &self.path,
                    format!(
                        "invalid UTF-8 in column `{}` of the row at line {line} (from byte {start}), {} bytes into the value; {CONVERT}",
                        column.name,
                        error.valid_up_to()
                    ),
                ));
            }
        }
        let row = &self.row;
        Ok(Some(selection.item(self.number, |column| {
            Cell::Text(String::from_utf8_lossy(&row[column.index]).into_owned())
        })))
    }
}

fn fail(path: &Path, error: &::csv::Error) -> Error {
    let message = match error.kind() {
        ErrorKind::UnequalLengths {
            pos,
            expected_len,
            len,
        } => format!(
            "line {}: {len} fields where the header has {expected_len}; a field with a comma, a quote or a line break in it must be quoted",
            pos.as_ref().map_or(0, ::csv::Position::line)
        ),
        ErrorKind::Io(source) if source.kind() != std::io::ErrorKind::FileTooLarge => {
            return Error::Io {
                path: path.to_owned(),
                source: std::io::Error::new(source.kind(), source.to_string()),
            };
        }
        _ => error.to_string(),
    };
    Error::format(path, message)
}

impl Iterator for Csv {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        self.item().transpose()
    }
}

impl Reader for Csv {
    fn path(&self) -> &Path {
        &self.path
    }
}

/// Stops a row that never ends (an unclosed quote takes in the rest of the file).
struct Bounded {
    file: File,
    budget: Arc<AtomicUsize>,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
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
