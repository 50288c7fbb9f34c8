//! A training, a held-out and a test side that share no text.
//!
//! Records are gathered into units that must stay together: the records of one text, of texts that are near duplicates,
//! and with [`Split::Group`] the records of one group along with every group that has a text in common. Units are ranked
//! by SHA-256 of the seed and their own content and taken in that order where they bring each label's share closer to
//! what is asked for. So the split depends on the data and the seed alone: not on the machine, the threads or the order
//! of the files, and records that are added later move few others.

use std::collections::{BTreeMap, HashMap};

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::near::NearTexts;
use super::record::{Digest, Record};
use super::union::Union;
use crate::error::{Error, Result};

/// What a split keeps whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Records, and exact duplicates of a text.
    Random,
    /// The groups of [`Record::group`], and exact duplicates of a text.
    Group,
}

/// How records are divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitPlan {
    pub how: Split,
    /// Fraction of the records that is held out.
    pub heldout: f64,
    /// Fraction of the records that is kept for a last test; 0 for none.
    pub test: f64,
    /// Whether each side gets its part of every [`Record::label`].
    pub stratify: bool,
    /// Similarity from which texts stay on one side (see [`super::near`]); `None` for exact duplicates alone.
    pub near_duplicates: Option<f64>,
    pub seed: u64,
}

/// Indices into the records, each side in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sides {
    pub train: Vec<usize>,
    pub heldout: Vec<usize>,
    /// Empty unless it was asked for.
    pub test: Vec<usize>,
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
    let plan = SplitPlan {
        how,
        heldout: fraction,
        test: 0.0,
        stratify: false,
        near_duplicates: None,
        seed,
    };
    divide(records, digests, &plan)
}

/// Divides records by a plan; no side that was asked for is empty.
///
/// The held-out side is chosen first and does not depend on [`SplitPlan::test`].
///
/// # Errors
/// As [`split`]'s; [`Error::Argument`] for fractions that leave nothing to train on, and for fewer units than sides.
pub fn divide(records: &[Record], digests: &[Digest], plan: &SplitPlan) -> Result<Sides> {
    check(plan)?;
    let near = plan.near_duplicates.map(|similarity| {
        let (records, digests): (Vec<_>, Vec<_>) =
            (records.iter().collect(), digests.iter().collect());
        NearTexts::of_records(&records, &digests, similarity)
    });
    divide_by(records, digests, plan, near.transpose()?.as_ref())
}

/// As [`divide`], with the near duplicates that were found among the records.
///
/// # Errors
/// As [`divide`]'s.
pub(super) fn divide_by(
    records: &[Record],
    digests: &[Digest],
    plan: &SplitPlan,
    near: Option<&NearTexts>,
) -> Result<Sides> {
    check(plan)?;
    let unit = units(records, digests, plan, near)?;
    let count = unit.iter().max().map_or(0, |last| last + 1);
    let sides = if plan.test > 0.0 { 3 } else { 2 };
    if count < sides {
        return Err(Error::argument(impossible(records.len(), plan, count)));
    }
    let labels = labels(records, plan.stratify);
    let mut members: Vec<BTreeMap<usize, usize>> = vec![BTreeMap::new(); count];
    // The smallest digest of a unit stands for it, whatever order its records come in.
    let mut keys = vec![Digest::from([0xff; 16]); count];
    for ((&unit, digest), &label) in unit.iter().zip(digests).zip(&labels) {
        *members[unit].entry(label).or_default() += 1;
        keys[unit] = keys[unit].min(*digest);
    }
    let mut order: Vec<([u8; 32], usize)> = keys
        .par_iter()
        .enumerate()
        .map(|(unit, key)| {
            let hash = Sha256::new()
                .chain_update(plan.seed.to_le_bytes())
                .chain_update(key);
            (hash.finalize().into(), unit)
        })
        .collect();
    order.par_sort_unstable();
    let mut order: Vec<usize> = order.into_iter().map(|(_, unit)| unit).collect();

    let mut totals = vec![0; labels.iter().max().map_or(1, |last| last + 1)];
    for &label in &labels {
        totals[label] += 1;
    }
    let heldout = choose(&order, &members, &totals, plan.heldout, sides - 1);
    let mut side = vec![0u8; count];
    for unit in heldout {
        side[unit] = 1;
    }
    if plan.test > 0.0 {
        order.retain(|&unit| side[unit] == 0);
        let test = choose(&order, &members, &totals, plan.test, 1);
        for unit in test {
            side[unit] = 2;
        }
    }
    let mut sides = [Vec::new(), Vec::new(), Vec::new()];
    for (index, &unit) in unit.iter().enumerate() {
        sides[usize::from(side[unit])].push(index);
    }
    let [train, heldout, test] = sides;
    Ok(Sides {
        train,
        heldout,
        test,
    })
}

