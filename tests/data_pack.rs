//! What packed rows and their batches promise, on any documents.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]

use std::collections::HashMap;

use ferrotune::data::{Batch, Batches, Evaluation, Example, IGNORE, Packed, Packing};
use proptest::prelude::*;

/// Documents whose tokens are all different from one another, so that a token says where it came from.
fn documents(shapes: &[(usize, usize)]) -> Vec<Example> {
    let mut next = 1;
    let document = |&(length, masked): &(usize, usize)| {
        let ids: Vec<u32> = (next..next + length as u32).collect();
        next += length as u32;
        Example::new(ids, Some(masked.min(length)..length))
    };
    shapes.iter().map(document).collect()
}

fn pack(examples: &[Example], length: usize, packing: bool) -> Packing {
    Packing::new(examples.to_vec(), length, packing, 3).unwrap()
}

fn all_rows(packed: &Packed) -> Batch {
    packed.batch(&(0..packed.rows() as u32).collect::<Vec<_>>())
}

/// Checks every position of a batch against the documents; returns how often each token was a target.
fn check(batch: &Batch, examples: &[Example]) -> HashMap<u32, usize> {
    let mut place = HashMap::new();
    for (document, example) in examples.iter().enumerate() {
        for (index, id) in example.ids().iter().enumerate() {
            place.insert(*id, (document, index));
        }
    }
    let mut seen = HashMap::new();
    for row in 0..batch.rows {
        let mut previous = None;
        for at in row * batch.columns..(row + 1) * batch.columns {
            let (id, target, position) = (batch.ids[at], batch.targets[at], batch.positions[at]);
            if id == 0 {
                assert_eq!((target, position), (IGNORE, 0));
                continue;
            }
            let (document, index) = place[&id];
            if position > 0 {
                // Inside a document: the token before is the one before in the document, one position back.
                assert_eq!(previous, Some((document, index - 1, position - 1)));
            }
            previous = Some((document, index, position));
            if target != IGNORE {
                assert_eq!(place[&(target as u32)], (document, index + 1));
                *seen.entry(target as u32).or_default() += 1;
            }
        }
    }
    seen
}

fn trained(example: &Example) -> impl Iterator<Item = u32> {
    let indices = example.trained().iter().cloned().flatten();
    indices.map(|index| example.ids()[index as usize])
}

fn shapes() -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((0usize..60, prop_oneof![Just(0usize), 0usize..60]), 0..40)
}

