//! `.txt`: running text in paragraphs, or lines where the file has no blank ones.

use std::path::Path;

use super::lines::Lines;
use crate::data::columns::{Columns, check};
use crate::data::reader::MAX_RECORD_BYTES;
use crate::data::record::{Content, Item, Record, Skip};
use crate::data::stream::{BLOCK_BYTES, Block, Blocks};
use crate::error::{Error, Result};

/// What a skipped paragraph's text is called in its reason.
const NAME: &str = "text";

pub struct Text {
    lines: Lines,
    paragraphs: bool,
    number: usize,
}

impl Text {
    /// Reads the file once up to its first inner blank line to see whether it has paragraphs.
    pub fn open(path: &Path, columns: &Columns) -> Result<Self> {
        if columns.any_named() {
            return Err(Error::format(
                path,
                "a .txt file has no columns: text_column, prompt_column, completion_column, messages_column, label_column and group need .jsonl, .csv, .tsv, .parquet or .arrow",
            ));
        }
        Ok(Self {
            paragraphs: has_paragraphs(path)?,
            lines: Lines::open(path)?,
            number: 0,
        })
    }

    /// The lines of the next paragraph, joined by `\n`.
    fn paragraph(&mut self) -> Result<Option<String>> {
        let mut text = String::new();
        while let Some(line) = self.lines.next_line()? {
            if line.trim().is_empty() {
                if text.is_empty() {
                    continue;
                }
                break;
            }
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(line);
            if !self.paragraphs {
                break;
            }
            if text.len() > MAX_RECORD_BYTES {
                return Err(Error::format(
                    self.lines.path(),
                    format!(
                        "the paragraph that reaches line {} is longer than {} MiB; separate records by blank lines",
                        self.lines.number(),
                        MAX_RECORD_BYTES >> 20
                    ),
                ));
            }
        }
        Ok((!text.is_empty()).then_some(text))
    }
}

impl Blocks for Text {
    fn next_block(&mut self) -> Result<Option<Block>> {
        let first = self.number + 1;
        let mut texts = Vec::new();
        let mut bytes = 0;
        let mut failed = None;
        while bytes < BLOCK_BYTES {
            match self.paragraph() {
                Ok(Some(text)) => {
                    bytes += text.len() + size_of::<String>();
                    texts.push(text);
                }
                Ok(None) => break,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        self.number += texts.len();
        if texts.is_empty() && failed.is_none() {
            return Ok(None);
        }
        Ok(Some(Block::Parse(Box::new(move || {
            let items = texts.into_iter().zip(first..).map(|(text, number)| {
                Ok(match check(text, NAME, false) {
                    Ok(text) => Item::Record(Record {
                        content: Content::Text(text),
                        label: None,
                        group: None,
                        bias: None,
                        row: None,
                        file: 0,
                        number,
                    }),
                    Err(reason) => Item::Skip(Skip {
                        file: 0,
                        number,
                        reason,
                    }),
                })
            });
            items.chain(failed.map(Err)).collect()
        }))))
    }
}

/// Whether a blank line stands between two lines of text.
fn has_paragraphs(path: &Path) -> Result<bool> {
    let mut lines = Lines::open(path)?;
    let (mut text, mut gap) = (false, false);
    while let Some(line) = lines.next_line()? {
        let blank = line.trim().is_empty();
        if gap && !blank {
            return Ok(true);
        }
        text |= !blank;
        gap = text && blank;
    }
    Ok(false)
}
