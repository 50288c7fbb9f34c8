//! What is wrong with data before a run: checks over all records, each a [`Finding`] with counts and examples.
//!
//! What grows with the number of records: the records themselves, 200 bytes a record for near duplicates, 16 for exact
//! ones, and the words of the labelled records where labels are predicted (at most 200,000 of them). Languages are told
//! for at most 100,000 records. Everything else is a count, and 24 bytes for each record that is found.

mod conflicts;
mod contradictions;
mod corpus;
mod duplicates;
mod encoding;
mod finding;
mod labels;
mod language;
mod leakage;
mod lengths;
mod near;
mod secrets;
mod skipped;
mod tokens;
mod variants;

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::near::NearTexts;
use super::prepare::{DataConfig, Skips, Source};
use super::record::Digest;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use corpus::Corpus;
pub(super) use corpus::Side;
pub use finding::{Example, Finding, Severity};
pub use lengths::Lengths;
use tokens::Rows;
pub use tokens::Tokens;

/// Labels and languages that a report lists.
const LISTED: usize = 100;
/// Examples of a finding at the start of a run.
const SHOWN_IN_RUN: usize = 3;
/// Records times labels up to which a run holds labels against predictions: some seconds.
const PREDICTED_IN_RUN: usize = 400_000;

/// Settings of an audit; every one of them must be named.
#[derive(Debug, Clone, Deserialize)]
pub struct AuditConfig {
    #[serde(flatten)]
    pub data: DataConfig,
    /// Whether labels are held against predictions, which takes longest.
    pub predict_labels: bool,
    /// Examples that a finding shows.
    pub examples: usize,
}

/// How many records something has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Count {
    pub name: String,
    pub records: usize,
}

impl Count {
    fn list<S: AsRef<str>>(counts: &[(S, usize)]) -> Vec<Self> {
        let listed = counts.iter().take(LISTED);
        listed
            .map(|(name, records)| Self {
                name: name.as_ref().to_owned(),
                records: *records,
            })
            .collect()
    }
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuditReport {
    /// Records that can be read, held-out ones too.
    pub records: usize,
    pub heldout_records: usize,
    pub files: Vec<PathBuf>,
    /// In the order of the checks.
    pub findings: Vec<Finding>,
    pub lengths: Lengths,
    /// None without a tokenizer.
    pub tokens: Option<Tokens>,
    /// The first 100, most frequent first.
    pub labels: Vec<Count>,
    pub languages: Vec<Count>,
    /// Of each check that took a tenth of a second or more.
    pub seconds: Vec<(&'static str, f64)>,
}

/// Reads the data and the held-out data and makes every check; those on tokens where there is a tokenizer.
///
/// # Errors
/// As [`super::prepare`]'s for files and settings; data without a record that can be read.
pub fn audit(config: &AuditConfig, tokenizer: Option<&Tokenizer>) -> Result<AuditReport> {
    let mut timer = Timer::new();
    let mut skips = Skips::default();
    let data = &config.data;
    let train = Source::read(&data.data, data, &mut skips)?;
    let heldout = if data.heldout_data.is_empty() {
        None
    } else {
        Some(Source::read(&data.heldout_data, data, &mut skips)?)
    };
    timer.took("reading");
    let heldout = heldout.as_ref().map(Source::side);
    let corpus = Corpus::new(train.side(), heldout, config.examples);
    let digests: Vec<&Digest> = (0..corpus.len())
        .map(|index| corpus.digest(index))
        .collect();
    let near = data
        .near_similarity()
        .map(|similarity| NearTexts::find(&digests, &corpus.texts, similarity))
        .transpose()?;
    drop(digests);
    timer.took("near duplicates");
    let extras = Extras {
        near: near.as_ref(),
        tokenizer,
        predict_labels: config.predict_labels,
    };
    Ok(inspect(&corpus, &skips, data, &extras, timer))
}

/// What some of the checks need.
struct Extras<'a> {
    near: Option<&'a NearTexts>,
    tokenizer: Option<&'a Tokenizer>,
    predict_labels: bool,
}

fn inspect(
    corpus: &Corpus,
    skips: &Skips,
    data: &DataConfig,
    extras: &Extras,
    mut timer: Timer,
) -> AuditReport {
    let mut findings = vec![skipped::check(skips, corpus.len(), corpus.shown)];
    findings.push(duplicates::check(corpus));
    findings.extend(extras.near.map(|near| near::check(corpus, near)));
    findings.extend(leakage::check(corpus, extras.near));
    timer.took("duplicates and leaks");
    let mut tokens = None;
    if let Some(tokenizer) = extras.tokenizer {
        let rows = Rows {
            sequence_length: data.sequence_length,
            packing: data.packing,
        };
        let (found, counted) = tokens::check(corpus, tokenizer, rows);
        findings.extend(found);
        tokens = Some(counted);
        timer.took("tokens");
    }
    let (found, lengths) = lengths::check(corpus);
    findings.push(found);
    findings.push(encoding::check(corpus));
    timer.took("lengths and encodings");
    let (found, languages) = language::check(corpus);
    findings.push(found);
    timer.took("languages");
    findings.push(secrets::check(corpus));
    timer.took("secrets");
    let labels = corpus.labels();
    let wanted = data.columns.label_column.is_some();
    findings.extend(labels::check(corpus, &labels, wanted));
    findings.extend(variants::check(corpus, &labels));
    findings.extend(conflicts::check(corpus, &labels));
    timer.took("labels");
    if extras.predict_labels {
        findings.extend(contradictions::check(corpus, &labels));
        timer.took("predicted labels");
    }
    let mut files = corpus.train.paths.to_vec();
    files.extend(corpus.heldout.iter().flat_map(|side| side.paths).cloned());
    AuditReport {
        records: corpus.len(),
        heldout_records: corpus.heldout.map_or(0, |side| side.records.len()),
        files,
        findings,
        lengths,
        tokens,
        labels: Count::list(&labels),
        languages: Count::list(&languages),
        seconds: timer.seconds,
    }
}

/// What becomes of a run whose data is found fault with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuditMode {
    /// It ends before it begins where training would be meaningless.
    Stop,
    /// It goes on.
    Warn,
    /// No audit is made.
    #[default]
    Off,
}

