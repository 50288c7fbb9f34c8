//! Pairs of terms that name groups, such as he and she: which group a text names, and the text with
//! each term in place of its counterpart.

use std::collections::HashMap;

use regex::{Captures, Regex, RegexBuilder};

use crate::error::{Error, Result};

/// Names in a group's description before the rest is only hinted at.
const SHOWN: usize = 3;

/// Pairs of terms; the first terms name one group, the second ones the other.
#[derive(Debug, Clone)]
pub struct Terms {
    /// By a term in lower case: its counterpart, and whether it stands for the second group.
    known: HashMap<String, (String, bool)>,
    pattern: Regex,
    /// Of the first and the second group.
    pub names: [String; 2],
}

impl Terms {
    /// Pairs such as `he/she`. A term in several pairs has its counterpart from the first of them.
    ///
    /// # Errors
    /// `Argument` for what is no pair of two different terms, and for a term in both groups.
    pub fn parse(pairs: &[String]) -> Result<Self> {
        let mut known: HashMap<String, (String, bool)> = HashMap::new();
        let mut sides = [Vec::new(), Vec::new()];
        for pair in pairs {
            let wrong = |what: &str| Error::argument(format!("bias_terms: '{pair}' {what}"));
            let terms: Vec<String> = pair
                .split('/')
                .map(|term| term.trim().to_lowercase())
                .collect();
            let [first, second] = terms.as_slice() else {
                return Err(wrong("is no pair of terms such as he/she"));
            };
            if !is_word(first) || !is_word(second) || first == second {
                return Err(wrong(
                    "must be two different terms that begin and end with a letter or a digit",
                ));
            }
            for (term, other, second) in [(first, second, false), (second, first, true)] {
                let entry = known.entry(term.clone());
                let found = entry.or_insert_with(|| (other.clone(), second));
                if found.1 != second {
                    return Err(wrong(&format!(
                        "has '{term}' on the other side than an earlier pair"
                    )));
                }
                let side = &mut sides[usize::from(second)];
                if !side.contains(term) {
                    side.push(term.clone());
                }
            }
        }
        let mut all: Vec<String> = known.keys().map(|term| regex::escape(term)).collect();
        // The longest first: the others begin some of them.
        all.sort_by(|one, other| other.len().cmp(&one.len()).then(one.cmp(other)));
        let pattern = RegexBuilder::new(&format!(r"\b(?:{})\b", all.join("|")))
            .case_insensitive(true)
            .build()
            .map_err(|error| Error::argument(format!("bias_terms: {error}")))?;
        Ok(Self {
            known,
            pattern,
            names: sides.map(|terms| {
                let more = if terms.len() > SHOWN { ", …" } else { "" };
                let shown: Vec<&str> = terms.iter().take(SHOWN).map(String::as_str).collect();
                format!("{}{more}", shown.join(", "))
            }),
        })
    }

    /// The group whose terms alone stand in `text`: 0 or 1; none where no term does, or both.
    pub fn group(&self, text: &str) -> Option<usize> {
        let mut seen = [false; 2];
        for found in self.pattern.find_iter(text) {
            if let Some((_, second)) = self.known.get(&found.as_str().to_lowercase()) {
                seen[usize::from(*second)] = true;
            }
        }
        match seen {
            [true, false] => Some(0),
            [false, true] => Some(1),
            _ => None,
        }
    }

    /// `text` with every term's counterpart in its place, in capitals where it was; none where there
    /// is no term.
    pub fn swap(&self, text: &str) -> Option<String> {
        let counterpart = |found: &Captures<'_>| {
            let term = &found[0];
            match self.known.get(&term.to_lowercase()) {
                Some((other, _)) => cased(other, term),
                None => term.to_owned(),
            }
        };
        let swapped = self.pattern.replace_all(text, counterpart);
        (swapped != text).then(|| swapped.into_owned())
    }
}

fn is_word(term: &str) -> bool {
    let ends = [term.chars().next(), term.chars().next_back()];
    ends.iter()
        .all(|end| end.is_some_and(char::is_alphanumeric))
}

/// `term` written as `like` is: in capitals, with a capital first, or as it stands.
fn cased(term: &str, like: &str) -> String {
    let mut letters = like.chars();
    let first_is_upper = letters.next().is_some_and(char::is_uppercase);
    let rest = letters.as_str();
    if first_is_upper && !rest.is_empty() && rest == rest.to_uppercase() {
        return term.to_uppercase();
    }
    let mut own = term.chars();
    match own.next() {
        Some(first) if first_is_upper => first.to_uppercase().chain(own).collect(),
        _ => term.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(pairs: &[&str]) -> Result<Terms> {
        let pairs: Vec<String> = pairs.iter().map(|&pair| pair.to_owned()).collect();
        Terms::parse(&pairs)
    }

    #[test]
    fn swaps_keep_case_and_leave_parts_of_words() {
        let pairs = [
            "he/she",
            "him/her",
            "his/her",
            "old man/old woman",
            "man/woman",
        ];
        let terms = terms(&pairs).unwrap();
        let swap = |text: &str| terms.swap(text);
        assert_eq!(
            swap("He, there: HE said his").unwrap(),
            "She, there: SHE said her"
        );
        assert_eq!(swap("she saw her").unwrap(), "he saw him");
        assert_eq!(swap("an Old man").unwrap(), "an Old woman");
        assert_eq!(swap("the human manifesto"), None);
        assert_eq!(swap(""), None);
    }

    #[test]
    fn the_group_is_that_of_all_terms() {
        let terms = terms(&["he/she", "king/queen"]).unwrap();
        let group = |text: &str| terms.group(text);
        assert_eq!(group("The King said he"), Some(0));
        assert_eq!(group("Queens; the queen."), Some(1));
        assert_eq!(group("he and she"), None);
        assert_eq!(group("they"), None);
        assert_eq!(terms.names, ["he, king", "she, queen"]);
    }

    #[test]
    fn bad_pairs_are_named() {
        for (pairs, message) in [
            (&["he"][..], "'he' is no pair"),
            (&["he/she/they"], "is no pair"),
            (&["he/"], "two different terms"),
            (&["he/He"], "two different terms"),
            (&["he/she", "she/they"], "'she' on the other side"),
        ] {
            let error = terms(pairs).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
