//! Texts whose encoding was broken before they were stored.

use rayon::prelude::*;

use super::corpus::Corpus;
use super::finding::{Finding, Severity, share};

/// What is wrong with a text, worst first; the order of [`NAMES`].
const NAMES: [&str; 4] = [
    "replacement characters",
    "UTF-8 read as Latin-1 (mojibake)",
    "control characters",
    "HTML entities",
];

pub fn check(corpus: &Corpus) -> Finding {
    let found: Vec<(usize, usize, usize)> = corpus
        .texts
        .par_iter()
        .enumerate()
        .filter_map(|(index, text)| inspect(text).map(|(kind, at)| (index, kind, at)))
        .collect();
    let mut counts = [0usize; NAMES.len()];
    for (_, kind, _) in &found {
        counts[*kind] += 1;
    }
    let mut examples = Vec::new();
    for kind in 0..NAMES.len() {
        let of_kind = found.iter().filter(|(_, other, _)| *other == kind);
        let examples_of_kind = of_kind
            .take(corpus.shown.div_ceil(NAMES.len()))
            .map(|(index, kind, at)| corpus.example_at(*index, *at, NAMES[*kind]));
        examples.extend(examples_of_kind);
    }
    let count = found.len();
    let kinds: Vec<String> = NAMES
        .iter()
        .zip(counts)
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{name} in {count}"))
        .collect();
    let severity = Severity::by_share(count, corpus.len());
    let mut finding = Finding::new("encoding", severity, count, corpus.len())
        .message(match count {
            0 => "No sign of a broken encoding.".to_owned(),
            _ => format!(
                "{} of the records show a broken encoding ({}): a model learns to write it. Decode the source again.",
                share(count, corpus.len()),
                kinds.join(", ")
            ),
        })
        .examples(examples);
    for (name, count) in NAMES.iter().zip(counts) {
        finding = finding.detail(name, count);
    }
    finding
}

/// The worst sign of a broken encoding in a text, and the byte where it stands.
fn inspect(text: &str) -> Option<(usize, usize)> {
    let mut worst: Option<(usize, usize)> = None;
    let mut note = |kind: usize, at: usize| {
        if worst.is_none_or(|(known, _)| kind < known) {
            worst = Some((kind, at));
        }
    };
    if text.is_ascii() {
        let is_control =
            |byte: u8| byte.is_ascii_control() && !matches!(byte, b'\t' | b'\n' | b'\r' | 0x0c);
        if let Some(at) = text.bytes().position(is_control) {
            note(2, at);
        }
    } else {
        for (at, character) in text.char_indices() {
            match character {
                '\u{fffd}' => note(0, at),
                'Â' | 'Ã' | 'â' | 'ð' if is_mojibake(&text[at..]) => note(1, at),
                '\t' | '\n' | '\r' | '\u{c}' | '\u{85}' => {}
                _ if character.is_control() => note(2, at),
                _ => {}
            }
        }
    }
    worst.or_else(|| entity(text).map(|at| (3, at)))
}

/// Whether the first characters are the bytes of one UTF-8 character, read as Windows-1252.
fn is_mojibake(text: &str) -> bool {
    let mut bytes = text.chars().map(windows_1252);
    let following = match bytes.next().flatten() {
        Some(0xc2 | 0xc3) => 1,
        Some(0xe2) => 2,
        Some(0xf0) => 3,
        _ => return false,
    };
    (0..following).all(|_| matches!(bytes.next(), Some(Some(0x80..=0xbf))))
}

/// The byte that Windows-1252 (and Latin-1, where it has none) decodes to this character.
fn windows_1252(character: char) -> Option<u8> {
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž',
        '\u{8f}', '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}',
        'ž', 'Ÿ',
    ];
    if let Some(place) = HIGH.iter().position(|high| *high == character) {
        return Some(0x80 + place as u8);
    }
    u8::try_from(u32::from(character)).ok()
}

/// Where an entity such as `&amp;` or `&#39;` stands.
fn entity(text: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(found) = text[from..].find('&') {
        let at = from + found;
        let rest = &text[at + 1..];
        let end = rest.bytes().take(10).position(|byte| byte == b';');
        if let Some(name) = end.map(|end| &rest[..end])
            && is_entity(name)
        {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

fn is_entity(name: &str) -> bool {
    const NAMED: [&str; 14] = [
        "amp", "lt", "gt", "quot", "apos", "nbsp", "ndash", "mdash", "hellip", "rsquo", "lsquo",
        "rdquo", "ldquo", "eacute",
    ];
    let number = name.strip_prefix('#').is_some_and(|digits| {
        let (digits, radix) = match digits.strip_prefix(['x', 'X']) {
            Some(digits) => (digits, 16),
            None => (digits, 10),
        };
        !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix))
    });
    number || NAMED.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_of_broken_encodings() {
        let cases = [
            ("plain text, a\ttab\n", None),
            ("Größe – naïve “quotes” 日本語 CAFÉ» São", None),
            ("AT&T; R&D and a & b; c", None),
            ("broken \u{fffd} here", Some((0, 7))),
            ("Caf\u{c3}\u{a9}", Some((1, 3))),
            ("it\u{e2}\u{20ac}\u{2122}s", Some((1, 2))),
            ("5\u{c2}\u{a0}kg", Some((1, 1))),
            ("bell \u{7}", Some((2, 5))),
            ("ünder\u{90}", Some((2, 6))),
            ("fish &amp; chips", Some((3, 5))),
            ("it&#39;s &#x27;", Some((3, 2))),
        ];
        for (text, expected) in cases {
            assert_eq!(inspect(text), expected, "{text:?}");
        }
        // What Python makes of such texts.
        for character in "éßñ–’€ü".chars() {
            let wrong: String = character.to_string().bytes().map(decode).collect();
            assert!(is_mojibake(&wrong), "{character} {wrong}");
        }
    }

    fn decode(byte: u8) -> char {
        (0..=0x2fff)
            .filter_map(char::from_u32)
            .find(|character| windows_1252(*character) == Some(byte))
            .unwrap()
    }
}
