//! MinHash signatures, cut into bands: texts with one band alike are candidates.

use rayon::prelude::*;

use super::shingles::shingles;

/// Hash functions a signature may have.
const MAX_HASHES: usize = 128;
/// Recall at the threshold that the choice of bands aims at.
const RECALL: f64 = 0.999;

/// How signatures are cut: `count` bands of `rows` hash values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bands {
    pub count: usize,
    pub rows: usize,
}

impl Bands {
    /// The longest bands (which give the fewest needless candidates) that find 99.9 % of the pairs at the threshold; the
    /// shortest where none of at most 128 hash functions does.
    pub fn for_similarity(similarity: f64) -> Self {
        let rows = (1..=16).rev().find(|&rows| {
            let count = MAX_HASHES / rows;
            Self { count, rows }.recall(similarity) >= RECALL
        });
        let rows = rows.unwrap_or(1);
        // No more bands than the recall needs.
        let most = MAX_HASHES / rows;
        let count = (1..most).find(|&count| Self { count, rows }.recall(similarity) >= RECALL);
        Self {
            count: count.unwrap_or(most),
            rows,
        }
    }

    /// The probability that a pair of this Jaccard similarity becomes a candidate: 1 − (1 − sʳ)ᵇ.
    pub fn recall(self, similarity: f64) -> f64 {
        1.0 - (1.0 - similarity.powi(self.rows as i32)).powi(self.count as i32)
    }
}

/// Of each band, the key of each text; `None` for a text without shingles.
pub fn keys<T: AsRef<str> + Sync>(texts: &[T], bands: Bands) -> Vec<Vec<Option<u32>>> {
    let functions = functions(bands.count * bands.rows);
    let of_text: Vec<Vec<u32>> = texts
        .par_iter()
        .map(|text| text_keys(&shingles(text.as_ref()), bands, &functions))
        .collect();
    (0..bands.count)
        .into_par_iter()
        .map(|band| of_text.iter().map(|keys| keys.get(band).copied()).collect())
        .collect()
}

/// One key a band, or none at all for no shingles.
fn text_keys(shingles: &[u32], bands: Bands, functions: &[(u32, u32)]) -> Vec<u32> {
    if shingles.is_empty() {
        return Vec::new();
    }
    let mut signature = vec![u32::MAX; functions.len()];
    for &shingle in shingles {
        for (least, &(offset, factor)) in signature.iter_mut().zip(functions) {
            // Two rounds of multiply and xor-shift: plain linear functions miss more than they should.
            let mut hash = (shingle ^ offset).wrapping_mul(0x85eb_ca6b);
            hash ^= hash >> 15;
            *least = (*least).min(hash.wrapping_mul(factor));
        }
    }
    let keys = signature.chunks_exact(bands.rows).map(|rows| {
        let mixed = rows
            .iter()
            .fold(0u64, |mixed, &row| mix(mixed ^ u64::from(row)));
        (mixed >> 32) as u32
    });
    keys.collect()
}

/// The same functions in every run and version: SplitMix64 from a fixed start.
fn functions(count: usize) -> Vec<(u32, u32)> {
    let mut state = 0x6665_7272_6f74_756e; // "ferrotun"
    let mut next = || {
        state = u64::wrapping_add(state, 0x9e37_79b9_7f4a_7c15);
        mix(state)
    };
    (0..count)
        .map(|_| ((next() >> 32) as u32, (next() >> 32) as u32 | 1))
        .collect()
}

/// SplitMix64's finaliser.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_reach_the_recall_they_state() {
        for similarity in [0.5, 0.7, 0.8, 0.9, 0.95] {
            let bands = Bands::for_similarity(similarity);
            assert!(bands.recall(similarity) >= RECALL, "{similarity} {bands:?}");
            assert!(bands.count * bands.rows <= MAX_HASHES);
        }
        assert_eq!(Bands::for_similarity(0.8), Bands { count: 18, rows: 5 });
    }
}
