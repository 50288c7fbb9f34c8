//! A training and a held-out side that share no text.
//!
//! Records are gathered into units that must stay together: the records of one text, and with [`Split::Group`] the
//! records of one group along with every group that has a text in common. Units are ranked by SHA-256 of the seed and
//! their own content and taken in that order, so the split depends on the data and the seed alone: not on the machine,
//! the threads or the order of the files, and records that are added later move few others.

use std::collections::HashMap;

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::record::{Digest, Record};
use crate::error::{Error, Result};

/// What a split keeps whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Records, and exact duplicates of a text.
    Random,
    /// The groups of [`Record::group`], and exact duplicates of a text.
    Group,
}

/// Indices into the records, each side in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sides {
    pub train: Vec<usize>,
    pub heldout: Vec<usize>,
}

/// Holds out the units that bring the held-out side closest to `fraction` of the records; neither side is empty.
///
/// `digests` are those of the records ([`Record::digest`]).
///
/// # Errors
/// [`Error::Argument`] for a fraction outside (0, 1), a record without a group, or records that are all one unit.
pub fn split(
    records: &[Record],
    digests: &[Digest],
    how: Split,
    fraction: f64,
    seed: u64,
) -> Result<Sides> {
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(Error::argument(format!(
            "heldout must lie between 0 and 1 (it is {fraction}): the fraction of the records kept out of training"
        )));
    }
    let unit = match how {
        Split::Random => numbered(digests.iter()),
        Split::Group => groups(records, digests)?,
    };
    let units = unit.iter().max().map_or(0, |last| last + 1);
    if units < 2 {
        return Err(Error::argument(impossible(records.len(), how)));
    }

    let mut sizes = vec![0usize; units];
    // The smallest digest of a unit stands for it, whatever order its records come in.
    let mut keys = vec![Digest::from([0xff; 16]); units];
    for (&unit, digest) in unit.iter().zip(digests) {
        sizes[unit] += 1;
        keys[unit] = keys[unit].min(*digest);
    }
    let mut order: Vec<([u8; 32], usize)> = keys
        .par_iter()
        .enumerate()
        .map(|(unit, key)| {
            let hash = Sha256::new()
                .chain_update(seed.to_le_bytes())
                .chain_update(key);
            (hash.finalize().into(), unit)
        })
        .collect();
    order.par_sort_unstable();

    let held = choose(&order, &sizes, records.len(), fraction);
    let (mut train, mut heldout) = (Vec::new(), Vec::new());
    for (index, &unit) in unit.iter().enumerate() {
        if held[unit] { &mut heldout } else { &mut train }.push(index);
    }
    Ok(Sides { train, heldout })
}

/// Whether each unit is held out.
fn choose(
    order: &[([u8; 32], usize)],
    sizes: &[usize],
    records: usize,
    fraction: f64,
) -> Vec<bool> {
    let target = ((records as f64 * fraction).round() as usize).clamp(1, records - 1);
    let mut held = vec![false; sizes.len()];
    let mut count = 0;
    for &(_, unit) in order {
        let with = count + sizes[unit];
        if with < records && with.abs_diff(target) < count.abs_diff(target) {
            held[unit] = true;
            count = with;
        }
    }
    if count == 0 {
        // Every unit is more than twice the target.
        let smallest = order.iter().min_by_key(|(_, unit)| sizes[*unit]);
        if let Some(&(_, unit)) = smallest {
            held[unit] = true;
        }
    }
    held
}

/// Numbers equal keys alike, from 0 in order of first appearance.
fn numbered<K: std::hash::Hash + Eq>(keys: impl Iterator<Item = K>) -> Vec<usize> {
    let mut numbers = HashMap::new();
    keys.map(|key| {
        let next = numbers.len();
        *numbers.entry(key).or_insert(next)
    })
    .collect()
}

/// The unit of each record: groups joined wherever they share a text.
fn groups(records: &[Record], digests: &[Digest]) -> Result<Vec<usize>> {
    let names = records.iter().map(|record| {
        record.group.as_deref().ok_or_else(|| {
            Error::argument(format!(
                "record {} of file {} has no group to be split by",
                record.number,
                record.file + 1
            ))
        })
    });
    let names: Vec<&str> = names.collect::<Result<_>>()?;
    let group = numbered(names.into_iter());
    let mut parent: Vec<usize> = (0..=group.iter().max().copied().unwrap_or(0)).collect();
    let mut first: HashMap<&Digest, usize> = HashMap::new();
    for (digest, &group) in digests.iter().zip(&group) {
        let other = *first.entry(digest).or_insert(group);
        let (a, b) = (root(&mut parent, group), root(&mut parent, other));
        parent[a.max(b)] = a.min(b);
    }
    Ok(numbered(
        group.iter().map(|&group| root(&mut parent, group)),
    ))
}

fn root(parent: &mut [usize], mut node: usize) -> usize {
    while parent[node] != node {
        parent[node] = parent[parent[node]];
        node = parent[node];
    }
    node
}

fn impossible(records: usize, how: Split) -> String {
    let why = match (records, how) {
        (0, _) => "there are no records".to_owned(),
        (1, _) => "there is only one record".to_owned(),
        (_, Split::Random) => format!("all {records} records are the same text"),
        (_, Split::Group) => {
            format!("all {records} records are of one group, or of groups that share texts")
        }
    };
    format!(
        "the data cannot be split into a training and a held-out part: {why}; give more records, or held-out files of their own with heldout_data"
    )
}
