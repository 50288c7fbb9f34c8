//! Labels that differ only in case or space.

use std::collections::BTreeMap;

use serde_json::Value;

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};

pub fn check(corpus: &Corpus, counts: &[(&str, usize)]) -> Option<Finding> {
    if counts.is_empty() {
        return None;
    }
    let records: usize = counts.iter().map(|(_, count)| count).sum();
    let mut spellings: BTreeMap<String, Vec<(&str, usize)>> = BTreeMap::new();
    for (label, count) in counts {
        let folded = folded(label);
        spellings.entry(folded).or_default().push((label, *count));
    }
    // Counts are sorted: the first spelling is the most frequent.
    let several: Vec<Vec<(&str, usize)>> = spellings
        .into_values()
        .filter(|spellings| spellings.len() > 1)
        .collect();
    let quoted = |labels: &[(&str, usize)]| -> Vec<String> {
        labels
            .iter()
            .map(|(label, count)| format!("{label:?} ({count})"))
            .collect()
    };
    let minor = several.iter().flat_map(|spellings| &spellings[1..]);
    let concerned = minor.clone().map(|(_, count)| count).sum();
    let examples = minor
        .take(corpus.shown)
        .filter_map(|(label, _)| {
            let (index, _) = corpus.labelled().find(|(_, other)| other == label)?;
            Some(corpus.example(index, format!("{label:?}")))
        })
        .collect();
    let listed: Vec<Value> = several
        .iter()
        .map(|spellings| quoted(spellings).join(", ").into())
        .collect();
    let finding = Finding::new("label_variants", Severity::Warning, concerned, records)
        .message(match several.first() {
            None => "No two labels differ only in case or space.".to_owned(),
            Some(first) => format!(
                "{} of the records have another spelling of a label, such as {}: to a model they are different labels.",
                share(concerned, records),
                quoted(first).join(" and ")
            ),
        })
        .detail("spellings", listed)
        .examples(examples);
    Some(finding)
}

/// In lower case, without white space, and without what stands for it between letters.
fn folded(label: &str) -> String {
    let characters: Vec<char> = label.trim().chars().collect();
    let inner = |place: usize| place > 0 && place + 1 < characters.len();
    characters
        .iter()
        .enumerate()
        .filter(|&(place, sign)| {
            !(sign.is_whitespace() || (matches!(sign, '_' | '-') && inner(place)))
        })
        .flat_map(|(_, character)| character.to_lowercase())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::folded;

    #[test]
    fn what_is_another_spelling() {
        for other in ["sports news", "Sports  News ", "sports_news", "SPORTS-NEWS"] {
            assert_eq!(folded(other), folded("Sports news"), "{other}");
        }
        for (first, second) in [
            ("C", "C++"),
            ("a.1", "a1"),
            ("1", "2"),
            ("+", "-"),
            ("1", "-1"),
        ] {
            assert_ne!(folded(first), folded(second), "{first} {second}");
        }
    }
}
