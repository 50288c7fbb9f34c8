//! What a split promises, on any data.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]

mod data_support;

use std::collections::{BTreeSet, HashSet};

use data_support::text;
use ferrotune::data::{Content, Digest, Record, Sides, Split, split};
use ferrotune::error::Result;
use proptest::prelude::*;

fn digests(records: &[Record]) -> Vec<Digest> {
    records.iter().map(Record::digest).collect()
}

fn divide(records: &[Record], how: Split, fraction: f64, seed: u64) -> Result<Sides> {
    split(records, &digests(records), how, fraction, seed)
}

fn grouped(content: u32, group: u32) -> Record {
    Record {
        label: None,
        group: Some(format!("group {group}")),
        ..text(&format!("text {content}"))
    }
}

/// The contents of the records held out.
fn held(records: &[Record], sides: &Sides) -> BTreeSet<Digest> {
    sides
        .heldout
        .iter()
        .map(|&index| records[index].digest())
        .collect()
}

fn shared<K: std::hash::Hash + Eq>(
    records: &[Record],
    sides: &Sides,
    key: impl Fn(&Record) -> K,
) -> bool {
    let train: HashSet<K> = sides
        .train
        .iter()
        .map(|&index| key(&records[index]))
        .collect();
    sides
        .heldout
        .iter()
        .any(|&index| train.contains(&key(&records[index])))
}

proptest! {
    #[test]
    fn no_text_and_no_group_is_on_both_sides(
        pairs in prop::collection::vec((0u32..40, 0u32..12), 2..120),
        fraction in 0.01f64..0.99,
        seed: u64,
        by_group: bool,
    ) {
        let records: Vec<Record> = pairs.iter().map(|&(content, group)| grouped(content, group)).collect();
        let how = if by_group { Split::Group } else { Split::Random };
        let Ok(sides) = divide(&records, how, fraction, seed) else {
            // Refused only where nothing could be divided.
            prop_assert!(by_group || records.iter().all(|record| record.content == records[0].content));
            return Ok(());
        };
        prop_assert!(!sides.train.is_empty() && !sides.heldout.is_empty());
        let mut all: Vec<usize> = sides.train.iter().chain(&sides.heldout).copied().collect();
        all.sort_unstable();
        prop_assert_eq!(all, (0..records.len()).collect::<Vec<_>>());
        prop_assert!(!shared(&records, &sides, Record::digest));
        if by_group {
            prop_assert!(!shared(&records, &sides, |record| record.group.clone()));
        }
    }

    #[test]
    fn the_order_of_the_records_plays_no_part(
        contents in prop::collection::vec(0u32..1000, 2..100).prop_shuffle(),
        seed: u64,
        by_group: bool,
    ) {
        let how = if by_group { Split::Group } else { Split::Random };
        let records: Vec<Record> = contents.iter().map(|&content| grouped(content, content % 7)).collect();
        let reversed: Vec<Record> = records.iter().rev().cloned().collect();
        match (divide(&records, how, 0.2, seed), divide(&reversed, how, 0.2, seed)) {
            (Ok(one), Ok(other)) => prop_assert_eq!(held(&records, &one), held(&reversed, &other)),
            (one, other) => prop_assert!(one.is_err() && other.is_err()),
        }
    }
}

#[test]
fn the_fraction_is_kept_to_the_record() {
    let records: Vec<Record> = (0..1000)
        .map(|index| text(&format!("text {index}")))
        .collect();
    for (fraction, count) in [
        (0.1, 100),
        (0.005, 5),
        (0.0001, 1),
        (0.9999, 999),
        (0.5, 500),
    ] {
        let sides = divide(&records, Split::Random, fraction, 1).unwrap();
        assert_eq!(sides.heldout.len(), count);
    }
    let groups: Vec<Record> = (0..1000).map(|index| grouped(index, index % 50)).collect();
    let sides = divide(&groups, Split::Group, 0.1, 1).unwrap();
    assert_eq!(sides.heldout.len(), 100);
}

#[test]
fn seeds_give_different_sides_and_new_records_move_few() {
    let records: Vec<Record> = (0..1000)
        .map(|index| text(&format!("text {index}")))
        .collect();
    let one = held(&records, &divide(&records, Split::Random, 0.2, 1).unwrap());
    let other = held(&records, &divide(&records, Split::Random, 0.2, 2).unwrap());
    let common = one.intersection(&other).count();
    assert!((15..75).contains(&common), "{common} of 200 in common");

    let more: Vec<Record> = (0..1010)
        .map(|index| text(&format!("text {index}")))
        .collect();
    let later = held(&more, &divide(&more, Split::Random, 0.2, 1).unwrap());
    assert!(one.intersection(&later).count() >= 190);
}

#[test]
fn the_sides_do_not_depend_on_the_threads() {
    let records: Vec<Record> = (0..500)
        .map(|index| grouped(index % 300, index % 40))
        .collect();
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| divide(&records, Split::Random, 0.3, 9).unwrap())
    };
    assert_eq!(on(1), on(3));
}

/// A split that changed between versions would leak a run's held-out records into the next one's training.
#[test]
fn the_sides_do_not_change() {
    let records: Vec<Record> = (0..12)
        .map(|index| text(&format!("text {index}")))
        .collect();
    assert_eq!(
        divide(&records, Split::Random, 0.25, 42).unwrap().heldout,
        PINNED
    );
}

/// As hashlib in Python ranks them: SHA-256 of the seed (8 bytes, little-endian) and the digest.
const PINNED: [usize; 3] = [0, 3, 10];

#[test]
fn groups_that_share_a_text_stay_together() {
    // Groups 0 and 1 share text 5, 1 and 2 share text 6; group 3 stands alone.
    let records = [
        grouped(5, 0),
        grouped(5, 1),
        grouped(6, 1),
        grouped(6, 2),
        grouped(7, 3),
    ];
    for seed in 0..20 {
        let sides = divide(&records, Split::Group, 0.5, seed).unwrap();
        let alone = sides.heldout == [4] || sides.train == [4];
        assert!(alone, "{sides:?}");
    }
}

#[test]
fn white_space_around_a_text_makes_no_other_text() {
    assert_eq!(text(" a b\n").digest(), text("a b").digest());
    assert_ne!(text("a  b").digest(), text("a b").digest());
    let pair = |prompt: &str, completion: &str| {
        let mut record = text("");
        record.content = Content::Completion {
            prompt: prompt.to_owned(),
            completion: completion.to_owned(),
        };
        record.digest()
    };
    assert_ne!(pair("ab", "c"), pair("a", "bc"));
    assert_ne!(pair("", "a"), text("a").digest());
}

#[test]
fn what_cannot_be_split_says_why() {
    let message = |records: &[Record], how, fraction| {
        divide(records, how, fraction, 0).unwrap_err().to_string()
    };
    let two = [text("a"), text("b")];
    let same = [text("a"), text("a ")];
    let group = [grouped(1, 0), grouped(2, 0)];
    assert!(message(&two[..1], Split::Random, 0.1).contains("there is only one record; give more records, or held-out files of their own with heldout_data"));
    assert!(message(&same, Split::Random, 0.1).contains("all 2 records are the same text"));
    assert!(message(&group, Split::Group, 0.1).contains("all 2 records are of one group"));
    assert!(message(&two, Split::Group, 0.1).contains("has no group"));
    for fraction in [0.0, 1.0, -0.1, f64::NAN] {
        assert!(
            message(&two, Split::Random, fraction).contains("heldout must lie between 0 and 1")
        );
    }
}
