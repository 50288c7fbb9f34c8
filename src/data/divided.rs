//! The sides of a run: training, held-out and test records that share no text, near duplicate or group.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use super::audit::{Finding, audit_of_run};
use super::near::NearTexts;
use super::prepare::{DataConfig, DataReport, Skips, Source, listed};
use super::record::{Digest, Reason};
use super::split::{SplitPlan, divide_by};
use crate::error::{Error, Result};

/// The records of all sides, read, audited and divided.
pub(super) struct Divided {
    pub train: Source,
    pub heldout: Source,
    /// Where a test side was asked for.
    pub test: Option<Source>,
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
        let mut files = Vec::new();
        let mut read = |paths: &[PathBuf], skips: &mut Skips| {
            let source = Source::read(paths, config, skips)?;
            source.hash(&mut fingerprint);
            files.extend_from_slice(&source.paths);
            Ok::<_, Error>(source)
        };
        let mut optional = |paths: &[PathBuf], skips: &mut Skips| {
            (!paths.is_empty()).then(|| read(paths, skips)).transpose()
        };
        let mut train = optional(&config.data, &mut skips)?
            .ok_or_else(|| Error::argument("data must be at least one file, not []"))?;
        let mut heldout = optional(&config.heldout_data, &mut skips)?;
        let mut test = optional(&config.test_data, &mut skips)?;
        if let Some(test) = &test {
            for (side, paths) in [
                (Some(&mut train), &config.data),
                (heldout.as_mut(), &config.heldout_data),
            ] {
                let Some(side) = side else { continue };
                let near = Source::near(side, Some(test), config)?;
                side.remove(test, "test", near.as_ref(), &mut skips);
                side.not_empty(paths, "test", &skips)?;
            }
        }
        let near = Source::near(&train, heldout.as_ref(), config)?;
        let held = heldout.as_ref().map(Source::side);
        let audit = audit_of_run(config, train.side(), held, near.as_ref(), &skips)?;
        let heldout = if let Some(heldout) = heldout {
            train.remove(&heldout, "held-out", near.as_ref(), &mut skips);
            train.not_empty(&config.data, "held-out", &skips)?;
            if config.test > 0.0 {
                let plan = SplitPlan {
                    heldout: config.test,
                    test: 0.0,
                    ..config.split_plan()
                };
                let near = Source::near(&train, None, config)?;
                test = Some(train.split(&plan, near.as_ref())?.0);
            }
            heldout
        } else {
            let (heldout, tested) = train.split(&config.split_plan(), near.as_ref())?;
            test = test.or(tested);
            heldout
        };
        if let Some(few) = config.few {
            train.draw(few, config.columns.label(), &mut skips)?;
        }
        Ok(Self {
            train,
            heldout,
            test,
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

impl Source {
    /// Takes the held-out records out, and those of a test side where the plan has one.
    fn split(
        &mut self,
        plan: &SplitPlan,
        near: Option<&NearTexts>,
    ) -> Result<(Self, Option<Self>)> {
        let sides = divide_by(&self.records, &self.digests, plan, near)?;
        let marked = |chosen: &[usize]| {
            let mut marks = vec![false; self.records.len()];
            for &index in chosen {
                marks[index] = true;
            }
            marks
        };
        let (held, mut tested) = (marked(&sides.heldout), marked(&sides.test));
        let heldout = self.extract(&held);
        let mut held = held.into_iter();
        tested.retain(|_| held.next() == Some(false));
        let test = self.extract(&tested);
        Ok((heldout, (!test.records.is_empty()).then_some(test)))
    }

    /// Moves the records marked in `taken` into a source of their own.
    pub(super) fn extract(&mut self, taken: &[bool]) -> Self {
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

    /// Drops what would leak into `kept`, the records of side `name`: its texts, what nearly is one
    /// of them, and its groups.
    fn remove(
        &mut self,
        kept: &Self,
        name: &'static str,
        near: Option<&NearTexts>,
        skips: &mut Skips,
    ) {
        let texts: HashSet<&Digest> = kept.digests.iter().collect();
        let held = kept.records.iter();
        let groups: HashSet<&str> = held.filter_map(|record| record.group.as_deref()).collect();
        let near = near.map_or_else(HashMap::new, |near| self.leaking(kept, near));
        let mut leaks = vec![false; self.records.len()];
        for (index, record) in self.records.iter().enumerate() {
            let group = record
                .group
                .as_deref()
                .filter(|group| groups.contains(group));
            let reason = if texts.contains(&self.digests[index]) {
                Reason::HeldOutText(name)
            } else if let Some(similarity) = near.get(&self.digests[index]) {
                Reason::HeldOutNear(name, format!("{:.0} %", similarity * 100.0))
            } else if let Some(group) = group {
                Reason::HeldOutGroup(name, group.to_owned())
            } else {
                continue;
            };
            leaks[index] = true;
            skips.add(&self.paths[record.file], record.number, &reason);
        }
        self.extract(&leaks);
    }

    /// # Errors
    /// Where all of `paths` went to side `name`.
    fn not_empty(&self, paths: &[PathBuf], name: &str, skips: &Skips) -> Result<()> {
        if !self.records.is_empty() {
            return Ok(());
        }
        Err(Error::argument(format!(
            "every record of {} is in the {name} data as well{}",
            listed(paths),
            skips.example()
        )))
    }

    /// The texts that are near duplicates of one in `kept`, or hang together with one, with the
    /// similarity that joins them to it.
    fn leaking(&self, kept: &Self, near: &NearTexts) -> HashMap<Digest, f64> {
        let digest = |place: usize| match near.records[place].checked_sub(self.digests.len()) {
            Some(held) => kept.digests[held],
            None => self.digests[near.records[place]],
        };
        let held: HashSet<&Digest> = kept.digests.iter().collect();
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
}
