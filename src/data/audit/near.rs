//! Texts that are nearly another text.

use std::collections::HashMap;

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};
use crate::data::near::{Bands, NearTexts, Pair};

/// Counts the texts of the training side that repeat another one nearly.
pub fn check(corpus: &Corpus, near: &NearTexts) -> Finding {
    let train = corpus.train.records.len();
    let mut union = near.union();
    let mut groups: HashMap<usize, usize> = HashMap::new();
    for pair in &near.pairs {
        groups.entry(union.root(pair.first)).or_default();
    }
    let mut texts = 0;
    for (place, &record) in near.records.iter().enumerate() {
        if record < train {
            texts += 1;
            if let Some(size) = groups.get_mut(&union.root(place)) {
                *size += 1;
            }
        }
    }
    let copies: usize = groups.values().map(|size| size.saturating_sub(1)).sum();
    let largest = groups.values().copied().max().unwrap_or(0);
    let found = groups.values().filter(|size| **size > 1).count();
    let recall = Bands::for_similarity(near.similarity).recall(near.similarity);
    let mut shown: Vec<&Pair> = near
        .pairs
        .iter()
        .filter(|pair| near.records[pair.first].max(near.records[pair.second]) < train)
        .collect();
    shown.sort_by(|first, second| {
        let place = |pair: &Pair| near.records[pair.first].min(near.records[pair.second]);
        place(first).cmp(&place(second))
    });
    let examples = shown
        .into_iter()
        .take(corpus.shown)
        .map(|pair| {
            let (first, second) = (near.records[pair.first], near.records[pair.second]);
            let other = corpus.example(first.min(second), "");
            let name = other.file.file_name().unwrap_or(other.file.as_os_str());
            corpus.example(
                first.max(second),
                format!(
                    "{:.0} % alike with record {} of {}: {}",
                    pair.similarity * 100.0,
                    other.record,
                    name.display(),
                    other.text
                ),
            )
        })
        .collect();
    let severity = Severity::by_share(copies, texts);
    Finding::new("near_duplicates", severity, copies, texts)
        .message(match copies {
            0 => format!(
                "No two different texts share {:.0} % of their character 5-grams.",
                near.similarity * 100.0
            ),
            _ => format!(
                "{} of the different texts share {:.0} % or more of their character 5-grams with another: variants of one template or copies with small changes. They are kept on one side of the split. (Of pairs at this similarity {:.1} % are found.)",
                share(copies, texts),
                near.similarity * 100.0,
                recall * 100.0
            ),
        })
        .detail("similarity", near.similarity)
        .detail("recall_at_similarity", recall)
        .detail("groups", found)
        .detail("largest_group", largest)
        .examples(examples)
}
