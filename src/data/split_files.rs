//! A data set divided into files: train.jsonl, heldout.jsonl and test.jsonl.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::prepare::{DataConfig, Skipped, Skips, Source};
use super::record::{Content, Record};
use super::split::divide;
use crate::error::{Error, Result};
use crate::file::write_atomic;

/// Settings of a division; every one of them must be named.
#[derive(Debug, Clone, Deserialize)]
pub struct SplitConfig {
    #[serde(flatten)]
    pub data: DataConfig,
    /// The folder of the files.
    pub output: PathBuf,
}

/// One file of a division.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SplitFile {
    /// `train`, `heldout` or `test`.
    pub side: &'static str,
    pub path: PathBuf,
    pub records: usize,
    /// Different texts among them.
    pub texts: usize,
    /// Records of each label; those without one are not counted.
    pub labels: BTreeMap<String, usize>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SplitResult {
    pub files: Vec<SplitFile>,
    pub skipped: Vec<Skipped>,
    pub skipped_total: usize,
}

/// Reads records, divides them, and writes each side with all columns under their own names.
///
/// Lines of `.jsonl` stay as they are; values of `.csv` and `.tsv` become strings; of `.parquet`, `.arrow` and frames
/// what JSON lacks becomes strings (dates and times in ISO 8601, bytes in hexadecimal) or null (a number that
/// is not finite). The text of a `.txt` file is `text`.
///
/// # Errors
/// As [`super::prepare`]'s for files and settings; an output folder that holds files.
pub fn split_files(config: &SplitConfig) -> Result<SplitResult> {
    let output = &config.output;
    if std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::argument(format!(
            "{} is not empty: give a new output folder",
            output.display()
        )));
    }
    let mut skips = Skips::default();
    let mut data = config.data.clone();
    data.columns.whole = true;
    let source = Source::read(&data.data, &data, &mut skips)?;
    let plan = data.split_plan();
    let sides = divide(&source.records, &source.digests, &plan)?;
    std::fs::create_dir_all(output).map_err(Error::io(output))?;
    let named = [
        ("train", sides.train),
        ("heldout", sides.heldout),
        ("test", sides.test),
    ];
    let mut files = Vec::new();
    for (side, records) in named {
        if records.is_empty() {
            continue;
        }
        let path = output.join(format!("{side}.jsonl"));
        write_atomic(&path, |file| {
            let mut rows = records.iter().map(|&index| &source.records[index]);
            rows.try_for_each(|record| match &record.row {
                Some(row) => writeln!(file, "{row}"),
                None => writeln!(file, "{}", json(record)),
            })
        })?;
        let mut labels = BTreeMap::new();
        for &index in &records {
            if let Some(label) = &source.records[index].label {
                *labels.entry(label.clone()).or_default() += 1;
            }
        }
        let texts: BTreeSet<_> = records.iter().map(|&index| source.digests[index]).collect();
        files.push(SplitFile {
            side,
            path,
            records: records.len(),
            texts: texts.len(),
            labels,
        });
    }
    Ok(SplitResult {
        files,
        skipped: skips.first,
        skipped_total: skips.total,
    })
}

/// The records of some files as JSON, and how many could not be used.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Records {
    /// In order, with the columns that were read under their standard names.
    pub records: Vec<Value>,
    pub skipped_total: usize,
}

/// Every record of `config.data`.
///
/// # Errors
/// Files that cannot be read, or that hold no record.
pub fn records(config: &DataConfig) -> Result<Records> {
    let mut skips = Skips::default();
    let source = Source::read(&config.data, config, &mut skips)?;
    Ok(Records {
        records: source.records.iter().map(json).collect(),
        skipped_total: skips.total,
    })
}

fn json(record: &Record) -> Value {
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
    // What was read as JSON is JSON.
    let nested = |text: &str| serde_json::from_str(text).unwrap_or_default();
    match &record.content {
        Content::Text(text) => {
            put("text", text.as_str().into());
        }
        Content::Completion { prompt, completion } => {
            put("prompt", prompt.as_str().into());
            put("completion", completion.as_str().into());
        }
        Content::Messages { messages, tools } => {
            put("messages", nested(messages));
            if let Some(tools) = tools {
                put("tools", nested(tools));
            }
        }
    }
    for (name, value) in [("label", &record.label), ("group", &record.group)] {
        if let Some(value) = value {
            put(name, value.as_str().into());
        }
    }
    Value::Object(object)
}
