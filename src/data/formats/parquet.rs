//! `.parquet`: columns by name, batch by batch; other columns are neither read nor decoded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::columnar::{Projection, block};
use super::guarded;
use super::input::seekable;
use crate::data::columns::Columns;
use crate::data::stream::{Block, Blocks};
use crate::error::{Error, Result};

/// Rows decoded at a time.
const BATCH_ROWS: usize = 1024;

pub struct Parquet {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    projection: Arc<Projection>,
    number: usize,
}

impl Parquet {
    pub fn open(path: &Path, columns: &Columns) -> Result<Self> {
        let unreadable = |error: &dyn std::fmt::Display| {
            Error::format(path, format!("not a readable parquet file: {error}"))
        };
        let file = seekable(path)?;
        let builder = guarded(path, || ParquetRecordBatchReaderBuilder::try_new(file))?
            .map_err(|error| unreadable(&error))?;
        let projection = Projection::new(builder.schema().fields(), columns)
            .map_err(|message| Error::format(path, message))?;
        let mask =
            ProjectionMask::roots(builder.parquet_schema(), projection.columns.iter().copied());
        let reader = builder
            .with_projection(mask)
            .with_batch_size(BATCH_ROWS)
            .build()
            .map_err(|error| unreadable(&error))?;
        Ok(Self {
            path: path.to_owned(),
            reader,
            projection: Arc::new(projection),
            number: 0,
        })
    }
}

impl Blocks for Parquet {
    fn next_block(&mut self) -> Result<Option<Block>> {
        let after = self.number;
        let reader = &mut self.reader;
        let batch = guarded(&self.path, || reader.next())?.transpose();
        let Some(batch) = batch.map_err(|error| {
            Error::format(
                &self.path,
                format!("cannot be read after row {after}: {error}"),
            )
        })?
        else {
            return Ok(None);
        };
        self.number += batch.num_rows();
        Ok(Some(block(&self.path, &self.projection, batch, after + 1)))
    }
}
