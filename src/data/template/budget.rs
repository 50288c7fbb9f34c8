//! What a template makes on its way to the text, counted: a loop that doubles a string ends with an error, not with the
//! memory.

use std::cell::Cell;
use std::fmt::{self, Write};
use std::time::{Duration, Instant};

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Text and lists, in bytes, that a template may make for one conversation, its output included.
const MAX_MADE_BYTES: usize = 256 << 20;
/// Longest text that a template may make, and write.
pub const MAX_TEXT_BYTES: usize = 64 << 20;
/// Longest time for one rendering, which takes milliseconds even on a busy machine: by its steps alone, each of which may
/// walk through a long text, a template could take days.
const MAX_TIME: Duration = Duration::from_secs(60);
/// Bytes that an element of a list, and one of a mapping, count.
const ELEMENT: usize = 24;
const ENTRY: usize = 64;

thread_local! {
    /// By the conversation that this thread renders.
    static MADE: Cell<usize> = const { Cell::new(0) };
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
    static LIMIT: Cell<Duration> = const { Cell::new(MAX_TIME) };
}

/// Counts from nothing again.
pub fn begin() {
    MADE.set(0);
    DEADLINE.set(Instant::now().checked_add(LIMIT.get()));
}

/// The value as it is.
///
/// # Errors
/// Where the rendering takes too long.
pub fn timed(value: Value) -> Result<Value, Error> {
    if DEADLINE.get().is_some_and(|end| Instant::now() > end) {
        let message = format!("it takes more than {:?} for one conversation", LIMIT.get());
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(value)
}

/// # Errors
/// For a text that is longer than any may become.
pub fn fits(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_TEXT_BYTES {
        let message = format!("a text of more than {} MiB", MAX_TEXT_BYTES >> 20);
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(())
}

/// Counts what is made.
///
/// # Errors
/// Where too much has been made with it.
pub fn charge(bytes: usize) -> Result<(), Error> {
    let made = MADE.get().saturating_add(bytes);
    MADE.set(made);
    if made > MAX_MADE_BYTES {
        let limit = MAX_MADE_BYTES >> 20;
        let message = format!("more than {limit} MiB of text and lists for one conversation");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(())
}

/// The value, its size counted.
///
/// # Errors
/// As [`fits`]'s, [`charge`]'s and [`timed`]'s.
pub fn kept(value: Value) -> Result<Value, Error> {
    let length = || value.len().unwrap_or(0);
    let bytes = match value.kind() {
        ValueKind::String => {
            let bytes = value.as_str().map_or(0, str::len);
            fits(bytes)?;
            bytes
        }
        ValueKind::Seq | ValueKind::Iterable => length().saturating_mul(ELEMENT),
        ValueKind::Map => length().saturating_mul(ENTRY),
        _ => 0,
    };
    charge(bytes)?;
    timed(value)
}

/// A writer that counts what is written, and refuses what is too much.
pub struct Charged<W>(pub W);

impl<W: Write> Write for Charged<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        charge(text.len()).map_err(|_| fmt::Error)?;
        self.0.write_str(text)
    }
}

/// # Errors
/// Why a [`Charged`] writer has refused.
pub fn written(result: fmt::Result) -> Result<(), Error> {
    result.or_else(|_| {
        charge(0)?;
        Err(Error::from(ErrorKind::WriteFailure))
    })
}

#[cfg(test)]
pub fn limit_time(to: Duration) {
    LIMIT.set(to);
}
