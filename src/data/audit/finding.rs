//! What a check found.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value};

/// How bad it is, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing was found.
    Ok,
    /// Worth knowing.
    Note,
    /// Likely to spoil a run or its evaluation.
    Warning,
    /// Training would be meaningless.
    Stop,
}

impl Severity {
    /// Of a fault that one record in a hundred may have without harm.
    pub fn by_share(count: usize, of: usize) -> Self {
        if count * 100 < of {
            Self::Note
        } else {
            Self::Warning
        }
    }
}

/// A record that a finding is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Example {
    pub file: PathBuf,
    /// Number in the file, from 1; 0 for the whole file.
    pub record: usize,
    /// The beginning of its text, or the place in it; likely secrets are masked.
    pub text: String,
    /// What is said of it; may be empty.
    pub note: String,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name in snake case, such as `near_duplicates`.
    pub check: &'static str,
    pub severity: Severity,
    /// Records concerned.
    pub count: usize,
    /// Among this many.
    pub of: usize,
    /// What was found and what to do, in a sentence or two.
    pub message: String,
    pub examples: Vec<Example>,
    /// Figures by name.
    pub details: Map<String, Value>,
}

impl Finding {
    /// A finding of `count` records of `of`, [`Severity::Ok`] for none.
    pub fn new(check: &'static str, severity: Severity, count: usize, of: usize) -> Self {
        Self {
            check,
            severity: if count == 0 { Severity::Ok } else { severity },
            count,
            of,
            message: String::new(),
            examples: Vec::new(),
            details: Map::new(),
        }
    }

    pub fn message(mut self, message: impl Into<String>) -> Self {
        let message: String = message.into();
        let mut characters = message.chars();
        // A sentence may begin with a share such as `under 0.1 %`.
        let first = characters.next().into_iter().flat_map(char::to_uppercase);
        self.message = first.chain(characters).collect();
        self
    }

    pub fn examples(mut self, examples: Vec<Example>) -> Self {
        self.examples = examples;
        self
    }

    pub fn detail(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }
}

/// `count` as a share of `of`, such as `1.5 %`; two figures, `under 0.1 %` for what rounds to nothing.
pub fn share(count: usize, of: usize) -> String {
    let percent = 100.0 * count as f64 / of.max(1) as f64;
    match percent {
        _ if count == 0 => "0 %".to_owned(),
        _ if percent < 0.1 => "under 0.1 %".to_owned(),
        _ if percent < 10.0 => format!("{percent:.1} %"),
        _ => format!("{percent:.0} %"),
    }
}
