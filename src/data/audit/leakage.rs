//! Held-out records that are in the training data.

use std::collections::{HashMap, HashSet};

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};
use crate::data::near::NearTexts;
use crate::data::record::Digest;

pub fn check(corpus: &Corpus, near: Option<&NearTexts>) -> Option<Finding> {
    let heldout = corpus.heldout?;
    let train = corpus.train.records.len();
    let exact: HashSet<&Digest> = corpus.train.digests.iter().collect();
    // Of each text: the root of its group, and of each root whether it has a text of the training side.
    let mut groups: HashMap<&Digest, usize> = HashMap::new();
    let mut trained: HashSet<usize> = HashSet::new();
    if let Some(near) = near {
        let mut union = near.union();
        for (place, &record) in near.records.iter().enumerate() {
            let root = union.root(place);
            groups.insert(corpus.digest(record), root);
            if exact.contains(corpus.digest(record)) {
                trained.insert(root);
            }
        }
    }
    let (mut same, mut alike) = (0, 0);
    let mut examples = Vec::new();
    for (index, digest) in heldout.digests.iter().enumerate() {
        let note = if exact.contains(digest) {
            same += 1;
            "the same text is trained on"
        } else if groups
            .get(digest)
            .is_some_and(|root| trained.contains(root))
        {
            alike += 1;
            "a near duplicate is trained on"
        } else {
            continue;
        };
        if examples.len() < corpus.shown {
            examples.push(corpus.example(train + index, note));
        }
    }
    let (leaks, records) = (same + alike, heldout.records.len());
    let severity = if leaks == records {
        Severity::Stop
    } else {
        Severity::Warning
    };
    let message = match leaks {
        0 => "No held-out text is in the training data.".to_owned(),
        _ if leaks == records => {
            "Every held-out record is in the training data, or nearly is: the held-out loss would measure memory. Give other held-out files, or let a part of the data be held out.".to_owned()
        }
        _ => format!(
            "{} of the held-out records are in the training data, or nearly are. A run leaves the training copies out.",
            share(leaks, records)
        ),
    };
    let finding = Finding::new("leakage", severity, leaks, records)
        .message(message)
        .detail("same", same)
        .detail("near", alike)
        .examples(examples);
    Some(finding)
}
