//! What the tokenizer makes of the records: too long ones, and those of which nothing is trained.

use std::collections::BTreeMap;

use serde::Serialize;

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};
use crate::data::example::Example;
use crate::data::record::{Reason, Record};
use crate::data::tokenizer::Tokenizer;

/// Records that are tokenised and counted before the next ones: bounds what is held.
const AT_ONCE: usize = 16_384;

/// Tokens of the records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Tokens {
    pub read: usize,
    pub trained: usize,
    /// Of the longest record.
    pub longest: usize,
}

/// How records become rows.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    /// Tokens in a row.
    pub sequence_length: usize,
    /// Whether longer records go on in another piece.
    pub packing: bool,
}

/// Findings about long records and about those without a trained token.
pub fn check(corpus: &Corpus, tokenizer: &Tokenizer, rows: Rows) -> ([Finding; 2], Tokens) {
    let mut tokens = Tokens::default();
    let mut long = Vec::new();
    let mut untrained: Vec<(usize, String)> = Vec::new();
    for first in (0..corpus.len()).step_by(AT_ONCE) {
        let end = corpus.len().min(first + AT_ONCE);
        let records: Vec<&Record> = (first..end).map(|index| corpus.record(index)).collect();
        for (index, example) in (first..).zip(tokenizer.examples(&records)) {
            match example {
                Ok(example) => {
                    tokens.read += example.ids().len();
                    tokens.trained += example.target_count();
                    tokens.longest = tokens.longest.max(example.ids().len());
                    if let Some(reason) = nothing_trained(&example, rows) {
                        untrained.push((index, reason.to_string()));
                    } else if inputs(&example) > rows.sequence_length {
                        long.push((index, example.ids().len()));
                    }
                }
                Err(reason) => untrained.push((index, reason.to_string())),
            }
        }
    }
    let findings = [
        without_training(corpus, &untrained),
        too_long(corpus, &long, rows),
    ];
    (findings, tokens)
}

/// Tokens that are read: up to the one before the last trained one.
fn inputs(example: &Example) -> usize {
    example
        .trained()
        .last()
        .map_or(0, |last| last.end as usize - 1)
}

fn nothing_trained(example: &Example, rows: Rows) -> Option<Reason> {
    let first = example.trained().first().map(|range| range.start as usize);
    match first {
        None => Some(Reason::NoTokens),
        // Without packing a record is cut after so many inputs.
        Some(first) if !rows.packing && first > rows.sequence_length => {
            Some(Reason::Untrained(rows.sequence_length))
        }
        Some(_) => None,
    }
}

fn without_training(corpus: &Corpus, untrained: &[(usize, String)]) -> Finding {
    let (count, records) = (untrained.len(), corpus.len());
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, reason) in untrained {
        *reasons.entry(reason).or_default() += 1;
    }
    let most = reasons.iter().max_by_key(|(_, count)| **count);
    let severity = if count == records {
        Severity::Stop
    } else {
        Severity::Warning
    };
    let examples = untrained.iter().take(corpus.shown);
    let mut finding = Finding::new("untrained", severity, count, records)
        .message(match most {
            None => "Every record has a trained token.".to_owned(),
            Some((reason, _)) if count == records => {
                format!("No record has a trained token: {reason}. Nothing would be learned.")
            }
            Some((reason, _)) => format!(
                "{} of the records have no trained token and are left out, mostly because: {reason}.",
                share(count, records)
            ),
        })
        .examples(
            examples
                .map(|(index, reason)| corpus.example(*index, reason))
                .collect(),
        );
    for (reason, count) in reasons {
        finding = finding.detail(reason, count);
    }
    finding
}

fn too_long(corpus: &Corpus, long: &[(usize, usize)], rows: Rows) -> Finding {
    let (count, records) = (long.len(), corpus.len());
    let mut longest = long.to_vec();
    longest.sort_by_key(|&(index, tokens)| (std::cmp::Reverse(tokens), index));
    let severity = if rows.packing {
        Severity::Note
    } else {
        Severity::Warning
    };
    let fate = if rows.packing {
        "go on in another row, where they do not see their beginning"
    } else {
        "lose what is behind it"
    };
    Finding::new("too_long", severity, count, records)
        .message(match count {
            0 => format!("Every record fits into {} tokens.", rows.sequence_length),
            _ => format!(
                "{} of the records are longer than {} tokens (sequence_length) and {fate}.",
                share(count, records),
                rows.sequence_length
            ),
        })
        .detail("sequence_length", rows.sequence_length)
        .detail("longest", longest.first().map_or(0, |(_, tokens)| *tokens))
        .examples(
            longest
                .iter()
                .take(corpus.shown)
                .map(|(index, tokens)| corpus.example(*index, format!("{tokens} tokens")))
                .collect(),
        )
}
