//! The order in which rows reach the model: shuffled epochs for training, the first rows for evaluation.

use std::ops::Range;

use super::batch::Batch;
use super::order::epoch_order;
use super::pack::Packed;
use crate::error::{Error, Result};

/// Micro-batches without end, the rows in another order each epoch; the last of an epoch may be smaller.
///
/// An epoch's order depends on the seed and the epoch's number alone, so reading goes on from any position at once.
pub struct Batches<'a> {
    packed: &'a Packed,
    batch_size: usize,
    seed: u64,
    epoch: u64,
    index: usize,
    order: Vec<u32>,
    by_length: bool,
}

impl<'a> Batches<'a> {
    /// Starts at micro-batch `index` of `epoch`, as [`Batches::position`] gave it.
    ///
    /// # Errors
    /// [`Error::Argument`] for a `batch_size` of 0, for no rows, and for an `index` the epoch does not have.
    pub fn new(
        packed: &'a Packed,
        batch_size: usize,
        seed: u64,
        epoch: u64,
        index: usize,
    ) -> Result<Self> {
        Self::ordered(packed, batch_size, seed, epoch, index, false)
    }

    /// As [`Batches::new`], with rows of about one length in a batch.
    ///
    /// # Errors
    /// As [`Batches::new`]'s.
    pub fn by_length(
        packed: &'a Packed,
        batch_size: usize,
        seed: u64,
        epoch: u64,
        index: usize,
    ) -> Result<Self> {
        Self::ordered(packed, batch_size, seed, epoch, index, true)
    }

    fn ordered(
        packed: &'a Packed,
        batch_size: usize,
        seed: u64,
        epoch: u64,
        index: usize,
        by_length: bool,
    ) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::argument("batch_size must be at least 1 row"));
        }
        if packed.rows() == 0 {
            return Err(Error::argument("there is no row to train on"));
        }
        let mut batches = Self {
            packed,
            batch_size,
            seed,
            epoch,
            index,
            order: Vec::new(),
            by_length,
        };
        let count = batches.per_epoch();
        if index >= count {
            return Err(Error::argument(format!(
                "the data have {count} micro-batches an epoch and cannot be read on from number {index}: the run began with other data or another batch_size"
            )));
        }
        batches.shuffle();
        Ok(batches)
    }

    /// Micro-batches in an epoch.
    pub fn per_epoch(&self) -> usize {
        self.packed.rows().div_ceil(self.batch_size)
    }

    /// Epoch and index of the next micro-batch, both from 0.
    pub fn position(&self) -> (u64, usize) {
        (self.epoch, self.index)
    }

    /// The next micro-batch.
    pub fn next_batch(&mut self) -> Batch {
        let start = self.index * self.batch_size;
        let end = self.order.len().min(start + self.batch_size);
        let batch = self.packed.batch(&self.order[start..end]);
        self.index += 1;
        if self.index == self.per_epoch() {
            self.index = 0;
            self.epoch += 1;
            self.shuffle();
        }
        batch
    }

    fn shuffle(&mut self) {
        let lengths = self.packed.lengths();
        self.order = epoch_order(
            &lengths,
            self.batch_size,
            self.seed,
            self.epoch,
            self.by_length,
        );
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        Some(self.next_batch())
    }
}

/// The first rows in their stored order, the same at every evaluation.
pub struct Evaluation<'a> {
    packed: &'a Packed,
    batch_size: usize,
    rows: Range<u32>,
}

impl<'a> Evaluation<'a> {
    /// Reads whole rows up to `eval_tokens` tokens (padding not counted), and at least one; all rows when `None`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a `batch_size` of 0.
    pub fn new(packed: &'a Packed, batch_size: usize, eval_tokens: Option<usize>) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::argument("batch_size must be at least 1 row"));
        }
        let limit = eval_tokens.unwrap_or(usize::MAX);
        let mut tokens = 0;
        let fits = |row: &usize| {
            tokens += packed.row_tokens(*row);
            tokens <= limit
        };
        let count = (0..packed.rows()).take_while(fits).count();
        let count = count.max(packed.rows().min(1));
        Ok(Self {
            packed,
            batch_size,
            rows: 0..count as u32,
        })
    }

    /// Rows still to be read.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }
}

impl Iterator for Evaluation<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let rows: Vec<u32> = self.rows.by_ref().take(self.batch_size).collect();
        (!rows.is_empty()).then(|| self.packed.batch(&rows))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = self.rows.len().div_ceil(self.batch_size);
        (count, Some(count))
    }
}

impl ExactSizeIterator for Evaluation<'_> {}
