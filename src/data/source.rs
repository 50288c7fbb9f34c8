//! Where a trainer's batches come from.

use sha2::{Digest as _, Sha256};

use super::batch::Batch;
use super::batches::Batches;
use super::pack::Packed;
use crate::error::Result;

/// A data set that has been cut into micro-batches, and can give any one of them at any time.
///
/// `batch` depends on its arguments alone: a resumed run asks for `(epoch, index)` and reads what
/// an unbroken run would have read.
pub trait BatchSource {
    /// The same for every epoch, at least 1.
    fn batches_per_epoch(&self) -> usize;

    /// Micro-batch `index` (below [`Self::batches_per_epoch`]) of `epoch` (from 0; each has its own order).
    fn batch(&self, epoch: usize, index: usize) -> Result<Batch>;

    /// A digest of the tokens and of all that decides their order.
    fn fingerprint(&self) -> String;

    /// UTF-8 bytes of what the targets spell, where that is known.
    fn bytes(&self) -> Option<usize> {
        None
    }
}

/// Micro-batches of training: the rows in another order each epoch.
pub struct Shuffled<'a> {
    packed: &'a Packed,
    batch_size: usize,
    seed: u64,
    by_length: bool,
}

impl<'a> Shuffled<'a> {
    /// # Errors
    /// [`crate::error::Error::Argument`] for a `batch_size` of 0 and for no rows.
    pub fn new(packed: &'a Packed, batch_size: usize, seed: u64) -> Result<Self> {
        Batches::new(packed, batch_size, seed, 0, 0)?;
        Ok(Self {
            packed,
            batch_size,
            seed,
            by_length: false,
        })
    }

    /// The same with rows of about one length in a batch, which need less padding.
    pub fn by_length(self, by_length: bool) -> Self {
        Self { by_length, ..self }
    }
}

impl BatchSource for Shuffled<'_> {
    fn batches_per_epoch(&self) -> usize {
        self.packed.rows().div_ceil(self.batch_size)
    }

    fn batch(&self, epoch: usize, index: usize) -> Result<Batch> {
        let new = if self.by_length {
            Batches::by_length
        } else {
            Batches::new
        };
        let mut batches = new(self.packed, self.batch_size, self.seed, epoch as u64, index)?;
        Ok(batches.next_batch())
    }

    fn fingerprint(&self) -> String {
        format!(
            "{} by {} from {}{}",
            digest(self.packed),
            self.batch_size,
            self.seed,
            if self.by_length { " by length" } else { "" }
        )
    }
}

/// Micro-batches of evaluation: the rows in their stored order, every epoch alike.
pub struct Sequential<'a> {
    packed: &'a Packed,
    batch_size: usize,
    bytes: Option<usize>,
}

impl<'a> Sequential<'a> {
    /// # Errors
    /// [`crate::error::Error::Argument`] for a `batch_size` of 0.
    pub fn new(packed: &'a Packed, batch_size: usize) -> Result<Self> {
        if batch_size == 0 {
            return Err(crate::error::Error::argument(
                "batch_size must be at least 1, not 0",
            ));
        }
        Ok(Self {
            packed,
            batch_size,
            bytes: None,
        })
    }

    /// Tells how many UTF-8 bytes the targets spell.
    pub fn spelling(self, bytes: Option<usize>) -> Self {
        Self { bytes, ..self }
    }
}

impl BatchSource for Sequential<'_> {
    fn batches_per_epoch(&self) -> usize {
        self.packed.rows().div_ceil(self.batch_size)
    }

    fn batch(&self, _epoch: usize, index: usize) -> Result<Batch> {
        let rows = self.packed.rows();
        let start = (index * self.batch_size).min(rows);
        let end = (start + self.batch_size).min(rows);
        let rows: Vec<u32> = (start as u32..end as u32).collect();
        Ok(self.packed.batch(&rows))
    }

    fn fingerprint(&self) -> String {
        format!("{} by {}", digest(self.packed), self.batch_size)
    }

    fn bytes(&self) -> Option<usize> {
        self.bytes
    }
}

/// SHA-256 of every row's ids, targets and positions, as hexadecimal digits.
fn digest(packed: &Packed) -> String {
    let mut hash = Sha256::new();
    for row in 0..packed.rows() as u32 {
        let batch = packed.batch(&[row]);
        hash.update((batch.columns as u64).to_le_bytes());
        hash.update(bytemuck::cast_slice::<u32, u8>(&batch.ids));
        hash.update(bytemuck::cast_slice::<i32, u8>(&batch.targets));
        hash.update(bytemuck::cast_slice::<u32, u8>(&batch.positions));
    }
    format!("{:x}", hash.finalize())
}
