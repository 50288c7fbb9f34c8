//! Labelled texts for a classifier: tokens with the tokenizer's own special tokens, a row a text.

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::batch::{Batch, IGNORE};
use super::divided::Divided;
use super::order::epoch_order;
use super::prepare::{DataConfig, DataReport, Skips, Source};
use super::record::{Content, Reason, Record};
use super::source::BatchSource;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Tokenised texts and their labels' names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Texts {
    /// At least one token each.
    pub ids: Vec<Vec<u32>>,
    pub labels: Vec<String>,
    /// Texts that lost tokens because they are longer than a row.
    pub truncated: usize,
    /// Of each text: the group that the bias column, or else the terms, name.
    pub groups: Vec<Option<String>>,
    /// Of each text with a term: its place and its tokens with the terms swapped.
    pub swapped: Vec<(usize, Vec<u32>)>,
}

/// The sides of a run's labelled data.
#[derive(Debug, Clone)]
pub struct PreparedTexts {
    pub train: Texts,
    pub heldout: Texts,
    /// Where a test side was asked for.
    pub test: Option<Texts>,
    pub report: DataReport,
}

/// Reads, splits and tokenises labelled texts.
///
/// # Errors
/// As [`super::prepare`]'s, and for records that are not texts.
pub fn prepare_texts(config: &DataConfig, tokenizer: &Tokenizer) -> Result<PreparedTexts> {
    let config = labelled(config);
    let mut divided = Divided::read(&config)?;
    let skips = &mut divided.skips;
    let train = texts(&divided.train, &config, tokenizer, skips, "training")?;
    let heldout = texts(&divided.heldout, &config, tokenizer, skips, "held-out")?;
    let test = divided.test.as_ref();
    let test = test.map(|source| texts(source, &config, tokenizer, skips, "test"));
    let test = test.transpose()?;
    let (train_records, heldout_records) = (train.ids.len(), heldout.ids.len());
    let (test_records, test_tokens, test_truncated) = test.as_ref().map_or((0, 0, 0), |test| {
        (test.ids.len(), test.tokens(), test.truncated)
    });
    let report = divided.report(&DataReport {
        records: train_records + heldout_records + test_records,
        train_records,
        heldout_records,
        test_records,
        test_tokens,
        train_tokens: train.tokens(),
        heldout_tokens: heldout.tokens(),
        train_targets: train_records,
        heldout_targets: heldout_records,
        train_rows: train_records,
        heldout_rows: heldout_records,
        truncated: train.truncated + heldout.truncated + test_truncated,
        ..DataReport::default()
    });
    Ok(PreparedTexts {
        train,
        heldout,
        test,
        report,
    })
}

/// Every labelled text of `config.data`, in its order; how many records were left out, and what to tell about them.
///
/// # Errors
/// As [`prepare_texts`]'s.
pub fn prepare_whole_texts(
    config: &DataConfig,
    tokenizer: &Tokenizer,
) -> Result<(Texts, usize, Option<String>)> {
    let config = labelled(config);
    let mut skips = Skips::default();
    let source = Source::read(&config.data, &config, &mut skips)?;
    let found = texts(&source, &config, tokenizer, &mut skips, "given")?;
    let told = found.truncated > 0 || skips.total > 0;
    let warning = told.then(|| {
        let (read, cut) = (found.ids.len(), found.truncated);
        format!(
            "{read} records are read, {cut} of them cut to sequence_length{}",
            skips.example()
        )
    });
    Ok((found, skips.total, warning))
}

/// The same settings with a label that every record must have.
fn labelled(config: &DataConfig) -> DataConfig {
    let mut config = config.clone();
    config.columns.label_column = Some(config.columns.label().to_owned());
    config
}

fn texts(
    source: &Source,
    config: &DataConfig,
    tokenizer: &Tokenizer,
    skips: &mut Skips,
    side: &str,
) -> Result<Texts> {
    let encode = |record: &Record| match &record.content {
        Content::Text(text) => tokenizer.classified(text, config.sequence_length).map(Some),
        _ => Ok(None),
    };
    let encoded: Vec<_> = source.records.par_iter().map(encode).collect();
    let mut found = Texts::default();
    for (record, encoded) in source.records.iter().zip(encoded) {
        let place = &source.paths[record.file];
        match (encoded, &record.label) {
            (Ok(Some((ids, cut))), Some(label)) => {
                found.group(record, config, tokenizer);
                found.ids.push(ids);
                found.labels.push(label.clone());
                found.truncated += usize::from(cut);
            }
            (Ok(Some(_)), None) => {
                let column = config.columns.label().to_owned();
                skips.add(place, record.number, &Reason::Missing(column));
            }
            (Ok(None), _) => {
                return Err(Error::argument(format!(
                    "{}, record {}: classification reads a text with its label, not prompts or \
                     messages; name the columns with text_column and label_column",
                    place.display(),
                    record.number
                )));
            }
            (Err(reason), _) => skips.add(place, record.number, &reason),
        }
    }
    if found.ids.is_empty() {
        return Err(Error::argument(format!(
            "the {side} data have no labelled text{}",
            skips.example()
        )));
    }
    Ok(found)
}

