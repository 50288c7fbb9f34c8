//! A text and its counterpart with terms swapped, for a language model.

use super::batch::{Batch, IGNORE};
use super::example::Example;
use super::prepare::Source;
use super::record::{Content, Record};
use super::terms::Terms;
use super::tokenizer::Tokenizer;

/// A record and the same record with every term in place of its counterpart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swap {
    /// The group whose terms alone stand in the record.
    pub group: Option<usize>,
    original: Example,
    swapped: Example,
}

/// Of every record that has a term; and how many records have one and cannot be used: conversations,
/// and those without a token to predict within `sequence_length`.
pub(super) fn swaps(
    source: &Source,
    terms: &Terms,
    tokenizer: &Tokenizer,
    sequence_length: usize,
) -> (Vec<Swap>, usize) {
    let (mut found, mut left_out) = (Vec::new(), 0);
    for record in &source.records {
        let text = record.content.text();
        if terms.swap(&text).is_none() {
            continue;
        }
        let pair = swapped(record, terms).and_then(|swapped| {
            let examples = tokenizer.examples(&[record, &swapped]);
            let mut examples = examples.into_iter().filter_map(Result::ok);
            let (original, swapped) = (examples.next()?, examples.next()?);
            let predicted =
                |example: &Example| example.trained_in(1..sequence_length + 1).next().is_some();
            (predicted(&original) && predicted(&swapped)).then_some((original, swapped))
        });
        match pair {
            Some((original, swapped)) => found.push(Swap {
                group: terms.group(&text),
                original,
                swapped,
            }),
            None => left_out += 1,
        }
    }
    (found, left_out)
}

fn swapped(record: &Record, terms: &Terms) -> Option<Record> {
    let swap = |text: &String| terms.swap(text).unwrap_or_else(|| text.clone());
    let content = match &record.content {
        Content::Text(text) => Content::Text(swap(text)),
        Content::Completion { prompt, completion } => Content::Completion {
            prompt: swap(prompt),
            completion: swap(completion),
        },
        Content::Messages { .. } => return None,
    };
    Some(Record {
        content,
        ..record.clone()
    })
}

impl Swap {
    /// Two rows of at most `sequence_length` inputs: the original, then its counterpart.
    pub fn batch(&self, sequence_length: usize) -> Batch {
        let examples = [&self.original, &self.swapped];
        let inputs = examples.map(|example| (example.ids().len() - 1).min(sequence_length));
        let columns = inputs[0].max(inputs[1]);
        let mut batch = Batch {
            rows: 2,
            columns,
            ids: vec![0; 2 * columns],
            targets: vec![IGNORE; 2 * columns],
            positions: (0..2).flat_map(|_| 0..columns as u32).collect(),
        };
        for (row, (example, inputs)) in examples.into_iter().zip(inputs).enumerate() {
            let (start, ids) = (row * columns, example.ids());
            batch.ids[start..start + inputs].copy_from_slice(&ids[..inputs]);
            for at in example.trained_in(1..inputs + 1).flatten() {
                batch.targets[start + at - 1] = ids[at] as i32;
            }
        }
        batch
    }
}
