//! `.arrow`: Arrow's IPC format, both the file and the stream (Hugging Face's caches), message by message.
//!
//! The file format is the stream between a padded magic number and a footer, so both are read from front to back.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use arrow_ipc::{MessageHeader, root_as_message};

use super::columnar::{Projection, block};
use super::guarded;
use super::input::Input;
use crate::data::columns::Columns;
use crate::data::stream::{Block, Blocks};
use crate::error::{Error, Result};

/// What the file format begins with, padded to 8 bytes at least.
const MAGIC: &[u8; 8] = b"ARROW1\0\0";
/// What a message begins with.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// What a stream ends with.
const END: &[u8; 8] = b"\xff\xff\xff\xff\0\0\0\0";
/// Largest metadata of a message.
const MAX_METADATA_BYTES: usize = 64 << 20;
/// Largest batch, packed and unpacked.
const MAX_BATCH_BYTES: usize = 1 << 30;
/// Rows parsed as one piece of work.
const BLOCK_ROWS: usize = 1024;

pub struct Arrow {
    path: PathBuf,
    messages: Messages,
    projection: Arc<Projection>,
    /// What is left of the batch that was read last, with its projected columns.
    batch: Option<RecordBatch>,
    number: usize,
}

impl Arrow {
    pub fn open(path: &Path, columns: &Columns) -> Result<Self> {
        let mut messages = Messages::open(path)?;
        // The schema comes first; its message may be known to be over with the next one alone.
        let first = messages.next_batch(true, 0)?;
        let schema = messages
            .decoder
            .schema()
            .ok_or_else(|| Error::format(path, "not a readable Arrow file: it holds no schema"))?;
        let projection = Projection::new(schema.fields(), columns)
            .map_err(|message| Error::format(path, message))?;
        let mut arrow = Self {
            path: path.to_owned(),
            messages,
            projection: Arc::new(projection),
            batch: None,
            number: 0,
        };
        arrow.batch = first.map(|batch| arrow.project(&batch)).transpose()?;
        Ok(arrow)
    }

    fn project(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let projected = batch.project(&self.projection.columns);
        projected.map_err(|error| unreadable(&self.path, self.number, &error))
    }
}

fn unreadable(path: &Path, after: usize, error: &dyn std::fmt::Display) -> Error {
    Error::format(
        path,
        match after {
            0 => format!("not a readable Arrow file: {error}"),
            _ => format!("cannot be read after row {after}: {error}"),
        },
    )
}

/// The messages of a stream, decoded one after another.
struct Messages {
    input: Input,
    /// Bytes that were read to look for the magic number, and belong to the first message.
    begin: Vec<u8>,
    decoder: StreamDecoder,
    /// What the decoder has not taken in yet.
    buffer: Buffer,
    over: bool,
}

impl Messages {
    fn open(path: &Path) -> Result<Self> {
        let mut input = Input::open(path)?;
        let mut begin = Vec::new();
        fill(&mut input, &mut begin, MAGIC.len())?;
        if begin == MAGIC {
            // Writers may pad it further.
            while begin.iter().all(|byte| *byte == 0) || begin == MAGIC {
                begin.clear();
                fill(&mut input, &mut begin, 4)?;
                if begin.is_empty() {
                    break;
                }
            }
        }
        Ok(Self {
            input,
            begin,
            decoder: StreamDecoder::new(),
            buffer: Buffer::from_vec(Vec::<u8>::new()),
            over: false,
        })
    }

    /// The next batch, or `None` at the end; with `until_schema` also as soon as the schema is known. `after` is the
    /// number of rows before, for errors.
    fn next_batch(&mut self, until_schema: bool, after: usize) -> Result<Option<RecordBatch>> {
        while !(until_schema && self.decoder.schema().is_some()) {
            if self.buffer.is_empty() {
                if self.over {
                    return Ok(None);
                }
                let message = next_message(&mut self.input, &mut self.begin)?;
                // The decoder ends a message without a body with what comes behind it.
                self.over = message.is_none();
                self.buffer = message.unwrap_or_else(|| Buffer::from(END));
            }
            let path = self.input.path().to_owned();
            let (decoder, buffer) = (&mut self.decoder, &mut self.buffer);
            let batch = guarded(&path, || decoder.decode(buffer))?;
            if let Some(batch) =
                batch.map_err(|error| unreadable(self.input.path(), after, &error))?
            {
                return Ok(Some(batch));
            }
        }
        Ok(None)
    }
}