/// The audit at the start of a run: what it finds fault with. Records without a trained token are counted where the run
/// tokenises them; labels are predicted where records times labels are at most 400,000.
///
/// # Errors
/// [`Error::Argument`] where training would be meaningless and the mode is [`AuditMode::Stop`].
pub(super) fn audit_of_run(
    config: &DataConfig,
    train: Side,
    heldout: Option<Side>,
    near: Option<&NearTexts>,
    skips: &Skips,
) -> Result<Vec<Finding>> {
    if config.audit == AuditMode::Off {
        return Ok(Vec::new());
    }
    let corpus = Corpus::new(train, heldout, SHOWN_IN_RUN);
    let extras = Extras {
        near,
        tokenizer: None,
        predict_labels: corpus.len() * corpus.labels().len() <= PREDICTED_IN_RUN,
    };
    let report = inspect(&corpus, skips, config, &extras, Timer::new());
    let mut findings = report.findings;
    findings.retain(|finding| finding.severity > Severity::Ok);
    let stop = findings
        .iter()
        .find(|finding| finding.severity == Severity::Stop);
    match stop {
        Some(stop) if config.audit == AuditMode::Stop => Err(Error::argument(format!(
            "the audit stops this run: {} To train all the same, set audit to warn.",
            stop.message
        ))),
        _ => Ok(findings),
    }
}

/// What took how long.
struct Timer {
    last: Instant,
    seconds: Vec<(&'static str, f64)>,
}

impl Timer {
    fn new() -> Self {
        Self {
            last: Instant::now(),
            seconds: Vec::new(),
        }
    }

    fn took(&mut self, name: &'static str) {
        let seconds = self.last.elapsed().as_secs_f64();
        if seconds >= 0.1 {
            self.seconds.push((name, seconds));
        }
        self.last = Instant::now();
    }
}
