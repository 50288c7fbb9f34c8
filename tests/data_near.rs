//! Near duplicates: what is found, with which recall, and that they never part in a split.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]
#![allow(clippy::format_collect, clippy::single_range_in_vec_init)]

mod data_support;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use data_support::text;
use ferrotune::data::near::{Bands, jaccard, pairs, shingles};
use ferrotune::data::{Content, Digest, Record, Sides, Split, SplitPlan, divide};
use ferrotune::error::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

fn random(seed: u64) -> impl FnMut(usize) -> usize {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    move |bound| (generator.next_u64() % bound as u64) as usize
}

/// A text of words of which no two need be alike.
fn words(count: usize, random: &mut impl FnMut(usize) -> usize) -> Vec<String> {
    let mut word = || {
        let length = 2 + random(7);
        (0..length)
            .map(|_| char::from(b'a' + random(26) as u8))
            .collect()
    };
    (0..count).map(|_| word()).collect()
}

/// 300 families: a text, and copies in which more and more words are changed.
fn families() -> Vec<String> {
    let mut random = random(3);
    let mut texts = Vec::new();
    for family in 0..300 {
        let original = words(12 + family % 40, &mut random);
        texts.push(original.join(" "));
        for changes in [1, 2, 3, 5, 8] {
            let mut copy = original.clone();
            for _ in 0..changes {
                let at = random(copy.len());
                copy[at] = words(1, &mut random).remove(0);
            }
            texts.push(copy.join(" "));
        }
    }
    texts.sort();
    texts
}

/// Members of each group that hangs together, from pairs.
fn groups(count: usize, pairs: impl IntoIterator<Item = (usize, usize)>) -> Vec<usize> {
    let mut group: Vec<usize> = (0..count).collect();
    for (first, second) in pairs {
        let (from, to) = (
            group[first].max(group[second]),
            group[first].min(group[second]),
        );
        group
            .iter_mut()
            .filter(|group| **group == from)
            .for_each(|group| *group = to);
    }
    group
}

#[test]
fn what_is_found_is_alike_and_nearly_all_of_it_is_found() {
    let texts = families();
    let sets: Vec<Vec<u32>> = texts.iter().map(|text| shingles(text)).collect();
    for similarity in [0.6, 0.8, 0.9] {
        let mut alike = Vec::new();
        for first in 0..texts.len() {
            for second in first + 1..texts.len() {
                if jaccard(&sets[first], &sets[second]) >= similarity {
                    alike.push((first, second));
                }
            }
        }
        let found = pairs(&texts, similarity).unwrap();
        for pair in &found {
            let exact = jaccard(&sets[pair.first], &sets[pair.second]);
            assert!(exact >= similarity && exact == pair.similarity);
        }
        let group = groups(
            texts.len(),
            found.iter().map(|pair| (pair.first, pair.second)),
        );
        let together = alike
            .iter()
            .filter(|(first, second)| group[*first] == group[*second]);
        let recall = together.count() as f64 / alike.len() as f64;
        println!(
            "similarity {similarity}: {} pairs, recall {recall:.4}",
            alike.len()
        );
        assert!(
            alike.len() > 150 && recall >= 0.99,
            "{similarity}: {recall}"
        );
        // And no group is larger than the pairs make it.
        let whole = groups(texts.len(), alike.iter().copied());
        assert!(
            found
                .iter()
                .all(|pair| whole[pair.first] == whole[pair.second])
        );
    }
}

#[test]
fn bands_state_what_they_find() {
    let bands = Bands::for_similarity(0.8);
    assert!(bands.recall(0.8) >= 0.999 && bands.recall(0.9) > 0.9999 && bands.recall(0.4) < 0.2);
}

#[test]
fn the_threads_play_no_part() {
    let texts = families();
    let found = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| pairs(&texts, 0.8).unwrap())
    };
    let one = found(1);
    assert!(!one.is_empty());
    assert_eq!(one, found(2));
    assert_eq!(one, found(7));
}

#[test]
fn many_texts_of_one_form() {
    // A bucket of thousands of texts costs no more than its representatives.
    let texts: Vec<String> = (0..20_000)
        .map(|number| {
            format!("Translate the following sentence into French, please: number {number:05}")
        })
        .collect();
    let found = pairs(&texts, 0.8).unwrap();
    assert!(found.len() > 19_000, "{}", found.len());
    assert!(pairs(&["", " .", "!"], 0.8).unwrap().is_empty());
    for similarity in [0.0, -1.0, 1.5, f64::NAN] {
        let error = pairs(&["a", "b"], similarity).unwrap_err().to_string();
        assert!(
            error.contains("near_duplicates must lie above 0"),
            "{error}"
        );
    }
}

fn plan() -> SplitPlan {
    SplitPlan {
        how: Split::Random,
        heldout: 0.2,
        test: 0.1,
        stratify: true,
        near_duplicates: Some(0.8),
        seed: 5,
    }
}

fn divided(records: &[Record], plan: &SplitPlan) -> Result<Sides> {
    let digests: Vec<Digest> = records.iter().map(Record::digest).collect();
    divide(records, &digests, plan)
}

/// Families of near duplicates under four labels, one of them very rare.
fn labelled() -> Vec<Record> {
    let label = |index: usize| match index % 20 {
        0..12 => "common",
        12..18 => "less",
        18 => "rare",
        _ if index.is_multiple_of(7) => "very rare",
        _ => "common",
    };
    let texts = families();
    let records = texts.iter().enumerate().map(|(index, content)| Record {
        label: Some(label(index).to_owned()),
        number: index + 1,
        ..text(content)
    });
    records.collect()
}

