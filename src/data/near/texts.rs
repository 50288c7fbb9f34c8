//! Near duplicates among records, each text taken once.

use std::borrow::Cow;

use rayon::prelude::*;

use super::{Pair, pairs};
use crate::data::record::{Digest, Record};
use crate::data::union::Union;
use crate::error::Result;

/// The different texts of some records, and which of them are near duplicates.
#[derive(Debug, Clone)]
pub struct NearTexts {
    /// The first record of each text, in the order of the digests.
    pub records: Vec<usize>,
    /// Of the texts, by their place in `records`; see [`pairs`].
    pub pairs: Vec<Pair>,
    pub similarity: f64,
}

impl NearTexts {
    /// `digests` are those of the records, `texts` what is said in them.
    ///
    /// # Errors
    /// As [`pairs`]'s.
    pub fn find(
        digests: &[&Digest],
        texts: &[impl AsRef<str> + Sync],
        similarity: f64,
    ) -> Result<Self> {
        let mut records: Vec<usize> = (0..digests.len()).collect();
        records.par_sort_unstable_by_key(|&record| (digests[record], record));
        records.dedup_by_key(|record| digests[*record]);
        let different: Vec<&str> = records
            .iter()
            .map(|&record| texts[record].as_ref())
            .collect();
        let pairs = pairs(&different, similarity)?;
        Ok(Self {
            records,
            pairs,
            similarity,
        })
    }

    /// As [`NearTexts::find`], on what is said in records.
    ///
    /// # Errors
    /// As [`pairs`]'s.
    pub fn of_records(records: &[&Record], digests: &[&Digest], similarity: f64) -> Result<Self> {
        let texts: Vec<Cow<str>> = records
            .par_iter()
            .map(|record| record.content.text())
            .collect();
        Self::find(digests, &texts, similarity)
    }

    /// The texts that hang together, by their place in `records`.
    pub fn union(&self) -> Union {
        let mut union = Union::new(self.records.len());
        for pair in &self.pairs {
            union.join(pair.first, pair.second);
        }
        union
    }
}
