//! Near duplicates: texts that share most of their character 5-grams.
//!
//! Two texts are near duplicates if the Jaccard similarity of their sets of [`shingles`] reaches a threshold. Candidates
//! come from MinHash signatures cut into bands (Broder 1997; Indyk and Motwani 1998; Leskovec, Rajaraman and Ullman,
//! *Mining of Massive Datasets*, chapter 3) and are then compared exactly: what is found is a near duplicate indeed, and
//! what is missed is missed by the bands alone, with a probability that [`Bands::recall`] states.
//!
//! The result depends on the set of texts and the threshold alone: not on their order, the threads or the machine.

mod minhash;
mod shingles;
mod texts;

use rayon::prelude::*;

pub use minhash::Bands;
use minhash::keys;
pub use shingles::{jaccard, shingles};
pub use texts::NearTexts;

use super::union::Union;
use crate::error::{Error, Result};

/// Texts of one bucket that the others are compared with: bounds the work on a bucket of many unlike texts.
const REPRESENTATIVES: usize = 16;

/// Two texts, by index, and their similarity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    pub first: usize,
    pub second: usize,
    pub similarity: f64,
}

/// Pairs of near duplicates that join all texts that hang together, at least one for each text that has any: the texts
/// of a group need not all be alike one another.
///
/// `texts` are to be distinct and in an order of their own (of their digests, say), which decides which pairs stand for
/// a group. Texts without a letter or a digit have no near duplicates.
///
/// # Errors
/// [`Error::Argument`] for a similarity outside (0, 1].
pub fn pairs<T: AsRef<str> + Sync>(texts: &[T], similarity: f64) -> Result<Vec<Pair>> {
    if !(similarity > 0.0 && similarity <= 1.0) {
        return Err(Error::argument(format!(
            "near_duplicates must lie above 0 and be at most 1 (it is {similarity}): the share of their character 5-grams from which texts are the same"
        )));
    }
    let bands = Bands::for_similarity(similarity);
    let keys = keys(texts, bands);
    let mut union = Union::new(texts.len());
    let mut found = Vec::new();
    for keys in keys {
        let mut order: Vec<(u32, u32)> = keys
            .into_iter()
            .enumerate()
            .filter_map(|(index, key)| key.map(|key| (key, index as u32)))
            .collect();
        order.par_sort_unstable();
        let buckets: Vec<&[(u32, u32)]> = order
            .chunk_by(|first, second| first.0 == second.0)
            .filter(|bucket| bucket.len() > 1)
            .collect();
        // Every bucket sees the unions of the bands before, and none of this one's.
        let roots = union.roots();
        let pairs: Vec<Vec<Pair>> = buckets
            .par_iter()
            .map(|bucket| compare(texts, bucket, &roots, similarity))
            .collect();
        for pair in pairs.into_iter().flatten() {
            if union.join(pair.first, pair.second) {
                found.push(pair);
            }
        }
    }
    Ok(found)
}

/// The near duplicates among the texts of one bucket that hang together by no pair yet.
fn compare<T: AsRef<str>>(
    texts: &[T],
    bucket: &[(u32, u32)],
    roots: &[u32],
    similarity: f64,
) -> Vec<Pair> {
    let mut representatives: Vec<(usize, Vec<u32>)> = Vec::new();
    let mut pairs = Vec::new();
    for &(_, index) in bucket {
        let index = index as usize;
        let known = representatives
            .iter()
            .any(|(other, _)| roots[*other] == roots[index]);
        let room = representatives.len() < REPRESENTATIVES;
        if known && !room {
            continue;
        }
        let own = shingles(texts[index].as_ref());
        let alike = representatives
            .iter()
            .filter(|_| !known)
            .find_map(|(other, shingles)| {
                let found = jaccard(shingles, &own);
                (found >= similarity).then_some((*other, found))
            });
        pairs.extend(alike.map(|(first, similarity)| Pair {
            first,
            second: index,
            similarity,
        }));
        if room {
            representatives.push((index, own));
        }
    }
    pairs
}