fn check(plan: &SplitPlan) -> Result<()> {
    let SplitPlan { heldout, test, .. } = *plan;
    if !(heldout > 0.0 && heldout < 1.0) {
        return Err(Error::argument(format!(
            "heldout must lie between 0 and 1 (it is {heldout}): the fraction of the records kept out of training"
        )));
    }
    if !(0.0..1.0).contains(&test) || heldout + test >= 1.0 {
        return Err(Error::argument(format!(
            "test must be at least 0, and heldout and test together below 1 (they are {heldout} and {test}): the rest of the records is trained on"
        )));
    }
    Ok(())
}

/// The unit of each record, numbered in order of appearance.
fn units(
    records: &[Record],
    digests: &[Digest],
    plan: &SplitPlan,
    near: Option<&NearTexts>,
) -> Result<Vec<usize>> {
    let text = numbered(digests.iter());
    let count = text.iter().max().map_or(0, |last| last + 1);
    let mut union = Union::new(count);
    if let Some(near) = near {
        for pair in &near.pairs {
            union.join(
                text[near.records[pair.first]],
                text[near.records[pair.second]],
            );
        }
    }
    if plan.how == Split::Group {
        let mut texts: HashMap<&str, usize> = HashMap::new();
        for (record, &text) in records.iter().zip(&text) {
            let group = record.group.as_deref().ok_or_else(|| {
                Error::argument(format!(
                    "record {} of file {} has no group to be split by",
                    record.number,
                    record.file + 1
                ))
            })?;
            union.join(text, *texts.entry(group).or_insert(text));
        }
    }
    Ok(numbered(text.iter().map(|&text| union.root(text))))
}

/// A number for each record's label, in the labels' order; all 0 where the sides need not be balanced.
fn labels(records: &[Record], stratify: bool) -> Vec<usize> {
    if !stratify {
        return vec![0; records.len()];
    }
    let mut numbers: BTreeMap<Option<&str>, usize> = records
        .iter()
        .map(|record| (record.label.as_deref(), 0))
        .collect();
    numbers
        .values_mut()
        .enumerate()
        .for_each(|(number, value)| *value = number);
    records
        .iter()
        .map(|record| numbers[&record.label.as_deref()])
        .collect()
}

/// The units of one side: those that, in `order`, bring the labels' counts closer to their targets. At least one, and
/// `rest` units at least are left.
fn choose(
    order: &[usize],
    members: &[BTreeMap<usize, usize>],
    totals: &[usize],
    fraction: f64,
    rest: usize,
) -> Vec<usize> {
    let targets = targets(totals, fraction);
    let mut counts = vec![0usize; totals.len()];
    let mut taken = Vec::new();
    for &unit in order {
        if order.len() - taken.len() <= rest {
            break;
        }
        let closer: i64 = members[unit]
            .iter()
            .map(|(&label, &size)| {
                let (count, target) = (counts[label], targets[label]);
                count.abs_diff(target) as i64 - (count + size).abs_diff(target) as i64
            })
            .sum();
        if closer > 0 {
            for (&label, &size) in &members[unit] {
                counts[label] += size;
            }
            taken.push(unit);
        }
    }
    if taken.is_empty() {
        // Every unit is more than twice the target.
        let size = |unit: &&usize| members[**unit].values().sum::<usize>();
        taken.extend(order.iter().min_by_key(size));
    }
    taken
}

/// How many records of each label a side is to have: their part of `fraction` of all, rounded so that the sum fits
/// (largest remainders first, smaller labels before larger ones).
fn targets(totals: &[usize], fraction: f64) -> Vec<usize> {
    let records: usize = totals.iter().sum();
    let sum = ((records as f64 * fraction).round() as usize).clamp(1, records.max(2) - 1);
    let exact: Vec<f64> = totals
        .iter()
        .map(|&total| total as f64 * sum as f64 / records.max(1) as f64)
        .collect();
    let mut targets: Vec<usize> = exact.iter().map(|part| *part as usize).collect();
    let mut by_remainder: Vec<usize> = (0..totals.len()).collect();
    by_remainder.sort_by(|&first, &second| {
        let remainder = |label: usize| exact[label] - exact[label].floor();
        remainder(second)
            .total_cmp(&remainder(first))
            .then(totals[first].cmp(&totals[second]))
    });
    let missing = sum - targets.iter().sum::<usize>();
    for label in by_remainder.into_iter().take(missing) {
        targets[label] += 1;
    }
    targets
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

fn impossible(records: usize, plan: &SplitPlan, units: usize) -> String {
    let near = match plan.near_duplicates {
        Some(_) => " or near duplicates of it",
        None => "",
    };
    let why = match (records, plan.how) {
        (0, _) => "there are no records".to_owned(),
        (1, _) => "there is only one record".to_owned(),
        (_, _) if units > 1 => {
            format!("all {records} records are of {units} texts, for three sides")
        }
        (_, Split::Random) => format!("all {records} records are the same text{near}"),
        (_, Split::Group) => {
            format!("all {records} records are of one group, or of groups that share texts{near}")
        }
    };
    let looser = match plan.near_duplicates {
        Some(_) => ", or let near duplicates apart with near_duplicates = 0",
        None => "",
    };
    format!(
        "the data cannot be split into a training and a held-out part: {why}; give more records, or held-out files of their own with heldout_data{looser}"
    )
}
