//! Likely secrets and personal data.

use std::borrow::Cow;
use std::sync::LazyLock;

use rayon::prelude::*;
use regex::{Regex, RegexSet};

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};

/// A kind of secret, and what it looks like.
struct Kind {
    name: &'static str,
    pattern: &'static str,
    /// Whether what looks like one is one.
    holds: fn(&str) -> bool,
    /// Whether it opens a door, rather than naming a person.
    key: bool,
}

const fn kind(name: &'static str, pattern: &'static str, key: bool) -> Kind {
    Kind {
        name,
        pattern,
        holds: |_| true,
        key,
    }
}

static KINDS: [Kind; 12] = [
    kind(
        "private key",
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----",
        true,
    ),
    kind("AWS access key", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b", true),
    kind(
        "GitHub token",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b",
        true,
    ),
    kind("Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}", true),
    kind("Google API key", r"\bAIza[A-Za-z0-9_-]{35}\b", true),
    kind("API key", r"\bsk-[A-Za-z0-9_-]{20,}", true),
    kind(
        "JSON web token",
        r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
        true,
    ),
    kind(
        "password in a URL",
        r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,64}:[^\s/:@]{3,64}@[\w.-]+",
        true,
    ),
    Kind {
        name: "password or key by its name",
        pattern: r#"(?i)\b(?:password|passwd|passphrase|secret|api[ _-]?key|(?:access|auth|secret)[ _-]?(?:key|token))["']?\s{0,3}(?:=|:|:=|=>)\s{0,3}["']?[^\s"',;<>(){}]{6,100}"#,
        holds: is_password,
        key: true,
    },
    kind(
        "e-mail address",
        r"\b[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b",
        false,
    ),
    Kind {
        name: "payment card or bank account",
        pattern: r"\b(?:\d[ -]?){12,18}\d\b|\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
        holds: is_account,
        key: false,
    },
    Kind {
        name: "phone number",
        pattern: r"\+[1-9]\d{0,2}[ ./-]?\(?\d{1,5}\)?(?:[ ./-]?\d{2,8}){1,4}\b",
        holds: is_phone_number,
        key: false,
    },
];

#[expect(clippy::unwrap_used, reason = "constant patterns")]
static ANY: LazyLock<RegexSet> =
    LazyLock::new(|| RegexSet::new(KINDS.iter().map(|kind| kind.pattern)).unwrap());

#[expect(clippy::unwrap_used, reason = "constant patterns")]
static EACH: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    let patterns = KINDS.iter().map(|kind| Regex::new(kind.pattern).unwrap());
    patterns.collect()
});

pub fn check(corpus: &Corpus) -> Finding {
    let found: Vec<(usize, usize, usize)> = corpus
        .texts
        .par_iter()
        .enumerate()
        .filter_map(|(index, text)| find(text).map(|(kind, at)| (index, kind, at)))
        .collect();
    let mut counts = [0usize; KINDS.len()];
    for (_, kind, _) in &found {
        counts[*kind] += 1;
    }
    let mut shown: Vec<&(usize, usize, usize)> = found.iter().collect();
    // Keys first: there are fewer of them.
    shown.sort_by_key(|(index, kind, _)| (!KINDS[*kind].key, *index));
    let examples = shown
        .into_iter()
        .take(corpus.shown)
        .map(|&(index, kind, at)| corpus.example_at(index, at, KINDS[kind].name))
        .collect();
    let listed: Vec<String> = KINDS
        .iter()
        .zip(counts)
        .filter(|(_, count)| *count > 0)
        .map(|(kind, count)| format!("{} in {count}", kind.name))
        .collect();
    let count = found.len();
    let mut finding = Finding::new("secrets", Severity::Warning, count, corpus.len())
        .message(match count {
            0 => "No sign of keys, passwords, e-mail addresses, phone numbers, cards or accounts.".to_owned(),
            _ => format!(
                "{} of the records hold likely secrets or personal data ({}), which a model can give away. They are masked here.",
                share(count, corpus.len()),
                listed.join(", ")
            ),
        })
        .examples(examples);
    for (kind, count) in KINDS.iter().zip(counts) {
        if count > 0 {
            finding = finding.detail(kind.name, count);
        }
    }
    finding
}

/// The first kind that a text holds, and where.
fn find(text: &str) -> Option<(usize, usize)> {
    ANY.matches(text).into_iter().find_map(|kind| {
        let mut matches = EACH[kind].find_iter(text);
        let found = matches.find(|found| (KINDS[kind].holds)(found.as_str()))?;
        Some((kind, found.start()))
    })
}

