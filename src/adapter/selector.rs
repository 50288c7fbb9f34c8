//! PEFT's two ways to name modules: one regular expression, or a list of names and ends of names.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::fields::strings;
use super::pattern::Pattern;
use crate::error::Result;

/// PEFT's `str | list[str]` for module names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// One regular expression that matches the whole name; as `target_modules` also `all-linear`.
    Pattern(String),
    /// Whole names, or their last parts after a dot.
    Names(Vec<String>),
}

impl Selector {
    /// `all-linear` in any case: every linear layer but the output layer.
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Self::Pattern(text) if text.eq_ignore_ascii_case("all-linear"))
    }

    pub(super) fn from_json(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => Some(Self::Pattern(text.clone())),
            list => strings(list).map(Self::Names),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        match self {
            Self::Pattern(text) => json!(text),
            Self::Names(names) => json!(names),
        }
    }

    /// The pattern or the names, for messages.
    pub(super) fn texts(&self) -> &[String] {
        match self {
            Self::Pattern(text) => std::slice::from_ref(text),
            Self::Names(names) => names,
        }
    }
}

/// A selector with its pattern compiled.
#[derive(Debug)]
pub(super) enum Choice<'a> {
    All,
    Pattern(Pattern),
    Names(HashSet<&'a str>),
}

impl<'a> Choice<'a> {
    pub fn new(field: &'static str, selector: &'a Selector) -> Result<Self> {
        Ok(match selector {
            Selector::Pattern(text) => Self::Pattern(Pattern::full(field, text)?),
            Selector::Names(names) => Self::Names(names.iter().map(String::as_str).collect()),
        })
    }

    pub fn matches(&self, module: &str) -> Result<bool> {
        match self {
            Self::All => Ok(true),
            Self::Pattern(pattern) => pattern.matches(module),
            Self::Names(names) => {
                Ok(names.contains(module) || suffixes(module).any(|end| names.contains(end)))
            }
        }
    }
}

/// The ends of a dotted name: of `a.b.c` these are `b.c` and `c`.
pub(super) fn suffixes(module: &str) -> impl Iterator<Item = &str> {
    module.match_indices('.').map(|(dot, _)| &module[dot + 1..])
}

pub(super) fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}
