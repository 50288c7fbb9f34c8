//! One text under several labels.

use std::collections::HashMap;

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};
use crate::data::record::Digest;

pub fn check(corpus: &Corpus, counts: &[(&str, usize)]) -> Option<Finding> {
    if counts.is_empty() {
        return None;
    }
    let labelled: Vec<(usize, &str)> = corpus.labelled().collect();
    let keys: Vec<Digest> = labelled
        .par_iter()
        .map(|(index, _)| key(&corpus.texts[*index]))
        .collect();
    let mut groups: HashMap<Digest, Vec<usize>> = HashMap::new();
    for (place, key) in keys.iter().enumerate() {
        groups.entry(*key).or_default().push(place);
    }
    let mut conflicts: Vec<Vec<usize>> = groups
        .into_values()
        .filter(|places| {
            let first = labelled[places[0]].1;
            places.iter().any(|place| labelled[*place].1 != first)
        })
        .collect();
    conflicts.sort_unstable();
    let concerned = conflicts.iter().map(Vec::len).sum();
    let examples = conflicts
        .iter()
        .take(corpus.shown)
        .map(|places| {
            let mut labels: Vec<&str> = places.iter().map(|place| labelled[*place].1).collect();
            labels.sort_unstable();
            labels.dedup();
            corpus.example(labelled[places[0]].0, labels.join(" | "))
        })
        .collect();
    let finding = Finding::new(
        "conflicting_labels",
        Severity::Warning,
        concerned,
        labelled.len(),
    )
    .message(match conflicts.len() {
        0 => "No text is there under several labels.".to_owned(),
        texts => format!(
            "{texts} texts are there under several labels, in {} of the records: no model can be right about all of them.",
            share(concerned, labelled.len())
        ),
    })
    .detail("texts", conflicts.len())
    .examples(examples);
    Some(finding)
}

/// Texts that differ in case and white space alone have one key.
pub fn key(text: &str) -> Digest {
    let mut hash = Sha256::new();
    for word in text.split_whitespace() {
        hash.update(word.to_lowercase());
        hash.update(b" ");
    }
    let mut key = Digest::default();
    key.copy_from_slice(&hash.finalize()[..16]);
    key
}
