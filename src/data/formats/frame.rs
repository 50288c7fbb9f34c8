//! Tables that another library holds in memory in Arrow's layout.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;

use super::columnar::{Projection, block};
use crate::data::columns::Columns;
use crate::data::stream::{Block, Blocks};
use crate::error::{Error, Result};

/// Rows parsed as one piece of work.
const BLOCK_ROWS: usize = 1024;

/// A table in memory; its buffers are shared, not copied.
#[derive(Debug, Clone)]
pub struct Frame {
    pub schema: SchemaRef,
    pub batches: Arc<[RecordBatch]>,
}

impl PartialEq for Frame {
    /// Whether both are the same table in memory.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.batches, &other.batches)
    }
}

/// Frames by the name that stands for each among the paths of a run's data.
pub type Frames = BTreeMap<PathBuf, Frame>;

pub struct FrameReader {
    path: PathBuf,
    frame: Frame,
    projection: Arc<Projection>,
    /// Batch and row to be read next.
    at: (usize, usize),
    number: usize,
}

impl FrameReader {
    pub fn open(path: &Path, frame: &Frame, columns: &Columns) -> Result<Self> {
        let projection = Projection::new(frame.schema.fields(), columns)
            .map_err(|message| Error::format(path, message))?;
        Ok(Self {
            path: path.to_owned(),
            frame: frame.clone(),
            projection: Arc::new(projection),
            at: (0, 0),
            number: 0,
        })
    }
}

impl Blocks for FrameReader {
    fn next_block(&mut self) -> Result<Option<Block>> {
        while let Some(batch) = self.frame.batches.get(self.at.0) {
            let rows = (batch.num_rows() - self.at.1).min(BLOCK_ROWS);
            if rows == 0 {
                self.at = (self.at.0 + 1, 0);
                continue;
            }
            let part = batch.slice(self.at.1, rows);
            let part = part
                .project(&self.projection.columns)
                .map_err(|error| Error::format(&self.path, format!("cannot be read: {error}")))?;
            let first = self.number + 1;
            self.at.1 += rows;
            self.number += rows;
            return Ok(Some(block(&self.path, &self.projection, part, first)));
        }
        Ok(None)
    }
}
