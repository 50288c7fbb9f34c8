//! Lines of bounded length in valid UTF-8, with their numbers and byte offsets.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::CONVERT;
use super::input::Input;
use crate::data::reader::MAX_RECORD_BYTES;
use crate::data::stream::BLOCK_BYTES;
use crate::error::{Error, Result};

/// Whole lines of a file.
pub struct Chunk {
    pub bytes: Vec<u8>,
    /// Number of its first line, from 1.
    pub first: usize,
    /// Byte offset of its first line in the unpacked file.
    pub offset: u64,
}

/// A file in chunks of whole lines, of about [`BLOCK_BYTES`].
pub struct Chunks {
    input: Input,
    /// The beginning of a line whose end has not been read.
    rest: Vec<u8>,
    first: usize,
    offset: u64,
    over: bool,
}

impl Chunks {
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            input: Input::open(path)?,
            rest: Vec::new(),
            first: 1,
            offset: 0,
            over: false,
        })
    }

    /// A line over [`MAX_RECORD_BYTES`] ends the reading: the last chunk holds its beginning.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        if self.over {
            return Ok(None);
        }
        let mut bytes = std::mem::take(&mut self.rest);
        loop {
            let searched = bytes.len();
            let read = (&mut self.input)
                .take(BLOCK_BYTES as u64)
                .read_to_end(&mut bytes);
            match read {
                Ok(0) => {
                    self.over = true;
                    break;
                }
                Ok(_) => {}
                Err(error) => return Err(self.input.error(error)),
            }
            let end = bytes[searched..].iter().rposition(|byte| *byte == b'\n');
            if let Some(end) = end {
                self.rest = bytes.split_off(searched + end + 1);
                break;
            }
            if bytes.len() > MAX_RECORD_BYTES + 2 {
                self.over = true;
                break;
            }
        }
        let (first, offset) = (self.first, self.offset);
        self.first += bytes.split(|byte| *byte == b'\n').count() - 1;
        self.offset += bytes.len() as u64;
        Ok((!bytes.is_empty()).then_some(Chunk {
            bytes,
            first,
            offset,
        }))
    }
}

/// One line as text, without its end (`\n` or `\r\n`) and without a leading byte-order mark.
///
/// # Errors
/// [`Error::Format`] for a line over [`MAX_RECORD_BYTES`] and for invalid UTF-8, with its byte offset.
pub fn decode<'a>(path: &Path, line: &'a [u8], number: usize, start: u64) -> Result<&'a str> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.len() > MAX_RECORD_BYTES {
        return Err(Error::format(
            path,
            format!(
                "line {number} is longer than {} MiB; split it into several records",
                MAX_RECORD_BYTES >> 20
            ),
        ));
    }
    if start == 0 && (line.starts_with(b"\xff\xfe") || line.starts_with(b"\xfe\xff")) {
        return Err(Error::format(
            path,
            "the file is UTF-16; convert it to UTF-8, for example with `iconv -f utf-16 -t utf-8 FILE`",
        ));
    }
    let line = std::str::from_utf8(line).map_err(|error| {
        let offset = start + error.valid_up_to() as u64;
        Error::format(
            path,
            format!("invalid UTF-8 at byte {offset} (line {number}); {CONVERT}"),
        )
    })?;
    Ok(if start == 0 {
        line.strip_prefix('\u{feff}').unwrap_or(line)
    } else {
        line
    })
}

impl Chunk {
    /// Each line with its number and its byte offset.
    pub fn lines(&self) -> impl Iterator<Item = (usize, u64, &[u8])> {
        let mut offset = self.offset;
        self.bytes
            .split_inclusive(|byte| *byte == b'\n')
            .enumerate()
            .map(move |(index, line)| {
                let start = offset;
                offset += line.len() as u64;
                (self.first + index, start, line)
            })
    }
}

/// A file line by line.
pub struct Lines {
    path: PathBuf,
    chunks: Chunks,
    chunk: Vec<u8>,
    /// Where the next line begins in `chunk`.
    at: usize,
    number: usize,
    /// Byte offset of the line to be read next.
    offset: u64,
}

impl Lines {
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            chunks: Chunks::open(path)?,
            chunk: Vec::new(),
            at: 0,
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

    /// The next line; errors as [`decode`]'s.
    pub fn next_line(&mut self) -> Result<Option<&str>> {
        if self.at == self.chunk.len() {
            let Some(chunk) = self.chunks.next_chunk()? else {
                return Ok(None);
            };
            self.chunk = chunk.bytes;
            self.at = 0;
        }
        let start = self.at;
        let rest = &self.chunk[start..];
        let length = rest.iter().position(|byte| *byte == b'\n');
        let length = length.map_or(rest.len(), |end| end + 1);
        self.at += length;
        self.number += 1;
        let offset = self.offset;
        self.offset += length as u64;
        decode(
            &self.path,
            &self.chunk[start..start + length],
            self.number,
            offset,
        )
        .map(Some)
    }
}
