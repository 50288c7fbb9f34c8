//! Random choices that are the same on every machine, thread count and version: ChaCha8's stream and our own arithmetic
//! on it (the shuffles of general-purpose crates may change between their releases).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// What the choices are for; each purpose and number has a stream of its own.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
pub enum Purpose {
    /// Order of the rows as they are stored.
    Rows = 1,
    /// Order of the rows in an epoch.
    Epoch = 2,
    /// Order of the batches in an epoch whose rows are sorted by length.
    Batches = 3,
    /// Order of the records from which labels are predicted.
    Folds = 4,
}

pub fn generator(seed: u64, purpose: Purpose, number: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
    key[16..24].copy_from_slice(&number.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// A uniform number in `0..bound` (bound > 0), by rejection.
fn below(random: &mut ChaCha8Rng, bound: u64) -> u64 {
    let unbiased = u64::MAX - u64::MAX % bound;
    loop {
        let draw = random.next_u64();
        if draw < unbiased {
            return draw % bound;
        }
    }
}

/// A uniform permutation of `0..count` (Fisher and Yates).
pub fn permutation(count: usize, random: &mut ChaCha8Rng) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        let other = below(random, last as u64 + 1) as usize;
        order.swap(last, other);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A changed stream would silently change every split and every run that is resumed.
    #[test]
    fn streams_do_not_change() {
        let draw = |seed, purpose, number| permutation(8, &mut generator(seed, purpose, number));
        assert_eq!(draw(0, Purpose::Rows, 0), PINNED[0]);
        assert_eq!(draw(7, Purpose::Epoch, 3), PINNED[1]);
    }

    /// From an implementation of ChaCha8 in Python.
    const PINNED: [[u32; 8]; 2] = [[3, 7, 2, 1, 4, 0, 6, 5], [6, 0, 3, 2, 1, 4, 7, 5]];

    #[test]
    fn every_permutation_is_as_likely() {
        let mut counts = std::collections::HashMap::new();
        for seed in 0..6000 {
            let order = permutation(3, &mut generator(seed, Purpose::Rows, 0));
            *counts.entry(order).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(
            counts.values().all(|&count| (850..1150).contains(&count)),
            "{counts:?}"
        );
    }
}
