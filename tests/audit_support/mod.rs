//! Data with planted faults, and what an audit says of it.
#![allow(dead_code)] // each test binary uses its own part
#![allow(clippy::needless_pass_by_value)]

use std::path::{Path, PathBuf};

use ferrotune::data::audit::{AuditConfig, AuditReport, Finding, audit};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

pub const WORDS: [&str; 40] = [
    "river", "stone", "window", "garden", "morning", "letter", "engine", "market", "winter",
    "paper", "silver", "island", "captain", "summer", "village", "bridge", "music", "forest",
    "kitchen", "doctor", "planet", "harbor", "candle", "mirror", "shadow", "teacher", "valley",
    "thunder", "copper", "needle", "orange", "puzzle", "rocket", "saddle", "temple", "velvet",
    "walnut", "yellow", "zipper", "anchor",
];

/// Twelve words from a fixed stream, unlike those of every other number.
pub fn text(number: usize) -> String {
    let mut state = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words: Vec<&str> = (0..12)
        .map(|_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            WORDS[(state >> 33) as usize % WORDS.len()]
        })
        .collect();
    format!(
        "The {} was near the {} of {number}.",
        words[..6].join(" and the "),
        words[6..].join(" in the ")
    )
}

pub fn plain(count: usize) -> Vec<Value> {
    (0..count)
        .map(|number| json!({"text": text(number)}))
        .collect()
}

/// Of two classes with words of their own.
pub fn labelled(count: usize) -> Vec<Value> {
    (0..count)
        .map(|number| {
            let (label, topic) = match number % 2 {
                0 => ("sea", "ship sail wave"),
                _ => ("land", "horse plough field"),
            };
            json!({"text": format!("{} With {topic}.", text(number)), "label": label})
        })
        .collect()
}

pub struct Data {
    pub folder: TempDir,
}

impl Data {
    pub fn new() -> Self {
        Self {
            folder: tempdir().unwrap(),
        }
    }

    pub fn file(&self, name: &str, records: &[Value]) -> PathBuf {
        let lines: Vec<String> = records.iter().map(Value::to_string).collect();
        let path = self.folder.path().join(name);
        std::fs::write(&path, lines.join("\n")).unwrap();
        path
    }

    pub fn audit(&self, records: &[Value], changes: Value) -> AuditReport {
        let file = self.file("a.jsonl", records);
        audit(&config(&file, changes), None).unwrap()
    }
}

pub fn config(file: &Path, changes: Value) -> AuditConfig {
    let mut settings = json!({
        "data": [file], "heldout": 0.0, "sequence_length": 64, "packing": true, "seed": 0,
        "near_duplicates": 0.8, "predict_labels": true, "examples": 5,
    });
    for (name, value) in changes.as_object().unwrap() {
        settings[name] = value.clone();
    }
    serde_json::from_value(settings).unwrap()
}

pub fn find<'a>(report: &'a AuditReport, check: &str) -> &'a Finding {
    let found = report
        .findings
        .iter()
        .find(|finding| finding.check == check);
    found.unwrap_or_else(|| panic!("no {check}"))
}

/// Count and numbers of the records that are shown.
pub fn shown(report: &AuditReport, check: &str) -> (usize, Vec<usize>) {
    let finding = find(report, check);
    let records = finding.examples.iter().map(|example| example.record);
    (finding.count, records.collect())
}
