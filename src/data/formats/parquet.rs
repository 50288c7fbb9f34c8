//! `.parquet`: string columns by name, batch by batch; other columns are neither read nor decoded.

use std::fs::File;
use std::path::{Path, PathBuf};

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use arrow::array::{Array, AsArray, StringViewArray};
use arrow::compute::{can_cast_types, cast};
use arrow::datatypes::DataType;

use crate::data::columns::{Cell, Columns, Selection};
use crate::data::reader::{MAX_RECORD_BYTES, Reader};
use crate::data::record::Item;
use crate::error::{Error, Result};

/// Rows decoded at a time.
const BATCH_ROWS: usize = 1024;

pub struct Parquet {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    /// Indices count the projected columns, which keep the file's order.
    selection: Selection,
    /// The projected columns of the current batch.
    batch: Vec<StringViewArray>,
    /// Row of `batch` to be read next.
    row: usize,
    rows: usize,
    number: usize,
}

impl Parquet {
    pub fn open(path: &Path, columns: &Columns) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let unreadable = |error: &dyn std::fmt::Display| {
            Error::format(path, format!("not a readable parquet file: {error}"))
        };
        let builder =
            ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| unreadable(&error))?;
        let fields = builder.schema().fields().clone();
        let names: Vec<&str> = fields.iter().map(|field| field.name().as_str()).collect();
        let mut selection = columns
            .select(&names)
            .map_err(|message| Error::format(path, message))?;
        let group = selection.group.as_ref().map(|column| column.index);
        for column in selection.columns() {
            let kind = fields[column.index].data_type();
            let grouping = group == Some(column.index) && can_cast_types(kind, &DataType::Utf8View);
            if !is_string(kind) && !grouping {
                return Err(Error::format(
                    path,
                    format!("column `{}` holds {kind}, not strings", column.name),
                ));
            }
        }
        let mut projected: Vec<usize> = selection.columns().map(|column| column.index).collect();
        projected.sort_unstable();
        projected.dedup();
        selection.reindex(|index| projected.binary_search(&index).unwrap_or_default());
        let mask = ProjectionMask::roots(builder.parquet_schema(), projected);
        let reader = builder
            .with_projection(mask)
            .with_batch_size(BATCH_ROWS)
            .build()
            .map_err(|error| unreadable(&error))?;
        Ok(Self {
            path: path.to_owned(),
            reader,
            selection,
            batch: Vec::new(),
            row: 0,
            rows: 0,
            number: 0,
        })
    }

    fn item(&mut self) -> Result<Option<Item>> {
        while self.row == self.rows {
            if !self.load()? {
                return Ok(None);
            }
        }
        let row = self.row;
        self.row += 1;
        self.number += 1;
        for column in self.selection.columns() {
            let values = &self.batch[column.index];
            if values.is_valid(row) && values.value(row).len() > MAX_RECORD_BYTES {
                return Err(Error::format(
                    &self.path,
                    format!(
                        "`{}` of row {} is longer than {} MiB; split it into several records",
                        column.name,
                        self.number,
                        MAX_RECORD_BYTES >> 20
                    ),
                ));
            }
        }
        let batch = &self.batch;
        Ok(Some(self.selection.item(self.number, |column| {
            let values = &batch[column.index];
            if values.is_null(row) {
                Cell::Null
            } else {
                Cell::Text(values.value(row).to_owned())
            }
        })))
    }

    fn load(&mut self) -> Result<bool> {
        let Some(batch) = self.reader.next() else {
            return Ok(false);
        };
        let after = self.number;
        let fail = |error: &dyn std::fmt::Display| {
            Error::format(
                &self.path,
                format!("cannot be read after row {after}: {error}"),
            )
        };
        let batch = batch.map_err(|error| fail(&error))?;
        self.batch.clear();
        for column in batch.columns() {
            let strings = cast(column, &DataType::Utf8View).map_err(|error| fail(&error))?;
            self.batch.push(strings.as_string_view().clone());
        }
        self.row = 0;
        self.rows = batch.num_rows();
        Ok(true)
    }
}

fn is_string(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => is_string(values),
        _ => false,
    }
}

impl Iterator for Parquet {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        self.item().transpose()
    }
}

impl Reader for Parquet {
    fn path(&self) -> &Path {
        &self.path
    }
}
