//! From files to rows that can be trained on, with a report of what became of every record.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::audit::{AuditMode, Finding, Side};
use super::columns::Columns;
use super::divided::Divided;
use super::few::Few;
use super::formats::Frames;
use super::near::NearTexts;
use super::pack::{Layout, Packed, Packing};
use super::reader::Files;
use super::record::{Digest, Item, Reason, Record};
use super::split::{Split, SplitPlan};
use super::swaps::{Swap, swaps};
use super::terms::Terms;
use super::tokenizer::Tokenizer;
use super::whole::spelled;
use crate::error::{Error, Result};

/// Skipped records that a report names; the others are only counted.
const REPORTED_SKIPS: usize = 20;
/// Different reasons that are counted.
const COUNTED_REASONS: usize = 100;

/// The settings of a run that concern its data; other settings beside them are passed over.
#[derive(Debug, Clone, Deserialize)]
pub struct DataConfig {
    /// Files and folders to train on.
    pub data: Vec<PathBuf>,
    /// Fraction of the records held out, where `heldout_data` names no files.
    pub heldout: f64,
    #[serde(default)]
    pub heldout_data: Vec<PathBuf>,
    /// Fraction of the records kept for a last test, where `test_data` names no files; 0 for none.
    #[serde(default)]
    pub test: f64,
    #[serde(default)]
    pub test_data: Vec<PathBuf>,
    /// Whether each side gets its part of every label.
    #[serde(default)]
    pub stratify: bool,
    /// Similarity from which texts stay on one side (see [`super::near`]); 0 for exact duplicates alone.
    #[serde(default)]
    pub near_duplicates: f64,
    #[serde(flatten)]
    pub columns: Columns,
    /// Tables in memory, by the names that stand for them among the files.
    #[serde(skip)]
    pub frames: Frames,
    /// Tokens in a row.
    pub sequence_length: usize,
    pub packing: bool,
    pub seed: u64,
    /// Few-shot: the training records are these alone.
    #[serde(skip)]
    pub few: Option<Few>,
    #[serde(skip, default = "inputs")]
    pub layout: Layout,
    /// What becomes of a run whose data [`super::audit`] finds fault with.
    #[serde(skip)]
    pub audit: AuditMode,
    /// Terms that name groups, which a text is given anew with.
    #[serde(skip)]
    pub terms: Option<Terms>,
}

fn inputs() -> Layout {
    Layout::Inputs
}

impl DataConfig {
    /// How these settings divide records.
    pub(super) fn split_plan(&self) -> SplitPlan {
        SplitPlan {
            how: match self.columns.group_column {
                Some(_) => Split::Group,
                None => Split::Random,
            },
            heldout: self.heldout,
            test: self.test,
            stratify: self.stratify,
            near_duplicates: self.near_similarity(),
            seed: self.seed,
        }
    }

    pub(super) fn near_similarity(&self) -> Option<f64> {
        (self.near_duplicates != 0.0).then_some(self.near_duplicates)
    }
}

/// What became of the records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DataReport {
    /// Records that are on a side.
    pub records: usize,
    pub train_records: usize,
    pub heldout_records: usize,
    /// Records kept for a last test.
    pub test_records: usize,
    /// Tokens a model reads in one pass over the rows, padding not counted.
    pub train_tokens: usize,
    pub heldout_tokens: usize,
    pub test_tokens: usize,
    /// Tokens a model is to predict.
    pub train_targets: usize,
    pub heldout_targets: usize,
    /// UTF-8 bytes of what is predicted of the held-out part, where that is known.
    pub heldout_bytes: Option<usize>,
    pub test_bytes: Option<usize>,
    pub train_rows: usize,
    pub heldout_rows: usize,
    /// Records that lost tokens because they are longer than a row.
    pub truncated: usize,
    /// Records that continue in another row, or further on in the same.
    pub split: usize,
    /// The first records that were left out.
    pub skipped: Vec<Skipped>,
    pub skipped_total: usize,
    /// Every file that was read, folders expanded; those of the held-out and the test side last.
    pub files: Vec<PathBuf>,
    /// What an audit found fault with; empty where none was made.
    pub audit: Vec<Finding>,
    /// SHA-256 of every record read, in order, as hexadecimal digits: equal fingerprints are equal data.
    pub fingerprint: String,
}

