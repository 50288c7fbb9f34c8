//! Texts that are there more than once.

use std::collections::HashMap;

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};
use crate::data::record::Digest;

pub fn check(corpus: &Corpus) -> Finding {
    let side = corpus.train;
    let mut first: HashMap<&Digest, (usize, usize)> = HashMap::with_capacity(side.digests.len());
    for (index, digest) in side.digests.iter().enumerate() {
        first.entry(digest).or_insert((index, 0)).1 += 1;
    }
    let mut repeated: Vec<(usize, usize)> = first
        .into_values()
        .filter(|(_, count)| *count > 1)
        .collect();
    repeated.sort_unstable_by_key(|&(index, count)| (std::cmp::Reverse(count), index));
    let copies: usize = repeated.iter().map(|(_, count)| count - 1).sum();
    let records = side.records.len();
    let examples = repeated.iter().take(corpus.shown);
    let examples = examples
        .map(|&(index, count)| corpus.example(index, format!("{count} times")))
        .collect();
    let severity = Severity::by_share(copies, records);
    Finding::new("exact_duplicates", severity, copies, records)
        .message(match copies {
            0 => "Every text is there once.".to_owned(),
            _ => format!(
                "{} of the records repeat an earlier text: they are trained more often than the others. Keep one of each.",
                share(copies, records)
            ),
        })
        .detail("texts", repeated.len())
        .examples(examples)
}