/// The text with all but the beginning of each secret put out of sight.
pub fn mask(text: &str) -> Cow<'_, str> {
    let kinds = ANY.matches(text);
    if !kinds.matched_any() {
        return Cow::Borrowed(text);
    }
    let mut masked = Cow::Borrowed(text);
    for kind in kinds {
        let replaced = EACH[kind].replace_all(&masked, |found: &regex::Captures| {
            let secret = &found[0];
            if (KINDS[kind].holds)(secret) {
                let seen: String = secret.chars().take(4).collect();
                format!("{seen}●●●●")
            } else {
                secret.to_owned()
            }
        });
        masked = Cow::Owned(replaced.into_owned());
    }
    masked
}

/// Whether what is behind the name is no word of a sentence.
fn is_password(text: &str) -> bool {
    let behind = text.find(['=', ':']).map_or("", |at| &text[at..]);
    let value =
        behind.trim_start_matches(|sign: char| sign.is_whitespace() || "=:>\"'".contains(sign));
    value.contains(|sign: char| sign.is_ascii_digit())
        && value.contains(|sign: char| sign.is_alphabetic())
}

/// Whether it is as long as an international number can be (ITU-T E.164).
fn is_phone_number(text: &str) -> bool {
    (9..=15).contains(&text.chars().filter(char::is_ascii_digit).count())
}

/// Whether the check digits of a card (Luhn, ISO/IEC 7812) or an account (IBAN, ISO 13616) fit.
fn is_account(text: &str) -> bool {
    let signs: Vec<u32> = text.chars().filter_map(|sign| sign.to_digit(36)).collect();
    if text.starts_with(|sign: char| sign.is_ascii_digit()) {
        return is_card(&signs);
    }
    // Country and check digits go to the end; letters count from 10.
    let rotated = signs[4..].iter().chain(&signs[..4]);
    let rest = rotated.fold(0u64, |rest, &sign| {
        let shift = if sign > 9 { 100 } else { 10 };
        (rest * shift + u64::from(sign)) % 97
    });
    (15..=34).contains(&signs.len()) && rest == 1
}

fn is_card(digits: &[u32]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(place, digit)| match place % 2 {
            0 => *digit,
            _ => digit * 2 - if *digit > 4 { 9 } else { 0 },
        })
        .sum();
    // Cards begin with 2 to 6; a row of one digit is none.
    sum.is_multiple_of(10)
        && (2..=6).contains(&digits[0])
        && digits.iter().any(|digit| *digit != digits[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_secret() {
        let cases = [
            ("write to jane.doe@example.org now", Some("e-mail address")),
            ("key AKIAIOSFODNN7EXAMPLE", Some("AWS access key")),
            ("-----BEGIN RSA PRIVATE KEY-----", Some("private key")),
            (
                "token ghp_0123456789abcdefghijklmnopqrstuvwxyz",
                Some("GitHub token"),
            ),
            (
                "postgres://user:hunter2@db.example/x",
                Some("password in a URL"),
            ),
            (
                "card 4111 1111 1111 1111",
                Some("payment card or bank account"),
            ),
            (
                "pay to DE89 3704 0044 0532 0130 00",
                Some("payment card or bank account"),
            ),
            (
                "password = hunter2hunter",
                Some("password or key by its name"),
            ),
            (
                "{\"api_key\": \"9f86d081884c7d65\"}",
                Some("password or key by its name"),
            ),
            ("call +49 30 12345678 or", Some("phone number")),
            ("call +1 (555) 010-9999", Some("phone number")),
            ("the password: something easy", None),
            ("secret: 1234567", None),
            ("a sum of +12 345 and +7", None),
            ("card 4111 1111 1111 1112", None),
            ("DE88 3704 0044 0532 0130 00", None),
            ("0000 0000 0000 0000", None),
            ("@mention and a@b, 3 @ 4", None),
            ("see http://example.org:8080/a", None),
        ];
        for (text, expected) in cases {
            let found = find(text).map(|(kind, _)| KINDS[kind].name);
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn secrets_are_masked() {
        let text = "mail jane.doe@example.org, key AKIAIOSFODNN7EXAMPLE.";
        assert_eq!(mask(text), "mail jane●●●●, key AKIA●●●●.");
        assert_eq!(mask("none"), "none");
    }
}
