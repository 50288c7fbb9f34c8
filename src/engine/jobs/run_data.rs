//! The data of a run: what its settings ask for, the labels, and what is said of the records.

use crate::data::{DataConfig, DataReport, Few};
use crate::engine::models::{Architecture, Labels};
use crate::engine::{DataEvent, Skip, TrainConfig};
use crate::error::{Error, Result};

/// The head's classes: the stored head's where they name every label of the data, else the data's;
/// and a warning where a stored head is given up.
pub(super) fn labels(
    architecture: &Architecture,
    train: &[String],
    others: &[(&str, &[String])],
) -> Result<(Labels, Option<String>)> {
    let seen = Labels::fresh(train.iter().cloned());
    let quoted = |names: &[String]| {
        const SHOWN: usize = 10;
        let more = if names.len() > SHOWN { ", …" } else { "" };
        let names: Vec<String> = names.iter().take(SHOWN).map(|n| format!("'{n}'")).collect();
        format!("{}{more}", names.join(", "))
    };
    for (side, given) in others {
        let mut unseen: Vec<String> = given.to_vec();
        unseen.retain(|label| seen.index(label).is_none());
        unseen.sort();
        unseen.dedup();
        if !unseen.is_empty() {
            return Err(Error::argument(format!(
                "the {side} data have labels that the training data never show: {}; hold out other \
                 records, or add some of these labels to the training data",
                quoted(&unseen)
            )));
        }
    }
    if seen.len() < 2 {
        return Err(Error::argument(format!(
            "the training data have one label alone ({}), which leaves nothing to tell apart",
            quoted(&seen.names)
        )));
    }
    match architecture.labels().filter(|stored| !stored.fresh) {
        Some(stored) if seen.names.iter().all(|name| stored.index(name).is_some()) => {
            Ok((stored.clone(), None))
        }
        Some(stored) => {
            let warning = format!(
                "the model's head knows the labels {}, the data have {}: a new head is trained",
                quoted(&stored.names),
                quoted(&seen.names)
            );
            Ok((seen, Some(warning)))
        }
        None => Ok((seen, None)),
    }
}

pub(super) fn data_config(config: &TrainConfig) -> DataConfig {
    DataConfig {
        data: config.data.clone(),
        heldout: config.heldout,
        heldout_data: config.heldout_data.clone(),
        test: config.test,
        test_data: config.test_data.clone(),
        stratify: config.stratify,
        near_duplicates: config.near_duplicates,
        columns: crate::data::Columns {
            text_column: config.text_column.clone(),
            prompt_column: config.prompt_column.clone(),
            completion_column: config.completion_column.clone(),
            messages_column: config.messages_column.clone(),
            label_column: config.label_column.clone(),
            group_column: config.group.clone(),
            bias_column: config.bias_column.clone(),
            whole: false,
        },
        frames: config.frames.clone(),
        sequence_length: config.sequence_length,
        packing: config.packing,
        seed: config.split_seed.unwrap_or(config.seed),
        few: config.shots.map(|shots| Few {
            shots,
            seed: config.seed,
        }),
        layout: crate::data::Layout::Inputs,
        audit: config.audit,
        terms: None,
    }
}

pub(super) fn data_event(report: &DataReport) -> DataEvent {
    DataEvent {
        records: report.records,
        train_records: report.train_records,
        heldout_records: report.heldout_records,
        test_records: report.test_records,
        train_tokens: report.train_tokens,
        heldout_tokens: report.heldout_tokens,
        truncated: report.truncated,
        skipped: report
            .skipped
            .iter()
            .map(|skip| Skip {
                file: skip.file.display().to_string(),
                record: skip.record,
                reason: skip.reason.clone(),
            })
            .collect(),
        skipped_total: report.skipped_total,
        files: report.files.clone(),
    }
}
