//! The order of the rows in an epoch: a fair shuffle, or batches of rows that are about equally long.

use super::random::{Purpose, generator, permutation};

/// Batches whose rows are sorted together: enough that the rows of a batch are alike, few enough that most of the order
/// is chance.
const WINDOW: usize = 64;

/// A permutation of the rows that depends on the seed and the epoch alone.
///
/// With `by_length`, the shuffled rows are sorted by length within windows of 64 batches, cut into batches of
/// `batch_size`, and the batches are shuffled; the last, smaller one stays last.
pub fn epoch_order(
    lengths: &[u32],
    batch_size: usize,
    seed: u64,
    epoch: u64,
    by_length: bool,
) -> Vec<u32> {
    let order = permutation(lengths.len(), &mut generator(seed, Purpose::Epoch, epoch));
    if !by_length || batch_size == 0 {
        return order;
    }
    let mut sorted = order;
    for window in sorted.chunks_mut(WINDOW * batch_size) {
        // The sort is stable: rows of one length stay shuffled.
        window.sort_by_key(|&row| std::cmp::Reverse(lengths[row as usize]));
    }
    let whole = sorted.len() / batch_size;
    let batches = permutation(whole, &mut generator(seed, Purpose::Batches, epoch));
    let mut order: Vec<u32> = Vec::with_capacity(sorted.len());
    for batch in batches {
        let start = batch as usize * batch_size;
        order.extend(&sorted[start..start + batch_size]);
    }
    order.extend(&sorted[whole * batch_size..]);
    order
}
