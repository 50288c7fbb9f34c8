//! Python's regular expressions, as PEFT applies them to module names.
//!
//! The engine here is fancy-regex: Python's syntax with groups, lookaround and backreferences, leftmost-first like
//! Python's. What differs: nested sets and set operations (`[a&&b]`, `[[a]]`) are operators here and literals in
//! Python, a literal `{` must be escaped here, conditional groups `(?(1)…)` and `\N{…}` do not exist here. A pattern
//! that cannot be compiled is an error that names it; none is ever taken as plain text instead.

use fancy_regex::Regex;

use crate::error::{Error, Result};

/// A compiled pattern and the field it stands in.
#[derive(Debug)]
pub(super) struct Pattern {
    field: &'static str,
    text: String,
    regex: Regex,
}

/// What a layer pattern says about a name.
pub(super) enum Layer {
    NoMatch,
    NoNumber,
    Number(i64),
}

impl Pattern {
    /// `re.fullmatch(text, name)`
    pub fn full(field: &'static str, text: &str) -> Result<Self> {
        Self::compile(field, text, &format!(r"\A(?:{text})\z"))
    }

    /// `re.match(rf"(.*\.)?({text})$", name)`, the rule of `rank_pattern` and `alpha_pattern`.
    pub fn suffix(field: &'static str, text: &str) -> Result<Self> {
        Self::compile(field, text, &format!(r"\A(.*\.)?({text})\z"))
    }

    /// `re.match(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", name)`, the rule of `layers_pattern`.
    pub fn layers(text: &str) -> Result<Self> {
        // As in PEFT the text is not parenthesised: an alternative in it splits the whole rule.
        let whole = format!(r"\A(?:(?:^|.*?\.){text}\.(?P<idx>\d+)\.)");
        Self::compile("layers_pattern", text, &whole)
    }

    /// `re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)`: the first numbered part of a name.
    pub fn any_layer() -> Result<Self> {
        Self::compile(
            "layers_to_transform",
            "",
            r"\A(?:.*?\.[^.]*\.(?P<idx>\d+)\.)",
        )
    }

    fn compile(field: &'static str, text: &str, whole: &str) -> Result<Self> {
        let unusable = |error: fancy_regex::Error| {
            Error::argument(format!(
                "{field}: '{text}' is not a regular expression that can be used here: {error}"
            ))
        };
        // Compiled alone first: `a)(b` would be valid inside the parentheses of the rule.
        Regex::new(text).map_err(unusable)?;
        Ok(Self {
            field,
            text: text.to_owned(),
            regex: Regex::new(whole).map_err(unusable)?,
        })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn matches(&self, name: &str) -> Result<bool> {
        self.regex
            .is_match(name)
            .map_err(|error| self.failed(name, &error))
    }

    pub fn layer(&self, name: &str) -> Result<Layer> {
        let found = self
            .regex
            .captures(name)
            .map_err(|error| self.failed(name, &error))?;
        Ok(found.map_or(Layer::NoMatch, |groups| {
            let digits = groups.name("idx").map(|group| group.as_str());
            digits
                .and_then(|digits| digits.parse().ok())
                .map_or(Layer::NoNumber, Layer::Number)
        }))
    }

    fn failed(&self, name: &str, error: &fancy_regex::Error) -> Error {
        Error::argument(format!(
            "{}: matching '{}' against '{name}' failed: {error}",
            self.field, self.text
        ))
    }
}
