//! Records from Arrow's batches, whatever they came from.

use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, StringViewArray};
use arrow_cast::{can_cast_types, cast};
use arrow_json::EncoderOptions;
use arrow_json::writer::{NullableEncoder, make_encoder};
use arrow_schema::{ArrowError, DataType, FieldRef, Fields};

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
        let mut projected: Vec<usize> = selection
            .columns()
            .map(|(_, column)| column.index)
            .collect();
        projected.sort_unstable();
        projected.dedup();
        selection.reindex(|index| projected.binary_search(&index).unwrap_or_default());
        Ok(Self {
            selection,
            columns: projected,
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
        let fields = schema.fields().iter().zip(batch.columns());
        let columns: std::result::Result<Vec<Values>, ArrowError> = fields
            .map(|(field, array)| Values::new(field, array))
            .collect();
        let mut columns = match columns {
            Ok(columns) => columns,
            Err(error) => return vec![Err(fail(&error))],
        };
        let mut items = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            let number = first + row;
            let mut long = None;
            let item = self.selection.item(number, |column| {
                let cell = columns[column.index].cell(row);
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
            items.push(Ok(item));
        }
        items
    }
}

enum Values<'a> {
    Strings(StringViewArray),
    Nested(NullableEncoder<'a>),
}

impl<'a> Values<'a> {
    fn new(field: &'a FieldRef, array: &'a ArrayRef) -> std::result::Result<Self, ArrowError> {
        if is_nested(field.data_type()) {
            // Absent keys of a struct are nulls in its column, and are left out again.
            static OPTIONS: std::sync::LazyLock<EncoderOptions> =
                std::sync::LazyLock::new(EncoderOptions::default);
            return make_encoder(field, array, &OPTIONS).map(Self::Nested);
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