/// A record that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    pub file: PathBuf,
    /// Number in the file, from 1; 0 for the whole file.
    pub record: usize,
    pub reason: String,
}

/// Data ready for a run.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub train: Packed,
    pub heldout: Packed,
    /// Where a test side was asked for.
    pub test: Option<Packed>,
    /// The test side's records (or else the held-out side's) with terms swapped, where there are
    /// terms; and how many could not be used.
    pub swaps: (Vec<Swap>, usize),
    pub report: DataReport,
}

/// Reads, splits, tokenises and packs what `config` names.
///
/// # Errors
/// Bad settings, files or columns; data without records, that cannot be split, or without a trained token on one side.
pub fn prepare(config: &DataConfig, tokenizer: &Tokenizer) -> Result<Prepared> {
    let mut divided = Divided::read(config)?;
    let skips = &mut divided.skips;
    let mut truncated = 0;
    let mut split = 0;
    let mut side = |source: &Source, name: &str| {
        let (packing, records) = source.pack(config, tokenizer, skips)?;
        if packing.packed.targets() == 0 {
            return Err(Error::argument(format!(
                "the {name} data have no trained token{}",
                skips.example()
            )));
        }
        truncated += packing.truncated;
        split += packing.split;
        let bytes = spelled(&records, packing.truncated);
        Ok((packing.packed, records.len(), bytes))
    };
    let (train, train_records, _) = side(&divided.train, "training")?;
    let (heldout, heldout_records, heldout_bytes) = side(&divided.heldout, "held-out")?;
    let judged = divided.test.as_ref().unwrap_or(&divided.heldout);
    let swaps = config.terms.as_ref().map(|terms| {
        let length = config.sequence_length;
        swaps(judged, terms, tokenizer, length)
    });
    let test = divided.test.as_ref();
    let test = test.map(|source| side(source, "test")).transpose()?;
    let (test, test_records, test_bytes) = match test {
        Some((packed, records, bytes)) => (Some(packed), records, bytes),
        None => (None, 0, None),
    };
    let report = divided.report(&DataReport {
        records: train_records + heldout_records + test_records,
        train_records,
        heldout_records,
        test_records,
        test_tokens: test.as_ref().map_or(0, Packed::tokens),
        test_bytes,
        train_tokens: train.tokens(),
        heldout_tokens: heldout.tokens(),
        train_targets: train.targets(),
        heldout_targets: heldout.targets(),
        heldout_bytes,
        train_rows: train.rows(),
        heldout_rows: heldout.rows(),
        truncated,
        split,
        ..DataReport::default()
    });
    Ok(Prepared {
        train,
        heldout,
        test,
        swaps: swaps.unwrap_or_default(),
        report,
    })
}

/// Records of one side, with the files they came from.
pub(super) struct Source {
    pub(super) paths: Vec<PathBuf>,
    pub(super) records: Vec<Record>,
    /// Of each record.
    pub(super) digests: Vec<Digest>,
}

impl Source {
    pub(super) fn read(paths: &[PathBuf], config: &DataConfig, skips: &mut Skips) -> Result<Self> {
        let mut files = Files::with_frames(paths, &config.columns, &config.frames)?;
        let mut records = Vec::new();
        while let Some(item) = files.next().transpose()? {
            match item {
                Item::Record(record) => records.push(record),
                Item::Skip(skip) => skips.add(&files.paths()[skip.file], skip.number, &skip.reason),
            }
        }
        if records.is_empty() {
            return Err(Error::argument(format!(
                "no record can be used in {}{}",
                listed(paths),
                skips.example()
            )));
        }
        let digests = records.par_iter().map(Record::digest).collect();
        Ok(Self {
            paths: files.paths().to_vec(),
            records,
            digests,
        })
    }

