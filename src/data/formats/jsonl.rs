//! `.jsonl`: one JSON object a line. Only the wanted keys are kept; the rest is parsed and dropped as it streams by.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::de::DeserializeSeed;

use super::lines::{Chunk, Chunks, decode};
use super::object::{Object, Value};
use crate::data::columns::{Cell, Columns, Role, Selection};
use crate::data::record::{Item, Reason, Skip};
use crate::data::stream::{Block, Blocks};
use crate::error::{Error, Result};

pub struct JsonLines {
    chunks: Chunks,
    shared: Arc<Shared>,
    first: bool,
    over: bool,
}

/// What the blocks of one file have in common.
struct Shared {
    path: PathBuf,
    columns: Columns,
    /// Names of the keys to keep, in the order of the cells.
    wanted: Vec<String>,
    /// Of each wanted key: whether it may hold a list or an object.
    nested: Vec<bool>,
    /// Whether any line had the columns.
    found: AtomicBool,
    /// Keys of the file's first block, for the error about columns that no line has.
    keys: Mutex<BTreeSet<String>>,
}

impl JsonLines {
    pub fn open(path: &Path, columns: &Columns) -> Result<Self> {
        let candidates = columns.candidates();
        Ok(Self {
            chunks: Chunks::open(path)?,
            shared: Arc::new(Shared {
                path: path.to_owned(),
                columns: columns.clone(),
                wanted: candidates
                    .iter()
                    .map(|(name, _)| (*name).to_owned())
                    .collect(),
                nested: candidates.iter().map(|(_, nested)| *nested).collect(),
                found: AtomicBool::new(false),
                keys: Mutex::default(),
            }),
            first: true,
            over: false,
        })
    }
}

impl Blocks for JsonLines {
    /// A line may lack the columns (writers drop nulls) and is then skipped; a file none of whose lines has them is an error.
    fn next_block(&mut self) -> Result<Option<Block>> {
        let shared = Arc::clone(&self.shared);
        if let Some(chunk) = self.chunks.next_chunk()? {
            let first = std::mem::take(&mut self.first);
            return Ok(Some(Block::Parse(Box::new(move || {
                shared.items(&chunk, first)
            }))));
        }
        if std::mem::replace(&mut self.over, true) {
            return Ok(None);
        }
        Ok(Some(Block::End(Box::new(move || shared.missing()))))
    }
}

impl Shared {
    /// Up to the first line that is not as it must be.
    fn items(&self, chunk: &Chunk, first: bool) -> Vec<Result<Item>> {
        let mut keys = first.then(BTreeSet::new);
        let mut items = Vec::new();
        let mut any = false;
        for (number, offset, line) in chunk.lines() {
            match self.item(number, offset, line, keys.as_mut(), &mut any) {
                Ok(None) => {}
                Ok(Some(item)) => items.push(Ok(item)),
                Err(error) => {
                    items.push(Err(error));
                    break;
                }
            }
        }
        if any {
            self.found.store(true, Relaxed);
        }
        if let Some(keys) = keys {
            *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = keys;
        }
        items
    }

    fn item(
        &self,
        number: usize,
        offset: u64,
        line: &[u8],
        keys: Option<&mut BTreeSet<String>>,
        any: &mut bool,
    ) -> Result<Option<Item>> {
        let line = decode(&self.path, line, number, offset)?;
        if line.trim().is_empty() {
            return Ok(None);
        }
        let object = Object {
            wanted: &self.wanted,
            nested: &self.nested,
            keys: keys.filter(|_| !*any),
        };
        let mut parser = serde_json::Deserializer::from_str(line);
        let parsed = object
            .deserialize(&mut parser)
            .and_then(|cells| parser.end().map(|()| cells));
        let values = parsed.map_err(|error| {
            let message = describe(&error, line);
            Error::format(&self.path, format!("line {number}, {message}"))
        })?;
        let item = self.assemble(number, &values, any)?;
        // The line itself: numbers keep their digits.
        Ok(Some(
            item.with_row(self.columns.whole, || line.trim().to_owned()),
        ))
    }

    fn assemble(&self, number: usize, values: &[Value], any: &mut bool) -> Result<Item> {
        let Some(selection) = self.selection(values) else {
            let absent = self
                .wanted
                .iter()
                .zip(values)
                .find(|(_, value)| matches!(value, Value::Missing))
                .map_or_else(String::new, |(name, _)| name.clone());
            return Ok(Item::Skip(Skip {
                file: 0,
                number,
                reason: Reason::Missing(absent),
            }));
        };
        *any = true;
        for (role, column) in selection.columns() {
            let kind = match &values[column.index] {
                Value::Other(kind) if role != Role::Label => *kind,
                Value::Scalar(kind, _) if matches!(role, Role::Text | Role::Nested) => *kind,
                _ => continue,
            };
            let (name, wants) = (&column.name, role.wants());
            return Err(Error::format(
                &self.path,
                format!("line {number}: `{name}` is {kind}, not {wants}"),
            ));
        }
        Ok(
            selection.item(number, |column| match &values[column.index] {
                Value::Text(text) | Value::Scalar(_, text) => Cell::Text(text.clone()),
                Value::Nested(json) => Cell::Nested(json.clone()),
                Value::Missing => Cell::Missing,
                Value::Null | Value::Other(_) => Cell::Null,
            }),
        )
    }

    fn selection(&self, values: &[Value]) -> Option<Selection> {
        self.columns.select_with(|name| {
            let index = self.wanted.iter().position(|wanted| wanted == name)?;
            (!matches!(values[index], Value::Missing)).then_some(index)
        })
    }

    fn missing(&self) -> Option<Error> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if self.found.load(Relaxed) || keys.is_empty() {
            return None;
        }
        let names: Vec<&str> = keys.iter().map(String::as_str).collect();
        Some(Error::format(&self.path, self.columns.missing(&names)))
    }
}

/// `column C: what is wrong`, C counted in characters as editors do.
fn describe(error: &serde_json::Error, line: &str) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let text = text.strip_suffix(&place).unwrap_or(&text);
    let before = line.as_bytes().get(..error.column().saturating_sub(1));
    let column = before.map_or(0, |bytes| String::from_utf8_lossy(bytes).chars().count()) + 1;
    format!("column {column}: not valid JSON: {text}")
}
