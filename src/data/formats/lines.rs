//! Lines of bounded length in valid UTF-8, with their numbers and byte offsets.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::CONVERT;
use crate::data::reader::MAX_RECORD_BYTES;
use crate::error::{Error, Result};

pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    buffer: Vec<u8>,
    number: usize,
    /// Byte offset of the line to be read next.
    offset: u64,
}

impl Lines {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        Ok(Self {
            path: path.to_owned(),
            reader: BufReader::with_capacity(1 << 16, file),
            buffer: Vec::new(),
            number: 0,
            offset: 0,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of the line read last, from 1.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The next line without its end (`\n` or `\r\n`) and without a leading byte-order mark.
    ///
    /// # Errors
    /// [`Error::Format`] for a line over [`MAX_RECORD_BYTES`] and for invalid UTF-8, with its byte offset.
    pub fn next_line(&mut self) -> Result<Option<&str>> {
        self.buffer.clear();
        let limit = MAX_RECORD_BYTES as u64 + 2;
        let read = (&mut self.reader)
            .take(limit)
            .read_until(b'\n', &mut self.buffer)
            .map_err(Error::io(&self.path))?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        let start = self.offset;
        self.offset += read as u64;

        let mut line = self.buffer.as_slice();
        line = line.strip_suffix(b"\n").unwrap_or(line);
        line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.len() > MAX_RECORD_BYTES {
            return Err(Error::format(
                &self.path,
                format!(
                    "line {} is longer than {} MiB; split it into several records",
                    self.number,
                    MAX_RECORD_BYTES >> 20
                ),
            ));
        }
        if start == 0 && (line.starts_with(b"\xff\xfe") || line.starts_with(b"\xfe\xff")) {
            return Err(Error::format(
                &self.path,
                "the file is UTF-16; convert it to UTF-8, for example with `iconv -f utf-16 -t utf-8 FILE`",
            ));
        }
        let line = std::str::from_utf8(line).map_err(|error| {
            let offset = start + error.valid_up_to() as u64;
            Error::format(
                &self.path,
                format!(
                    "invalid UTF-8 at byte {offset} (line {}); {CONVERT}",
                    self.number
                ),
            )
        })?;
        Ok(Some(if start == 0 {
            line.strip_prefix('\u{feff}').unwrap_or(line)
        } else {
            line
        }))
    }
}
