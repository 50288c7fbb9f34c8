//! From files to rows that can be trained on, with a report of what became of every record.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::audit::{AuditMode, Finding, Side, audit_of_run};
use super::columns::Columns;
use super::formats::Frames;
use super::near::NearTexts;
use super::pack::{Layout, Packed, Packing};
use super::reader::Files;
use super::record::{Digest, Item, Reason, Record};
use super::split::{Split, SplitPlan, divide_by};
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
    /// Whether each side gets its part of every label.
    #[serde(default)]
    pub stratify: bool,
    /// Similarity from which texts stay on one side (see [`super::near`]); 0 for exact duplicates alone.
    #[serde(default)]
    pub near_duplicates: f64,
    #[serde(flatten)]
    pub columns: Columns,
    /// Tables in memory, by the names that stand for them in `data` and `heldout_data`.
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
}

/// A draw of few training records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Few {
    /// Records of each label; of all together where records have no labels.
    pub shots: usize,
    pub seed: u64,
}

fn inputs() -> Layout {
    Layout::Inputs
}

impl DataConfig {
    /// How these settings divide records, with a test side of `test`.
    pub(super) fn split_plan(&self, test: f64) -> SplitPlan {
        SplitPlan {
            how: match self.columns.group_column {
                Some(_) => Split::Group,
                None => Split::Random,
            },
            heldout: self.heldout,
            test,
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
    /// Records that are trained on or held out.
    pub records: usize,
    pub train_records: usize,
    pub heldout_records: usize,
    /// Tokens a model reads in one pass over the rows, padding not counted.
    pub train_tokens: usize,
    pub heldout_tokens: usize,
    /// Tokens a model is to predict.
    pub train_targets: usize,
    pub heldout_targets: usize,
    /// UTF-8 bytes of what is predicted of the held-out part, where that is known.
    pub heldout_bytes: Option<usize>,
    pub train_rows: usize,
    pub heldout_rows: usize,
    /// Records that lost tokens because they are longer than a row.
    pub truncated: usize,
    /// Records that continue in another row, or further on in the same.
    pub split: usize,
    /// The first records that were left out.
    pub skipped: Vec<Skipped>,
    pub skipped_total: usize,
    /// Every file that was read, folders expanded; the held-out ones last.
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
    pub report: DataReport,
}

/// The records of both sides, read, audited and divided.
pub(super) struct Divided {
    pub train: Source,
    pub heldout: Source,
    pub skips: Skips,
    files: Vec<PathBuf>,
    audit: Vec<Finding>,
    fingerprint: Sha256,
}

impl Divided {
    /// # Errors
    /// Bad settings, files or columns; data without records, or that cannot be split.
    pub fn read(config: &DataConfig) -> Result<Self> {
        let mut skips = Skips::default();
        let mut fingerprint = Sha256::new();
        let mut train = Source::read(&config.data, config, &mut skips)?;
        train.hash(&mut fingerprint);
        let mut files = train.paths.clone();
        let heldout = if config.heldout_data.is_empty() {
            None
        } else {
            let heldout = Source::read(&config.heldout_data, config, &mut skips)?;
            heldout.hash(&mut fingerprint);
            files.extend_from_slice(&heldout.paths);
            Some(heldout)
        };
        let near = Source::near(&train, heldout.as_ref(), config)?;
        let held = heldout.as_ref().map(Source::side);
        let audit = audit_of_run(config, train.side(), held, near.as_ref(), &skips)?;
        let heldout = if let Some(heldout) = heldout {
            train.remove(&heldout, near.as_ref(), &mut skips);
            if train.records.is_empty() {
                return Err(Error::argument(format!(
                    "every record of {} is in the held-out data as well{}",
                    listed(&config.data),
                    skips.example()
                )));
            }
            heldout
        } else {
            train.split(config, near.as_ref())?
        };
        if let Some(few) = config.few {
            train.draw(few)?;
        }
        Ok(Self {
            train,
            heldout,
            skips,
            files,
            audit,
            fingerprint,
        })
    }

    /// The report, with what a caller measured in `counts` (whose skips, files, audit and
    /// fingerprint are filled in here).
    pub fn report(self, counts: &DataReport) -> DataReport {
        DataReport {
            skipped: self.skips.first,
            skipped_total: self.skips.total,
            files: self.files,
            audit: self.audit,
            fingerprint: format!("{:x}", self.fingerprint.finalize()),
            ..counts.clone()
        }
    }
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
    let report = divided.report(&DataReport {
        records: train_records + heldout_records,
        train_records,
        heldout_records,
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

    /// Takes the held-out records out.
    fn split(&mut self, config: &DataConfig, near: Option<&NearTexts>) -> Result<Self> {
        let plan = config.split_plan(0.0);
        let sides = divide_by(&self.records, &self.digests, &plan, near)?;
        let mut held = vec![false; self.records.len()];
        for &index in &sides.heldout {
            held[index] = true;
        }
        Ok(self.extract(&held))
    }

    /// Leaves [`Few::shots`] different texts of each label: those whose hash with the seed is lowest, whatever the
    /// order of the files.
    fn draw(&mut self, few: Few) -> Result<()> {
        let mut of_label: BTreeMap<Option<&str>, BTreeMap<[u8; 32], usize>> = BTreeMap::new();
        for (at, (record, digest)) in self.records.iter().zip(&self.digests).enumerate() {
            let mut hash = Sha256::new();
            hash.update(few.seed.to_le_bytes());
            hash.update(digest);
            let label = of_label.entry(record.label.as_deref()).or_default();
            label.entry(hash.finalize().into()).or_insert(at);
        }
        let labelled = of_label.keys().any(Option::is_some);
        let mut left_out = vec![true; self.records.len()];
        for (label, ranked) in &of_label {
            if labelled && label.is_none() {
                continue;
            }
            if ranked.len() < few.shots {
                let whose = label.map_or_else(String::new, |label| format!(" of label '{label}'"));
                return Err(Error::argument(format!(
                    "shots is {}, but there are {} different training records{whose}; give fewer shots, or more data",
                    few.shots,
                    ranked.len()
                )));
            }
            for &at in ranked.values().take(few.shots) {
                left_out[at] = false;
            }
        }
        self.extract(&left_out);
        Ok(())
    }

    /// Moves the records marked in `taken` into a source of their own.
    fn extract(&mut self, taken: &[bool]) -> Self {
        let mut other = Self {
            paths: self.paths.clone(),
            records: Vec::new(),
            digests: Vec::new(),
        };
        let records = std::mem::take(&mut self.records);
        let digests = std::mem::take(&mut self.digests);
        for ((record, digest), &taken) in records.into_iter().zip(digests).zip(taken) {
            let to = if taken { &mut other } else { &mut *self };
            to.records.push(record);
            to.digests.push(digest);
        }
        other
    }

    /// Drops what would leak into `heldout`: its texts, what nearly is one of them, and its groups.
    fn remove(&mut self, heldout: &Self, near: Option<&NearTexts>, skips: &mut Skips) {
        let texts: HashSet<&Digest> = heldout.digests.iter().collect();
        let held = heldout.records.iter();
        let groups: HashSet<&str> = held.filter_map(|record| record.group.as_deref()).collect();
        let near = near.map_or_else(HashMap::new, |near| self.leaking(heldout, near));
        let mut leaks = vec![false; self.records.len()];
        for (index, record) in self.records.iter().enumerate() {
            let group = record
                .group
                .as_deref()
                .filter(|group| groups.contains(group));
            let reason = if texts.contains(&self.digests[index]) {
                Reason::HeldOutText
            } else if let Some(similarity) = near.get(&self.digests[index]) {
                Reason::HeldOutNear(format!("{:.0} %", similarity * 100.0))
            } else if let Some(group) = group {
                Reason::HeldOutGroup(group.to_owned())
            } else {
                continue;
            };
            leaks[index] = true;
            skips.add(&self.paths[record.file], record.number, &reason);
        }
        self.extract(&leaks);
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

    /// The texts that are near duplicates of one in `heldout`, or hang together with one, with the similarity that joins
    /// them to it.
    fn leaking(&self, heldout: &Self, near: &NearTexts) -> HashMap<Digest, f64> {
        let digest = |place: usize| match near.records[place].checked_sub(self.digests.len()) {
            Some(held) => heldout.digests[held],
            None => self.digests[near.records[place]],
        };
        let held: HashSet<&Digest> = heldout.digests.iter().collect();
        let mut union = near.union();
        let mut held_roots = HashSet::new();
        for place in 0..near.records.len() {
            if held.contains(&digest(place)) {
                held_roots.insert(union.root(place));
            }
        }
        let mut found = HashMap::new();
        for pair in &near.pairs {
            if held_roots.contains(&union.root(pair.first)) {
                for place in [pair.first, pair.second] {
                    found.entry(digest(place)).or_insert(pair.similarity);
                }
            }
        }
        found
    }

    /// Feeds every record, in order and after their number, to a fingerprint.
    fn hash(&self, hash: &mut Sha256) {
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

fn listed(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    names.join(", ")
}
