//! Records from Arrow's batches, whatever they came from.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, StringViewArray, new_empty_array};
use arrow_cast::{can_cast_types, cast};
use arrow_json::EncoderOptions;
use arrow_json::writer::{NullableEncoder, make_encoder};
use arrow_schema::{ArrowError, DataType, FieldRef, Fields};
use serde_json::Value;

use super::guarded;
use crate::data::columns::{Cell, Columns, Role, Selection};
use crate::data::reader::MAX_RECORD_BYTES;
use crate::data::record::Item;
use crate::data::stream::Block;
use crate::error::{Error, Result};

/// The columns of a schema that are read.
#[derive(Debug)]
pub struct Projection {
    /// Indices count `columns`.
    selection: Selection,
    /// Indices into the schema, ascending.
    pub columns: Vec<usize>,
    /// Whether these are all, and each record keeps them.
    whole: bool,
}

impl Projection {
    /// # Errors
    /// What is wrong with the columns: absent, there twice, or of a type that holds no text.
    pub fn new(fields: &Fields, columns: &Columns) -> std::result::Result<Self, String> {
        let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
        let mut selection = columns.select(&names)?;
        let mut without_label = false;
        for (role, column) in selection.columns() {
            let kind = fields[column.index].data_type();
            let fits = match role {
                Role::Text => is_string(kind),
                Role::Nested => is_string(kind) || is_nested(kind),
                Role::Group | Role::Label => can_cast_types(kind, &DataType::Utf8View),
            };
            if !fits && role == Role::Label {
                without_label = true;
            } else if !fits {
                let wants = if role == Role::Nested {
                    "messages"
                } else {
                    "strings"
                };
                return Err(format!(
                    "column `{}` holds {kind}, not {wants}",
                    column.name
                ));
            }
        }
        if without_label {
            selection.label = None;
        }
        let mut projected: Vec<usize> = if columns.whole {
            refuse_what_json_lacks(fields)?;
            (0..fields.len()).collect()
        } else {
            let read = selection.columns();
            read.map(|(_, column)| column.index).collect()
        };
        projected.sort_unstable();
        projected.dedup();
        selection.reindex(|index| projected.binary_search(&index).unwrap_or_default());
        Ok(Self {
            selection,
            columns: projected,
            whole: columns.whole,
        })
    }

    /// The records of a batch that has the projected columns alone; the first is number `first` of its file.
    pub fn items(&self, path: &Path, batch: &RecordBatch, first: usize) -> Vec<Result<Item>> {
        let fail = |error: &dyn std::fmt::Display| {
            Error::format(
                path,
                format!("cannot be read after row {}: {error}", first - 1),
            )
        };
        let schema = batch.schema();
        let fields = || schema.fields().iter().zip(batch.columns());
        let read = self.selection.columns().map(|(_, column)| column.index);
        let read: BTreeSet<usize> = read.collect();
        let columns: std::result::Result<Vec<Option<Values>>, ArrowError> = fields()
            .enumerate()
            .map(|(index, (field, array))| {
                let values = read.contains(&index).then(|| Values::new(field, array));
                values.transpose()
            })
            .collect();
        let row_of = if self.whole {
            let encoders = fields().map(|(field, array)| encoder(field, array));
            encoders.collect()
        } else {
            Ok(Vec::new())
        };
        let (mut columns, mut encoders) = match (columns, row_of) {
            (Ok(columns), Ok(encoders)) => (columns, encoders),
            (Err(error), _) | (_, Err(error)) => return vec![Err(fail(&error))],
        };
        let mut items = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            let number = first + row;
            let mut long = None;
            let item = self.selection.item(number, |column| {
                let values = columns[column.index].as_mut();
                let cell = values.map_or(Cell::Missing, |values| values.cell(row));
                if let Cell::Text(text) | Cell::Nested(text) = &cell
                    && text.len() > MAX_RECORD_BYTES
                {
                    long = Some(column.name.clone());
                }
                cell
            });
            if let Some(name) = long {
                items.push(Err(Error::format(
                    path,
                    format!(
                        "`{name}` of row {number} is longer than {} MiB; split it into several records",
                        MAX_RECORD_BYTES >> 20
                    ),
                )));
                break;
            }
            let names = schema.fields().iter().map(|field| field.name());
            let whole = || json(names.zip(&mut encoders), row);
            items.push(Ok(item.with_row(self.whole, whole)));
        }
        items
    }
}

/// # Errors
/// The column of a type that is no JSON.
fn refuse_what_json_lacks(fields: &Fields) -> std::result::Result<(), String> {
    for field in fields {
        encoder(field, &new_empty_array(field.data_type())).map_err(|_| {
            format!(
                "column `{}` holds {}, which JSON has no form for; leave the column out",
                field.name(),
                field.data_type()
            )
        })?;
    }
    Ok(())
}

/// A row as one JSON object.
fn json<'a, 'b: 'a>(
    columns: impl Iterator<Item = (&'a String, &'a mut NullableEncoder<'b>)>,
    row: usize,
) -> String {
    let mut out = Vec::new();
    for (name, values) in columns {
        out.push(if out.is_empty() { b'{' } else { b',' });
        out.extend_from_slice(Value::from(name.as_str()).to_string().as_bytes());
        out.push(b':');
        if values.is_null(row) {
            out.extend_from_slice(b"null");
        } else {
            values.encode(row, &mut out);
        }
    }
    out.push(b'}');
    String::from_utf8_lossy(&out).into_owned()
}

/// Absent keys of a struct are nulls in its column, and are left out again.
fn encoder<'a>(
    field: &'a FieldRef,
    array: &'a ArrayRef,
) -> std::result::Result<NullableEncoder<'a>, ArrowError> {
    static OPTIONS: LazyLock<EncoderOptions> = LazyLock::new(EncoderOptions::default);
    make_encoder(field, array, &OPTIONS)
}

enum Values<'a> {
    Strings(StringViewArray),
    Nested(NullableEncoder<'a>),
}

impl<'a> Values<'a> {
    fn new(field: &'a FieldRef, array: &'a ArrayRef) -> std::result::Result<Self, ArrowError> {
        if is_nested(field.data_type()) {
            return encoder(field, array).map(Self::Nested);
        }
        let strings = cast(array, &DataType::Utf8View)?;
        Ok(Self::Strings(strings.as_string_view().clone()))
    }

    fn cell(&mut self, row: usize) -> Cell {
        match self {
            Self::Strings(values) if values.is_null(row) => Cell::Null,
            Self::Strings(values) => Cell::Text(values.value(row).to_owned()),
            Self::Nested(values) if values.is_null(row) => Cell::Null,
            Self::Nested(values) => {
                let mut json = Vec::new();
                values.encode(row, &mut json);
                Cell::Nested(String::from_utf8_lossy(&json).into_owned())
            }
        }
    }
}

fn is_string(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => is_string(values),
        _ => false,
    }
}

fn is_nested(kind: &DataType) -> bool {
    matches!(
        kind,
        DataType::List(_)
            | DataType::LargeList(_)
            | DataType::ListView(_)
            | DataType::LargeListView(_)
            | DataType::FixedSizeList(..)
    )
}

/// A batch to be parsed, with what it takes.
pub fn block(path: &Path, projection: &Arc<Projection>, batch: RecordBatch, first: usize) -> Block {
    let (path, projection) = (path.to_owned(), Arc::clone(projection));
    Block::Parse(Box::new(move || {
        guarded(&path, || projection.items(&path, &batch, first))
            .unwrap_or_else(|error| vec![Err(error)])
    }))
}
