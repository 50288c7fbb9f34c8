//! Rows as flat arrays, for PyTorch.

use serde::Serialize;

use super::audit::{AuditMode, Finding, audit_of_run};
use super::pack::{Layout, Packed};
use super::prepare::{DataConfig, DataReport, Skips, Source, prepare};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// The rows of one side, one behind another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    pub ids: Vec<u32>,
    /// The token itself where it is trained, -100 elsewhere; a document's first token is never trained.
    pub labels: Vec<i32>,
    /// Position inside the document; 0 begins one.
    pub positions: Vec<u32>,
    /// Row `i` is `offsets[i]..offsets[i + 1]`.
    pub offsets: Vec<u64>,
}

impl Rows {
    fn new(packed: &Packed) -> Self {
        let tokens = packed.tokens();
        let mut rows = Self {
            ids: Vec::with_capacity(tokens),
            labels: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            offsets: vec![0],
        };
        for row in 0..packed.rows() {
            for (id, label, position) in packed.row_tokens_and_labels(row) {
                rows.ids.push(id);
                rows.labels.push(label);
                rows.positions.push(position);
            }
            rows.offsets.push(rows.ids.len() as u64);
        }
        rows
    }
}

/// What became of data of which nothing is held out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum RowsReport {
    Split(Box<DataReport>),
    Whole {
        train_records: usize,
        train_tokens: usize,
        train_targets: usize,
        train_rows: usize,
        truncated: usize,
        split: usize,
        skipped: Vec<super::prepare::Skipped>,
        skipped_total: usize,
        /// What an audit found fault with; empty where none was made.
        audit: Vec<Finding>,
    },
}

/// As [`prepare`], with rows that hold whole documents; a `heldout` of 0 without files of its own holds nothing out.
///
/// # Errors
/// As [`prepare`]'s.
pub fn prepare_rows(
    config: &DataConfig,
    tokenizer: &Tokenizer,
) -> Result<(Rows, Option<Rows>, RowsReport)> {
    let config = DataConfig {
        layout: Layout::Whole,
        ..config.clone()
    };
    if config.heldout != 0.0 || !config.heldout_data.is_empty() {
        let prepared = prepare(&config, tokenizer)?;
        return Ok((
            Rows::new(&prepared.train),
            Some(Rows::new(&prepared.heldout)),
            RowsReport::Split(Box::new(prepared.report)),
        ));
    }
    let mut skips = Skips::default();
    let source = Source::read(&config.data, &config, &mut skips)?;
    let near = match config.audit {
        AuditMode::Off => None,
        _ => Source::near(&source, None, &config)?,
    };
    let audit = audit_of_run(&config, source.side(), None, near.as_ref(), &skips)?;
    drop(near);
    let (packing, records) = source.pack(&config, tokenizer, &mut skips)?;
    let train_records = records.len();
    let packed = packing.packed;
    if packed.targets() == 0 {
        return Err(Error::argument(format!(
            "the training data have no trained token{}",
            skips.example()
        )));
    }
    let report = RowsReport::Whole {
        train_records,
        train_tokens: packed.tokens(),
        train_targets: packed.targets(),
        train_rows: packed.rows(),
        truncated: packing.truncated,
        split: packing.split,
        skipped: skips.first,
        skipped_total: skips.total,
        audit,
    };
    Ok((Rows::new(&packed), None, report))
}
