//! The records that are audited, with their texts.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

use rayon::prelude::*;

use super::finding::Example;
use super::secrets;
use crate::data::record::{Digest, Record};

/// Characters of a record that an example shows.
const SHOWN_CHARACTERS: usize = 160;

/// Records of one side as they were read.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub paths: &'a [PathBuf],
    pub records: &'a [Record],
    /// Of each record.
    pub digests: &'a [Digest],
}

/// Records to be trained on and, behind them, held-out ones that have files of their own.
pub struct Corpus<'a> {
    pub train: Side<'a>,
    pub heldout: Option<Side<'a>>,
    /// Everything said in each record; the training side first.
    pub texts: Vec<Cow<'a, str>>,
    /// Examples that a finding shows.
    pub shown: usize,
}

impl<'a> Corpus<'a> {
    pub fn new(train: Side<'a>, heldout: Option<Side<'a>>, shown: usize) -> Self {
        let records = train.records.par_iter();
        let held = heldout.map_or(&[][..], |side| side.records);
        let texts = records
            .chain(held)
            .map(|record| record.content.text())
            .collect();
        Self {
            train,
            heldout,
            texts,
            shown,
        }
    }

    /// Number of records, held-out ones too.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Record `index`, held-out ones behind the others.
    pub fn record(&self, index: usize) -> &'a Record {
        let (side, index) = self.place(index);
        &side.records[index]
    }

    pub fn digest(&self, index: usize) -> &'a Digest {
        let (side, index) = self.place(index);
        &side.digests[index]
    }

    fn place(&self, index: usize) -> (Side<'a>, usize) {
        let train = self.train.records.len();
        match self.heldout {
            Some(side) if index >= train => (side, index - train),
            _ => (self.train, index),
        }
    }

    /// The labelled records of both sides with their labels.
    pub fn labelled(&self) -> impl Iterator<Item = (usize, &'a str)> {
        (0..self.len()).filter_map(|index| Some((index, self.record(index).label.as_deref()?)))
    }

    /// How many records have each label, most frequent first, then by name.
    pub fn labels(&self) -> Vec<(&'a str, usize)> {
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for (_, label) in self.labelled() {
            *counts.entry(label).or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by(|first, second| second.1.cmp(&first.1).then(first.0.cmp(second.0)));
        counts
    }

    /// The beginning of a record.
    pub fn example(&self, index: usize, note: impl Into<String>) -> Example {
        self.example_at(index, 0, note)
    }

    /// A record from a little before byte `at` of its text.
    pub fn example_at(&self, index: usize, at: usize, note: impl Into<String>) -> Example {
        let (side, inner) = self.place(index);
        let record = &side.records[inner];
        Example {
            file: side.paths[record.file].clone(),
            record: record.number,
            text: excerpt(&self.texts[index], at),
            note: note.into(),
        }
    }
}

/// One line of a text from a little before byte `at`, with likely secrets masked.
pub fn excerpt(text: &str, at: usize) -> String {
    let before = text[..at].char_indices().rev().nth(SHOWN_CHARACTERS / 4);
    let start = before.map_or(0, |(start, _)| start);
    // A secret that begins inside the part may end behind it.
    let rest: String = text[start..].chars().take(SHOWN_CHARACTERS * 4).collect();
    let masked = secrets::mask(&rest);
    let words: Vec<&str> = masked.split_whitespace().collect();
    let line = words.join(" ");
    let mut shown: String = line.chars().take(SHOWN_CHARACTERS).collect();
    if start > 0 {
        shown.insert(0, '…');
    }
    if line.chars().nth(SHOWN_CHARACTERS).is_some() || text.len() - start > rest.len() {
        shown.push('…');
    }
    shown
}