impl Blocks for Arrow {
    fn next_block(&mut self) -> Result<Option<Block>> {
        let batch = loop {
            match self.batch.take() {
                Some(batch) if batch.num_rows() > 0 => break batch,
                _ => match self.messages.next_batch(false, self.number)? {
                    Some(batch) => self.batch = Some(self.project(&batch)?),
                    None => return Ok(None),
                },
            }
        };
        let rows = batch.num_rows().min(BLOCK_ROWS);
        let first = self.number + 1;
        self.number += rows;
        self.batch = Some(batch.slice(rows, batch.num_rows() - rows));
        Ok(Some(block(
            &self.path,
            &self.projection,
            batch.slice(0, rows),
            first,
        )))
    }
}

/// The next message with its prefix, metadata and body; `None` at the end of the stream.
fn next_message(input: &mut Input, begin: &mut Vec<u8>) -> Result<Option<Buffer>> {
    let mut bytes = std::mem::take(begin);
    fill(input, &mut bytes, 4)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    let mut prefix = 4;
    if bytes.get(..4) == Some(&CONTINUATION) {
        prefix = 8;
        fill(input, &mut bytes, prefix)?;
    }
    let cut_off = |input: &Input| Error::format(input.path(), "the file is cut off in a message");
    let Some(length) = bytes.get(prefix - 4..prefix) else {
        return Err(cut_off(input));
    };
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
    if length == 0 {
        return Ok(None);
    }
    let too_large = |input: &Input, what: &str| {
        Error::format(
            input.path(),
            format!("not a readable Arrow file: {what} is larger than this reader takes"),
        )
    };
    if length > MAX_METADATA_BYTES {
        return Err(too_large(input, "a message's metadata"));
    }
    let body = prefix + length;
    fill(input, &mut bytes, body)?;
    let Some(metadata) = bytes.get(prefix..body) else {
        return Err(cut_off(input));
    };
    let message = root_as_message(metadata).map_err(|error| {
        let problem = format!("not a readable Arrow file: {error}");
        Error::format(input.path(), problem)
    })?;
    let size = usize::try_from(message.bodyLength()).unwrap_or(usize::MAX);
    if size > MAX_BATCH_BYTES {
        return Err(too_large(input, "a batch"));
    }
    let header = match message.header_type() {
        MessageHeader::DictionaryBatch => message
            .header_as_dictionary_batch()
            .and_then(|dictionary| dictionary.data()),
        _ => message.header_as_record_batch(),
    };
    let mut packed = Vec::new();
    if let Some(batch) = header {
        for buffer in batch.buffers().into_iter().flatten() {
            let place = usize::try_from(buffer.offset()).ok();
            let length = usize::try_from(buffer.length()).ok();
            let end = place
                .zip(length)
                .and_then(|(place, length)| place.checked_add(length));
            match (place, end) {
                (Some(place), Some(end)) if end <= size => {
                    // Where each buffer of a packed batch begins, its unpacked size stands.
                    if batch.compression().is_some() && end - place >= 8 {
                        packed.push(place);
                    }
                }
                _ => {
                    return Err(Error::format(
                        input.path(),
                        "not a readable Arrow file: a batch's buffer reaches out of its message",
                    ));
                }
            }
        }
    }
    fill(input, &mut bytes, body + size)?;
    if bytes.len() < body + size {
        return Err(cut_off(input));
    }
    let mut unpacked = 0usize;
    for offset in packed {
        let length = &bytes[body + offset..body + offset + 8];
        let length = i64::from_le_bytes(length.try_into().unwrap_or_default());
        // -1 stands for a buffer that was left as it is.
        unpacked = unpacked.saturating_add(usize::try_from(length).unwrap_or(0));
    }
    if unpacked > MAX_BATCH_BYTES {
        return Err(too_large(input, "an unpacked batch"));
    }
    Ok(Some(Buffer::from_vec(bytes)))
}

/// Reads until `bytes` has `length`, or to the end of the file; grows with what is there, not with what is claimed.
fn fill(input: &mut Input, bytes: &mut Vec<u8>, length: usize) -> Result<()> {
    let more = length.saturating_sub(bytes.len());
    match input.take(more as u64).read_to_end(bytes) {
        Ok(_) => Ok(()),
        Err(error) => Err(input.error(error)),
    }
}