fn content(record: &Record) -> &str {
    match &record.content {
        Content::Text(text) => text,
        other => panic!("no text: {other:?}"),
    }
}

#[test]
fn near_duplicates_are_on_one_side() {
    let records = labelled();
    let sides = divided(&records, &plan()).unwrap();
    let mut side = vec![0; records.len()];
    for (number, indices) in [&sides.train, &sides.heldout, &sides.test]
        .iter()
        .enumerate()
    {
        indices.iter().for_each(|&index| side[index] = number);
    }
    assert_eq!(
        sides.train.len() + sides.heldout.len() + sides.test.len(),
        records.len()
    );
    let texts: Vec<&str> = records.iter().map(content).collect();
    let found = pairs(&texts, 0.8).unwrap();
    // The pairs in another order of the texts: the bands may have missed one of them there.
    let parted = found
        .iter()
        .filter(|pair| side[pair.first] != side[pair.second]);
    assert!(parted.count() * 100 <= found.len());
    let apart = divided(
        &records,
        &SplitPlan {
            near_duplicates: None,
            ..plan()
        },
    )
    .unwrap();
    let apart: BTreeSet<usize> = apart.train.into_iter().collect();
    assert!(
        found
            .iter()
            .any(|pair| apart.contains(&pair.first) != apart.contains(&pair.second))
    );
}

#[test]
fn every_side_has_its_part_of_every_label() {
    let records = labelled();
    let count = |indices: &[usize]| {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for &index in indices {
            *counts
                .entry(records[index].label.as_deref().unwrap())
                .or_default() += 1;
        }
        counts
    };
    let all: Vec<usize> = (0..records.len()).collect();
    let exact = SplitPlan {
        near_duplicates: None,
        ..plan()
    };
    for (plan, tolerance) in [(exact, 1.0), (plan(), 6.0)] {
        let sides = divided(&records, &plan).unwrap();
        for (label, total) in count(&all) {
            for (indices, fraction) in [(&sides.heldout, 0.2), (&sides.test, 0.1)] {
                let found = count(indices).get(label).copied().unwrap_or(0) as f64;
                let wanted = total as f64 * fraction;
                assert!(
                    (found - wanted).abs() <= tolerance,
                    "{label}: {found} of {wanted}"
                );
            }
        }
    }
    // Without it, the labels come as they fall.
    let loose = divided(
        &records,
        &SplitPlan {
            stratify: false,
            near_duplicates: None,
            ..plan()
        },
    )
    .unwrap();
    assert_ne!(loose.heldout, divided(&records, &exact).unwrap().heldout);
    assert_eq!(loose.heldout.len(), records.len() / 5);
}

#[test]
fn order_threads_and_the_test_side_do_not_move_the_held_out_side() {
    let records = labelled();
    let held = |records: &[Record], sides: &Sides| -> BTreeSet<String> {
        sides
            .heldout
            .iter()
            .map(|&index| content(&records[index]).to_owned())
            .collect()
    };
    let sides = divided(&records, &plan()).unwrap();
    let expected = held(&records, &sides);
    let mut reversed = records.clone();
    reversed.reverse();
    assert_eq!(
        held(&reversed, &divided(&reversed, &plan()).unwrap()),
        expected
    );
    let without = divided(
        &records,
        &SplitPlan {
            test: 0.0,
            ..plan()
        },
    )
    .unwrap();
    assert_eq!(held(&records, &without), expected);
    assert!(without.test.is_empty());
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        assert_eq!(pool.install(|| divided(&records, &plan()).unwrap()), sides);
    }
    let other = divided(&records, &SplitPlan { seed: 6, ..plan() }).unwrap();
    assert_ne!(held(&records, &other), expected);
}

#[test]
fn groups_hold_their_near_duplicates_together() {
    let mut records = labelled();
    for (index, record) in records.iter_mut().enumerate() {
        record.group = Some((index / 2).to_string());
    }
    let plan = SplitPlan {
        how: Split::Group,
        ..plan()
    };
    let sides = divided(&records, &plan).unwrap();
    let mut of_group: HashMap<&str, usize> = HashMap::new();
    for (side, indices) in [&sides.train, &sides.heldout, &sides.test]
        .iter()
        .enumerate()
    {
        assert!(!indices.is_empty());
        for &index in *indices {
            let group = records[index].group.as_deref().unwrap();
            assert_eq!(*of_group.entry(group).or_insert(side), side);
        }
    }
}

#[test]
fn fractions_and_data_that_make_no_split() {
    let records: Vec<Record> = ["One text.", "one TEXT", "Another one"].map(text).into();
    let fails = |records: &[Record], plan: SplitPlan, expected: &str| {
        let error = divided(records, &plan).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    fails(
        &records,
        SplitPlan {
            test: 0.8,
            ..plan()
        },
        "heldout and test together below 1",
    );
    fails(
        &records,
        SplitPlan {
            test: f64::NAN,
            ..plan()
        },
        "test must be at least 0",
    );
    fails(
        &records,
        SplitPlan {
            heldout: 0.0,
            ..plan()
        },
        "heldout must lie between 0 and 1",
    );
    fails(
        &records,
        plan(),
        "all 3 records are of 2 texts, for three sides",
    );
    fails(
        &records[..2],
        SplitPlan {
            test: 0.0,
            ..plan()
        },
        "the same text or near duplicates of it",
    );
    fails(&[], plan(), "there are no records");
    let sides = divided(
        &records,
        &SplitPlan {
            test: 0.0,
            ..plan()
        },
    )
    .unwrap();
    assert_eq!((sides.train.len(), sides.heldout.len()), (2, 1));
}
