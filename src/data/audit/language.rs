//! Languages that stand beside one another.

use std::collections::HashMap;

use rayon::prelude::*;

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};

/// Most records that are looked at, evenly among all.
const SAMPLE: usize = 100_000;
/// Letters that a text needs for its language to be told.
const LEAST_LETTERS: usize = 60;
/// Characters of a text that are looked at.
const LOOKED_AT: usize = 400;
/// Share of the texts from which a second language is no chance find.
const MIXED: f64 = 0.01;

/// How many texts are in each language, most frequent first, by its English name.
pub type Languages = Vec<(&'static str, usize)>;

pub fn check(corpus: &Corpus) -> (Finding, Languages) {
    let step = corpus.len().div_ceil(SAMPLE).max(1);
    let told: Vec<(usize, &'static str)> = (0..corpus.len())
        .into_par_iter()
        .step_by(step)
        .filter_map(|index| Some((index, language(&corpus.texts[index])?)))
        .collect();
    let mut counts: HashMap<&'static str, usize> = HashMap::new();
    for (_, name) in &told {
        *counts.entry(name).or_default() += 1;
    }
    let mut counts: Languages = counts.into_iter().collect();
    counts.sort_by(|first, second| second.1.cmp(&first.1).then(first.0.cmp(second.0)));
    let main = counts.first().map_or("", |(name, _)| *name);
    let others: usize = counts.iter().skip(1).map(|(_, count)| count).sum();
    let enough = |count: usize| count as f64 >= MIXED * told.len() as f64 && count > 1;
    let second = counts.get(1).is_some_and(|(_, count)| enough(*count));
    let severity = if second {
        Severity::Warning
    } else {
        Severity::Note
    };
    let examples = told
        .iter()
        .filter(|(_, name)| *name != main)
        .take(corpus.shown)
        .map(|(index, name)| corpus.example(*index, *name))
        .collect();
    let looked = corpus.len().div_ceil(step);
    let sample = match step {
        1 => String::new(),
        _ => format!(", of every {step}th record"),
    };
    let message = match (told.len(), others) {
        (0, _) => format!("No text is long enough to tell its language ({LEAST_LETTERS} letters)."),
        (_, 0) => format!("All texts whose language can be told are {main}{sample}."),
        _ => format!(
            "{} of the texts whose language can be told are not {main} but {}{sample}.",
            share(others, told.len()),
            counts
                .iter()
                .skip(1)
                .take(3)
                .map(|(name, count)| format!("{name} ({count})"))
                .collect::<Vec<_>>()
                .join(", ")
        ),
    };
    let finding = Finding::new("languages", severity, others, told.len())
        .message(message)
        .detail("looked_at", looked)
        .detail("main", main)
        .examples(examples);
    (finding, counts)
}

/// The language of a text that is long enough, where it can be told for certain.
fn language(text: &str) -> Option<&'static str> {
    let end = text.char_indices().nth(LOOKED_AT).map(|(end, _)| end);
    let part = &text[..end.unwrap_or(text.len())];
    // One of a script without word breaks says as much as several letters.
    let weight = |character: char| if character >= '\u{2e80}' { 4 } else { 1 };
    let letters: usize = part
        .chars()
        .filter(|character| character.is_alphabetic())
        .map(weight)
        .sum();
    if letters < LEAST_LETTERS {
        return None;
    }
    let found = whatlang::detect(part)?;
    found.is_reliable().then(|| found.lang().eng_name())
}
