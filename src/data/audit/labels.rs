//! How many records each label has.

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};

/// Records of a label from which a model can learn it and be tested on it.
const ENOUGH: usize = 10;
/// Most frequent over least frequent label from which a model may well ignore the latter.
const IMBALANCE: f64 = 10.0;
/// Labels that a message names.
const NAMED: usize = 5;

/// What the labels' counts say; `counts` is [`Corpus::labels`], `wanted` whether the labels are what is to be learned.
pub fn check(corpus: &Corpus, counts: &[(&str, usize)], wanted: bool) -> Vec<Finding> {
    if counts.is_empty() {
        return Vec::new();
    }
    vec![
        balance(corpus, counts, wanted),
        rare(corpus, counts),
        missing(corpus),
    ]
}

fn balance(corpus: &Corpus, counts: &[(&str, usize)], wanted: bool) -> Finding {
    let records: usize = counts.iter().map(|(_, count)| count).sum();
    let (most, least) = (counts[0], counts[counts.len() - 1]);
    let ratio = most.1 as f64 / least.1 as f64;
    // Of the distribution over labels, as a share of the most that so many labels can have.
    let entropy: f64 = counts
        .iter()
        .map(|(_, count)| *count as f64 / records as f64)
        .map(|part| -part * part.ln())
        .sum();
    let evenness = match counts.len() {
        1 => 0.0,
        labels => entropy / (labels as f64).ln(),
    };
    let (severity, count, message) = if counts.len() == 1 {
        let message = format!(
            "Every record has the label `{}`: there is nothing to tell apart. Check the label column.",
            most.0
        );
        let severity = if wanted {
            Severity::Stop
        } else {
            Severity::Warning
        };
        (severity, records, message)
    } else if ratio > IMBALANCE {
        let message = format!(
            "`{}` has {ratio:.0} times as many records ({}) as `{}` ({}): always guessing the former is right in {}.",
            most.0,
            most.1,
            least.0,
            least.1,
            share(most.1, records)
        );
        (Severity::Warning, most.1, message)
    } else {
        let message = format!(
            "{} labels; the most frequent has {ratio:.1} times as many records as the least.",
            counts.len()
        );
        (Severity::Ok, 0, message)
    };
    let of_least = corpus.labelled().filter(|(_, label)| *label == least.0);
    let examples = match severity {
        Severity::Warning if counts.len() > 1 => of_least
            .take(corpus.shown)
            .map(|(index, label)| corpus.example(index, label))
            .collect(),
        _ => Vec::new(),
    };
    Finding::new("label_balance", severity, count, records)
        .message(message)
        .detail("labels", counts.len())
        .detail("ratio", ratio)
        .detail("evenness", evenness)
        .examples(examples)
}

fn rare(corpus: &Corpus, counts: &[(&str, usize)]) -> Finding {
    let records: usize = counts.iter().map(|(_, count)| count).sum();
    let rare: Vec<(&str, usize)> = counts
        .iter()
        .rev()
        .copied()
        .take_while(|(_, count)| *count < ENOUGH)
        .collect();
    let concerned = rare.iter().map(|(_, count)| count).sum();
    let mut named: Vec<String> = rare
        .iter()
        .take(NAMED)
        .map(|(label, count)| format!("`{label}` ({count})"))
        .collect();
    if rare.len() > NAMED {
        named.push(format!("{} more", rare.len() - NAMED));
    }
    let examples = rare
        .iter()
        .take(corpus.shown)
        .filter_map(|(label, count)| {
            let (index, _) = corpus.labelled().find(|(_, other)| other == label)?;
            Some(corpus.example(index, format!("{label}: {count} records")))
        })
        .collect();
    Finding::new("rare_labels", Severity::Warning, concerned, records)
        .message(match rare.len() {
            0 => format!("Every label has at least {ENOUGH} records."),
            count => format!(
                "{count} of {} labels have fewer than {ENOUGH} records, too few to be learned and tested: {}.",
                counts.len(),
                named.join(", ")
            ),
        })
        .detail("labels", rare.len())
        .examples(examples)
}

fn missing(corpus: &Corpus) -> Finding {
    let without: Vec<usize> = (0..corpus.len())
        .filter(|&index| corpus.record(index).label.is_none())
        .collect();
    let (count, records) = (without.len(), corpus.len());
    Finding::new("unlabelled", Severity::Warning, count, records)
        .message(match count {
            0 => "Every record has a label.".to_owned(),
            _ => format!("{} of the records have no label.", share(count, records)),
        })
        .examples(
            without
                .into_iter()
                .take(corpus.shown)
                .map(|index| corpus.example(index, ""))
                .collect(),
        )
}