    pub(super) fn side(&self) -> Side<'_> {
        Side {
            paths: &self.paths,
            records: &self.records,
            digests: &self.digests,
        }
    }

    /// The near duplicates among the texts of both sides, where they matter; `heldout`'s records count on behind.
    pub(super) fn near(
        train: &Self,
        heldout: Option<&Self>,
        config: &DataConfig,
    ) -> Result<Option<NearTexts>> {
        let Some(similarity) = config.near_similarity() else {
            return Ok(None);
        };
        let records = train.records.iter();
        let records: Vec<&Record> = records
            .chain(heldout.into_iter().flat_map(|side| &side.records))
            .collect();
        let digests = train.digests.iter();
        let digests: Vec<&Digest> = digests
            .chain(heldout.into_iter().flat_map(|side| &side.digests))
            .collect();
        NearTexts::of_records(&records, &digests, similarity).map(Some)
    }

    /// Feeds every record, in order and after their number, to a fingerprint.
    pub(super) fn hash(&self, hash: &mut Sha256) {
        hash.update((self.records.len() as u64).to_le_bytes());
        for (record, digest) in self.records.iter().zip(&self.digests) {
            hash.update(digest);
            let group = record.group.as_deref().unwrap_or_default();
            for part in std::iter::once(group).chain(record.label.as_deref()) {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
        }
    }

    /// The packed rows, and the records that are in them.
    pub(super) fn pack<'a>(
        &'a self,
        config: &DataConfig,
        tokenizer: &Tokenizer,
        skips: &mut Skips,
    ) -> Result<(Packing, Vec<&'a Record>)> {
        let records: Vec<&Record> = self.records.iter().collect();
        let mut skip = |record: &Record, reason: &Reason| {
            skips.add(&self.paths[record.file], record.number, reason);
        };
        let mut examples = Vec::new();
        let mut kept = Vec::new();
        for (record, example) in records.iter().zip(tokenizer.examples(&records)) {
            match example {
                Ok(example) => {
                    examples.push(example);
                    kept.push(*record);
                }
                Err(reason) => skip(record, &reason),
            }
        }
        let packing = Packing::with_layout(
            examples,
            config.sequence_length,
            config.packing,
            config.seed,
            config.layout,
        )?;
        for &index in &packing.untrained {
            skip(kept[index], &Reason::Untrained(config.sequence_length));
        }
        let untrained: HashSet<usize> = packing.untrained.iter().copied().collect();
        let records = kept.into_iter().enumerate();
        let records = records.filter(|(index, _)| !untrained.contains(index));
        let records = records.map(|(_, record)| record).collect();
        Ok((packing, records))
    }
}

/// Records left out: the first ones and the number of all.
#[derive(Default)]
pub(super) struct Skips {
    pub(super) first: Vec<Skipped>,
    pub(super) total: usize,
    /// How many for each of the first reasons that were met.
    pub(super) reasons: BTreeMap<String, usize>,
}

impl Skips {
    pub(super) fn add(&mut self, file: &std::path::Path, record: usize, reason: &Reason) {
        self.total += 1;
        let reason = reason.to_string();
        if let Some(count) = self.reasons.get_mut(&reason) {
            *count += 1;
        } else if self.reasons.len() < COUNTED_REASONS {
            self.reasons.insert(reason.clone(), 1);
        }
        if self.first.len() < REPORTED_SKIPS {
            self.first.push(Skipped {
                file: file.to_owned(),
                record,
                reason,
            });
        }
    }

    /// For an error: what was skipped, if anything was.
    pub(super) fn example(&self) -> String {
        let Some(skipped) = self.first.last() else {
            return String::new();
        };
        let (file, reason) = (skipped.file.display(), &skipped.reason);
        let place = match skipped.record {
            0 => String::new(),
            number => format!(", record {number}"),
        };
        format!("; {} skipped, such as {file}{place}: {reason}", self.total)
    }
}

pub(super) fn listed(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    names.join(", ")
}
