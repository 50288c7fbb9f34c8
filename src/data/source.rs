//! Where a trainer's batches come from.

use super::Batch;
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
}
