//! Few-shot training data.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use super::prepare::{Skips, Source};
use super::record::{Reason, Record};
use crate::error::{Error, Result};

/// A draw of few training records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Few {
    /// Records of each label; of all together where records have no labels.
    pub shots: usize,
    pub seed: u64,
}

impl Source {
    /// Leaves [`Few::shots`] different texts of each label: those whose hash with the seed is lowest, whatever the
    /// order of the files. Records without a label among labelled ones are left out, and told of: `label` is its
    /// column.
    pub(super) fn draw(&mut self, few: Few, label: &str, skips: &mut Skips) -> Result<()> {
        let labelled = self.records.iter().any(|record| record.label.is_some());
        let bare = |record: &&Record| labelled && record.label.is_none();
        for record in self.records.iter().filter(bare) {
            let reason = Reason::Unlabelled(label.to_owned());
            skips.add(&self.paths[record.file], record.number, &reason);
        }
        let mut of_label: BTreeMap<Option<&str>, BTreeMap<[u8; 32], usize>> = BTreeMap::new();
        for (at, (record, digest)) in self.records.iter().zip(&self.digests).enumerate() {
            let mut hash = Sha256::new();
            hash.update(few.seed.to_le_bytes());
            hash.update(digest);
            let label = of_label.entry(record.label.as_deref()).or_default();
            label.entry(hash.finalize().into()).or_insert(at);
        }
        let mut left_out = vec![true; self.records.len()];
        for (label, ranked) in &of_label {
            if labelled && label.is_none() {
                continue;
            }
            if ranked.len() < few.shots {
                let whose = label.map_or_else(String::new, |label| format!(" of label '{label}'"));
                return Err(Error::argument(format!(
                    "shots is {}, but there are {} different training records{whose}; give fewer shots, or more data",
                    few.shots,
                    ranked.len()
                )));
            }
            for &at in ranked.values().take(few.shots) {
                left_out[at] = false;
            }
        }
        self.extract(&left_out);
        Ok(())
    }
}
