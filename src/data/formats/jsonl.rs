//! `.jsonl`: one JSON object a line. Only the wanted keys are kept; the rest is parsed and dropped as it streams by.

use std::collections::BTreeSet;
use std::path::Path;

use serde::de::DeserializeSeed;

use super::lines::Lines;
use super::object::{Object, Value};
use crate::data::columns::{Cell, Columns, Selection};
use crate::data::reader::Reader;
use crate::data::record::{Item, Reason, Skip};
use crate::error::{Error, Result};

pub struct JsonLines {
    lines: Lines,
    columns: Columns,
    /// Names of the keys to keep, in the order of the cells.
    wanted: Vec<String>,
    /// Keys met so far, until one line has had the columns.
    keys: Option<BTreeSet<String>>,
}

impl JsonLines {
    pub fn open(path: &Path, columns: &Columns) -> Result<Self> {
        Ok(Self {
            lines: Lines::open(path)?,
            wanted: columns
                .candidates()
                .into_iter()
                .map(str::to_owned)
                .collect(),
            columns: columns.clone(),
            keys: Some(BTreeSet::new()),
        })
    }

    /// A line may lack the columns (writers drop nulls) and is then skipped; a file none of whose lines has them is an error.
    fn item(&mut self) -> Result<Option<Item>> {
        loop {
            let Some(line) = self.lines.next_line()? else {
                return self.end();
            };
            if line.trim().is_empty() {
                continue;
            }
            let object = Object {
                wanted: &self.wanted,
                keys: self.keys.as_mut(),
            };
            let mut parser = serde_json::Deserializer::from_str(line);
            let parsed = object
                .deserialize(&mut parser)
                .and_then(|cells| parser.end().map(|()| cells));
            let values = match parsed {
                Ok(values) => values,
                Err(error) => {
                    let message = describe(&error, line);
                    let number = self.lines.number();
                    return Err(Error::format(
                        self.lines.path(),
                        format!("line {number}, {message}"),
                    ));
                }
            };
            return self.assemble(&values).map(Some);
        }
    }

    fn assemble(&mut self, values: &[Value]) -> Result<Item> {
        let number = self.lines.number();
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
        self.keys = None;
        for column in selection.columns() {
            let group = selection
                .group
                .as_ref()
                .is_some_and(|group| group.index == column.index);
            let kind = match &values[column.index] {
                Value::Other(kind) => *kind,
                Value::Scalar(kind, _) if !group => *kind,
                _ => continue,
            };
            let name = &column.name;
            return Err(Error::format(
                self.lines.path(),
                format!("line {number}: `{name}` is {kind}, not a string"),
            ));
        }
        Ok(
            selection.item(number, |column| match &values[column.index] {
                Value::Text(text) | Value::Scalar(_, text) => Cell::Text(text.clone()),
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

    fn end(&mut self) -> Result<Option<Item>> {
        match self.keys.take() {
            Some(keys) if self.lines.number() > 0 && !keys.is_empty() => {
                let names: Vec<&str> = keys.iter().map(String::as_str).collect();
                Err(Error::format(
                    self.lines.path(),
                    self.columns.missing(&names),
                ))
            }
            _ => Ok(None),
        }
    }
}

impl Iterator for JsonLines {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        self.item().transpose()
    }
}

impl Reader for JsonLines {
    fn path(&self) -> &Path {
        self.lines.path()
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
