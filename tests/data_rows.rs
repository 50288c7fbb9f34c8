//! Rows of whole documents, and the order of rows in an epoch.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "engine")]
#![allow(clippy::format_collect, clippy::single_range_in_vec_init)]

mod data_support;

use data_support::{bytes, write};
use ferrotune::data::{
    Batches, DataConfig, Example, IGNORE, Layout, Packing, RowsReport, epoch_order, prepare_rows,
};
use proptest::prelude::*;
use tempfile::tempdir;

proptest! {
    #[test]
    fn rows_hold_every_trained_token_once(
        lengths in prop::collection::vec((2usize..40, 1usize..40), 1..30),
        row_length in 2usize..24,
        packing: bool,
        seed in 0u64..4,
    ) {
        // Token ids say which document and place they are of.
        let examples: Vec<Example> = lengths.iter().enumerate().map(|(document, &(length, start))| {
            let ids = (0..length).map(|place| (document * 100 + place) as u32).collect();
            Example::new(ids, [start.min(length - 1)..length])
        }).collect();
        let layout = Layout::Whole;
        let packing_of = Packing::with_layout(examples.clone(), row_length, packing, seed, layout).unwrap();
        let packed = packing_of.packed;
        let mut trained = Vec::new();
        for row in 0..packed.rows() {
            let tokens: Vec<(u32, i32, u32)> = packed.row_tokens_and_labels(row).collect();
            prop_assert!(tokens.len() <= row_length && tokens.len() == packed.row_tokens(row));
            prop_assert_eq!(tokens[0].2, 0);
            for pair in tokens.windows(2) {
                let begins = pair[1].2 == 0;
                prop_assert!(begins || (pair[1].2 == pair[0].2 + 1 && pair[1].0 == pair[0].0 + 1));
            }
            for (id, label, position) in tokens {
                prop_assert!(label == IGNORE || (label == id as i32 && position > 0));
                trained.extend((label != IGNORE).then_some(id));
            }
            let documents = packed.row_tokens_and_labels(row).filter(|token| token.2 == 0).count();
            prop_assert!(packing || documents == 1);
        }
        prop_assert_eq!(trained.len(), packed.targets());
        trained.sort_unstable();
        let mut all: Vec<u32> = examples.iter().flat_map(|example| {
            let ids = example.ids();
            example.trained().iter().flat_map(|range| ids[range.start as usize..range.end as usize].to_vec()).collect::<Vec<_>>()
        }).collect();
        all.sort_unstable();
        if packing {
            prop_assert_eq!(trained, all);
        } else {
            trained.dedup();
            prop_assert!(trained.len() == packed.targets() && trained.iter().all(|id| all.contains(id)));
        }
    }

    #[test]
    fn an_epochs_order_is_a_permutation(
        lengths in prop::collection::vec(1u32..100, 1..600),
        batch_size in 1usize..9,
        epoch in 0u64..3,
    ) {
        for by_length in [false, true] {
            let mut order = epoch_order(&lengths, batch_size, 7, epoch, by_length);
            prop_assert_eq!(&order, &epoch_order(&lengths, batch_size, 7, epoch, by_length));
            order.sort_unstable();
            prop_assert_eq!(order, (0..lengths.len() as u32).collect::<Vec<_>>());
        }
    }
}

#[test]
fn batches_of_one_length_need_little_padding() {
    let lengths: Vec<u32> = (0..5000u32).map(|row| 1 + row * 7919 % 500).collect();
    let padding = |by_length: bool, epoch: u64| {
        let order = epoch_order(&lengths, 16, 3, epoch, by_length);
        let rows = order.chunks(16).map(|batch| {
            let longest = batch
                .iter()
                .map(|&row| lengths[row as usize])
                .max()
                .unwrap();
            batch
                .iter()
                .map(|&row| longest - lengths[row as usize])
                .sum::<u32>()
        });
        f64::from(rows.sum::<u32>()) / f64::from(lengths.iter().sum::<u32>())
    };
    assert!(padding(false, 0) > 0.6 && padding(true, 0) < 0.05);
    assert_ne!(
        epoch_order(&lengths, 16, 3, 0, true),
        epoch_order(&lengths, 16, 3, 1, true)
    );
    // The batches come in no order of their lengths.
    let order = epoch_order(&lengths, 16, 3, 0, true);
    let firsts: Vec<u32> = order
        .chunks(16)
        .map(|batch| lengths[batch[0] as usize])
        .collect();
    let rising = firsts.windows(2).filter(|pair| pair[0] < pair[1]).count();
    assert!((100..200).contains(&rising), "{rising} of {}", firsts.len());
}

#[test]
fn the_engines_batches_can_be_sorted_by_length() {
    let examples: Vec<Example> = (0..200usize)
        .map(|row| Example::new(vec![1; 2 + row * 31 % 50], [1..60]))
        .collect();
    let packed = Packing::new(examples, 64, false, 1).unwrap().packed;
    let padded = |batches: Batches| {
        let batches = batches.take(20).map(|batch| batch.rows * batch.columns);
        batches.sum::<usize>()
    };
    let sorted = || Batches::by_length(&packed, 10, 5, 0, 0).unwrap();
    assert!(padded(sorted()) * 10 < padded(Batches::new(&packed, 10, 5, 0, 0).unwrap()) * 7);
    let all: Vec<_> = sorted().take(30).collect();
    let later: Vec<_> = Batches::by_length(&packed, 10, 5, 0, 13)
        .unwrap()
        .take(17)
        .collect();
    assert_eq!(all[13..], later);
}

#[test]
fn data_of_which_nothing_is_held_out() {
    let folder = tempdir().unwrap();
    let tokenizer = bytes(folder.path(), None, Some(data_support::EOS));
    let data = write(
        folder.path(),
        "a.txt",
        "One.\n\nTwo and more.\n\n \n\nThree.",
    );
    let settings = serde_json::json!({
        "data": [data], "heldout": 0.0, "sequence_length": 8, "packing": false, "seed": 0,
    });
    let config: DataConfig = serde_json::from_value(settings).unwrap();
    let (rows, heldout, report) = prepare_rows(&config, &tokenizer).unwrap();
    assert!(heldout.is_none());
    let RowsReport::Whole {
        train_records,
        truncated,
        train_tokens,
        ..
    } = report
    else {
        panic!("{report:?}");
    };
    assert_eq!((train_records, truncated, train_tokens), (3, 1, 5 + 8 + 7));
    assert_eq!(rows.offsets.len(), 4);
    assert_eq!(*rows.offsets.last().unwrap() as usize, rows.ids.len());
    let first_tokens = rows.offsets[..3].iter().map(|&at| rows.labels[at as usize]);
    assert!(first_tokens.into_iter().all(|label| label == IGNORE));
}