proptest! {
    #[test]
    fn packing_trains_every_token_once(shapes in shapes(), length in 1usize..40) {
        let examples = documents(&shapes);
        let packing = pack(&examples, length, true);
        let packed = &packing.packed;
        let batch = all_rows(packed);
        prop_assert!(batch.columns <= length);
        let seen = check(&batch, &examples);
        prop_assert!(seen.values().all(|&count| count == 1));
        let expected: usize = examples.iter().map(Example::target_count).sum();
        prop_assert_eq!(seen.len(), expected);
        prop_assert!(examples.iter().flat_map(trained).all(|id| seen.contains_key(&id)));
        prop_assert_eq!(packed.targets(), expected);
        prop_assert_eq!(batch.target_count(), expected);
        prop_assert_eq!(packed.tokens(), batch.ids.iter().filter(|&&id| id != 0).count());
        let untrained: Vec<usize> =
            (0..examples.len()).filter(|&index| examples[index].target_count() == 0).collect();
        prop_assert_eq!(&packing.untrained, &untrained);
        // A document that fits into a row is whole: its targets follow position 0.
        let fits = |example: &&Example| example.target_count() > 0 && example.ids().len() - 1 <= length;
        for example in examples.iter().filter(fits) {
            let first = batch.ids.iter().position(|id| *id == example.ids()[0]).unwrap();
            prop_assert_eq!(batch.positions[first], 0);
            let inputs = example.ids().len() - 1;
            prop_assert_eq!(&batch.ids[first..first + inputs], &example.ids()[..inputs]);
        }
    }

    #[test]
    fn without_packing_a_row_is_one_document(shapes in shapes(), length in 1usize..40) {
        let examples = documents(&shapes);
        let packing = pack(&examples, length, false);
        let batch = all_rows(&packing.packed);
        let seen = check(&batch, &examples);
        let kept = |example: &Example| {
            let ids: Vec<u32> = example.ids().iter().take(length + 1).copied().collect();
            trained(example).filter(|id| ids.contains(id)).collect::<Vec<_>>()
        };
        let expected: Vec<Vec<u32>> = examples.iter().map(kept).collect();
        prop_assert!(expected.iter().flatten().all(|id| seen[id] == 1));
        prop_assert_eq!(seen.len(), expected.iter().map(Vec::len).sum::<usize>());
        prop_assert_eq!(batch.rows, expected.iter().filter(|ids| !ids.is_empty()).count());
        prop_assert_eq!(packing.untrained.len(), expected.iter().filter(|ids| ids.is_empty()).count());
        prop_assert_eq!(packing.split, 0);
        for row in 0..batch.rows {
            let positions = &batch.positions[row * batch.columns..(row + 1) * batch.columns];
            let tokens = packing.packed.row_tokens(row);
            prop_assert!(positions[..tokens].iter().enumerate().all(|(index, &position)| index == position as usize));
        }
    }

    #[test]
    fn an_epoch_reads_every_row_once_and_goes_on_from_anywhere(
        count in 1usize..40,
        batch_size in 1usize..7,
        seed: u64,
        start in 0usize..60,
    ) {
        let examples = documents(&vec![(5, 0); count]);
        let packed = pack(&examples, 4, false).packed;
        let mut batches = Batches::new(&packed, batch_size, seed, 0, 0).unwrap();
        let per_epoch = batches.per_epoch();
        for _ in 0..2 {
            let epoch: Vec<Batch> = batches.by_ref().take(per_epoch).collect();
            prop_assert!(epoch[..per_epoch - 1].iter().all(|batch| batch.rows == batch_size));
            let mut firsts: Vec<u32> = epoch.iter().flat_map(|batch| batch.ids.iter().step_by(4)).copied().collect();
            firsts.sort_unstable();
            prop_assert_eq!(firsts, (0..count as u32).map(|index| index * 5 + 1).collect::<Vec<_>>());
        }
        prop_assert_eq!(batches.position(), (2, 0));

        let mut unbroken = Batches::new(&packed, batch_size, seed, 0, 0).unwrap();
        for _ in 0..start {
            unbroken.next_batch();
        }
        let (epoch, index) = unbroken.position();
        let resumed = Batches::new(&packed, batch_size, seed, epoch, index).unwrap();
        for (one, other) in unbroken.zip(resumed).take(2 * per_epoch + 1) {
            prop_assert_eq!(one, other);
        }
    }
}

#[test]
fn long_documents_continue_and_masked_prompts_lose_their_beginning() {
    // Ten inputs in rows of four: 4 + 4 + 2, each from position 0.
    let packing = pack(&documents(&[(11, 0)]), 4, true);
    assert_eq!(
        (packing.split, packing.truncated, packing.packed.rows()),
        (1, 0, 3)
    );
    assert_eq!(packing.packed.tokens(), 10);

    // Tokens 1 to 9 are the prompt, 10 to 12 the completion: what is left is 8 to 11, predicting 10, 11, 12.
    let packing = pack(&documents(&[(12, 9)]), 4, true);
    assert_eq!(
        (packing.split, packing.truncated, packing.packed.rows()),
        (0, 1, 1)
    );
    let batch = packing.packed.batch(&[0]);
    assert_eq!(batch.ids, [8, 9, 10, 11]);
    assert_eq!(batch.targets, [IGNORE, 10, 11, 12]);
    assert_eq!(batch.positions, [0, 1, 2, 3]);

    // The same record alone in its row keeps its beginning, which leaves nothing to train.
    let packing = pack(&documents(&[(12, 9), (12, 3)]), 4, false);
    assert_eq!(
        (packing.truncated, packing.untrained.as_slice()),
        (1, [0].as_slice())
    );
    assert_eq!(packing.packed.batch(&[0]).targets, [IGNORE, IGNORE, 16, 17]);
}