impl Texts {
    /// The texts with swapped terms under the labels of the originals, whose places come first.
    pub fn swapped_texts(&self) -> (Vec<usize>, Self) {
        let places: Vec<usize> = self.swapped.iter().map(|(place, _)| *place).collect();
        let texts = Self {
            ids: self.swapped.iter().map(|(_, ids)| ids.clone()).collect(),
            labels: places.iter().map(|&at| self.labels[at].clone()).collect(),
            ..Self::default()
        };
        (places, texts)
    }

    /// Takes in which group the next text names, and the text with its terms swapped.
    fn group(&mut self, record: &Record, config: &DataConfig, tokenizer: &Tokenizer) {
        let Some(terms) = &config.terms else {
            self.groups.push(record.bias.clone());
            return;
        };
        let text = record.content.text();
        let by_terms = || terms.group(&text).map(|group| terms.names[group].clone());
        self.groups.push(match config.columns.bias_column {
            Some(_) => record.bias.clone(),
            None => by_terms(),
        });
        let swapped = terms.swap(&text);
        let encoded = swapped.and_then(|text| {
            let found = tokenizer.classified(&text, config.sequence_length);
            found.ok()
        });
        let place = self.ids.len();
        self.swapped.extend(encoded.map(|(ids, _)| (place, ids)));
    }

    pub fn tokens(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }
}

/// Texts with the classes' numbers, as batches: rows padded on the right to the longest, each with
/// its class at its last token.
#[derive(Debug, Clone)]
pub struct Labelled {
    ids: Vec<Vec<u32>>,
    classes: Vec<u32>,
}

impl Labelled {
    /// `class` numbers a label.
    ///
    /// # Errors
    /// Whatever `class` returns.
    pub fn new(texts: Texts, class: impl Fn(&str) -> Result<usize>) -> Result<Self> {
        let classes = texts.labels.iter().map(|label| Ok(class(label)? as u32));
        Ok(Self {
            classes: classes.collect::<Result<_>>()?,
            ids: texts.ids,
        })
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    fn batch(&self, rows: &[u32]) -> Batch {
        let rows: Vec<usize> = rows.iter().map(|&row| row as usize).collect();
        let columns = rows.iter().map(|&row| self.ids[row].len()).max();
        let columns = columns.unwrap_or(0);
        let mut batch = Batch {
            rows: rows.len(),
            columns,
            ids: vec![0; rows.len() * columns],
            targets: vec![IGNORE; rows.len() * columns],
            positions: (0..rows.len()).flat_map(|_| 0..columns as u32).collect(),
        };
        for (at, &row) in rows.iter().enumerate() {
            let ids = &self.ids[row];
            batch.ids[at * columns..][..ids.len()].copy_from_slice(ids);
            batch.targets[at * columns + ids.len() - 1] = self.classes[row] as i32;
        }
        batch
    }
}

/// Batches of labelled texts: shuffled epochs for training, or the stored order.
#[derive(Debug, Clone, Copy)]
pub struct LabelledBatches<'a> {
    set: &'a Labelled,
    batch_size: usize,
    /// Seed, and whether a batch has rows of about one length; none for the stored order.
    shuffled: Option<(u64, bool)>,
}

impl<'a> LabelledBatches<'a> {
    /// # Errors
    /// `Argument` for a batch size of 0.
    pub fn new(set: &'a Labelled, batch_size: usize) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::argument("batch_size must be at least 1, not 0"));
        }
        Ok(Self {
            set,
            batch_size,
            shuffled: None,
        })
    }

    pub fn shuffled(self, seed: u64, by_length: bool) -> Self {
        Self {
            shuffled: Some((seed, by_length)),
            ..self
        }
    }
}

impl BatchSource for LabelledBatches<'_> {
    fn batches_per_epoch(&self) -> usize {
        self.set.len().div_ceil(self.batch_size)
    }

    fn batch(&self, epoch: usize, index: usize) -> Result<Batch> {
        let order = match self.shuffled {
            None => (0..self.set.len() as u32).collect(),
            Some((seed, by_length)) => {
                let lengths: Vec<u32> = self.set.ids.iter().map(|ids| ids.len() as u32).collect();
                epoch_order(&lengths, self.batch_size, seed, epoch as u64, by_length)
            }
        };
        let start = (index * self.batch_size).min(order.len());
        let end = (start + self.batch_size).min(order.len());
        Ok(self.set.batch(&order[start..end]))
    }

    fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (ids, class) in self.set.ids.iter().zip(&self.set.classes) {
            hash.update((ids.len() as u64).to_le_bytes());
            hash.update(bytemuck::cast_slice::<u32, u8>(ids));
            hash.update(class.to_le_bytes());
        }
        let order = match self.shuffled {
            None => String::new(),
            Some((seed, by_length)) => {
                let how = if by_length { " by length" } else { "" };
                format!(" from {seed}{how}")
            }
        };
        format!("{:x} by {}{order}", hash.finalize(), self.batch_size)
    }
}