#[test]
fn padding_is_a_document_of_its_own() {
    let packed = pack(&documents(&[(3, 0), (5, 0)]), 8, false).packed;
    let mut batch = packed.batch(&[0, 1]);
    if batch.ids[0] != 1 {
        batch = packed.batch(&[1, 0]);
    }
    assert_eq!(batch.ids, [1, 2, 0, 0, 4, 5, 6, 7]);
    assert_eq!(batch.targets, [2, 3, IGNORE, IGNORE, 5, 6, 7, 8]);
    assert_eq!(batch.positions, [0, 1, 0, 0, 0, 1, 2, 3]);
}

#[test]
fn several_trained_ranges_of_one_document() {
    let example = Example::new((1..=8).collect(), [0..2, 4..5, 7..20]);
    assert_eq!(example.target_count(), 3);
    let packed = pack(&[example], 4, true).packed;
    let batch = all_rows(&packed);
    let mut targets: Vec<i32> = batch
        .targets
        .into_iter()
        .filter(|&target| target != IGNORE)
        .collect();
    targets.sort_unstable();
    assert_eq!(targets, [2, 5, 8]);
}

#[test]
fn rows_are_nearly_full() {
    let mut state = 1u32;
    let shapes: Vec<(usize, usize)> = (0..2000)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (10 + (state >> 16) as usize % 70, 0)
        })
        .collect();
    let packed = pack(&documents(&shapes), 128, true).packed;
    let filled = packed.tokens() as f64 / (packed.rows() * 128) as f64;
    assert!(filled > 0.99, "{filled}");
}

#[test]
fn evaluation_reads_the_first_rows_up_to_its_limit() {
    let packed = pack(&documents(&[(5, 0); 10]), 4, false).packed;
    let rows = |limit| Evaluation::new(&packed, 3, limit).unwrap().rows();
    assert_eq!(
        [rows(None), rows(Some(40)), rows(Some(39)), rows(Some(1))],
        [10, 10, 9, 1]
    );
    let batches: Vec<Batch> = Evaluation::new(&packed, 3, None).unwrap().collect();
    assert_eq!(
        batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(),
        [3, 3, 3, 1]
    );
    let again: Vec<Batch> = Evaluation::new(&packed, 3, None).unwrap().collect();
    assert_eq!(batches, again);
    assert_eq!(Evaluation::new(&packed, 3, None).unwrap().len(), 4);
    // The rows are not in the documents' order: the first ones are a sample of all.
    assert_ne!(
        all_rows(&packed).ids,
        (1..50).filter(|id| id % 5 > 0).collect::<Vec<u32>>()
    );
}

#[test]
fn impossible_sizes() {
    let examples = documents(&[(5, 0)]);
    let message = Packing::new(examples.clone(), 0, true, 0)
        .unwrap_err()
        .to_string();
    assert_eq!(message, "sequence_length must be at least 1 token");
    let packed = pack(&examples, 4, true).packed;
    let failed = |batch_size, index| {
        Batches::new(&packed, batch_size, 0, 0, index)
            .err()
            .unwrap()
            .to_string()
    };
    assert_eq!(failed(0, 0), "batch_size must be at least 1 row");
    assert!(failed(1, 1).contains("1 micro-batches an epoch and cannot be read on from number 1"));
    let empty = pack(&[], 4, true).packed;
    assert!(Batches::new(&empty, 1, 0, 0, 0).is_err());
    assert!(Evaluation::new(&packed, 0, None).is_err());
    assert_eq!(Evaluation::new(&empty, 2, None).unwrap().count(), 0);
}
