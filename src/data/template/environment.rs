//! Jinja as transformers sets it up: its whitespace rules, functions and filters, and Python's way of printing values.
//!
//! A template is a program of a stranger: it reaches nothing but the conversation (minijinja has no files, modules or
//! attributes of Python objects), its steps, its recursion and the text it writes are bounded.

use std::fmt::Write as _;
use std::sync::LazyLock;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior};
use regex::Regex;

use super::python;

/// Steps (minijinja's instructions) a template may take for one conversation.
pub const MAX_STEPS: u64 = 2_000_000;
/// Calls of macros and includes inside one another.
const MAX_DEPTH: usize = 100;
/// Longest text a template may write.
pub const MAX_TEXT_BYTES: usize = 64 << 20;
/// Widest indentation, in spaces.
const MAX_INDENT: usize = 1000;

/// Variables that hold the characters to put around the assistant's text; absent or none for no marks.
const GENERATION_START: &str = "ferrotune_generation_start";
const GENERATION_END: &str = "ferrotune_generation_end";

static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    #[expect(clippy::unwrap_used, reason = "a constant pattern")]
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").unwrap()
});

/// Whether the source marks the assistant's text.
pub fn has_generation_tags(source: &str) -> bool {
    GENERATION.is_match(source)
}

/// `{% generation %}` blocks as filter blocks, which keep its white space rules.
pub fn without_generation_tags(source: &str) -> String {
    let replaced = GENERATION.replace_all(source, |found: &regex::Captures| {
        let tag = match found.get(2) {
            Some(_) => "endfilter",
            None => "filter ferrotune_generation",
        };
        format!("{{%{} {tag} {}%}}", &found[1], &found[3])
    });
    replaced.into_owned()
}

pub fn new() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_DEPTH);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|output, _state, value| {
        python::write_str(output, value).map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
    environment.add_filter("tojson", tojson);
    // What they are given is made a string first.
    environment.add_filter("string", |value: &Value| python::str(value));
    environment.add_filter("trim", trim);
    environment.add_filter("upper", |value: &Value| python::str(value).to_uppercase());
    environment.add_filter("lower", |value: &Value| python::str(value).to_lowercase());
    environment.add_filter("replace", replace);
    environment.add_filter("indent", indent);
    environment.add_filter("join", join);
    environment.add_filter("ferrotune_generation", generation);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    // Python's: a string can be iterated, and strings and dicts have a length and items.
    environment.add_test("iterable", |value: &Value| {
        value.kind() != ValueKind::None && (value.as_str().is_some() || value.try_iter().is_ok())
    });
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Seq | ValueKind::String | ValueKind::Map
        )
    });
    environment
}

fn generation(state: &State, body: String) -> String {
    let mark = |name| {
        state
            .lookup(name)
            .and_then(|mark| mark.as_str().map(str::to_owned))
    };
    match (mark(GENERATION_START), mark(GENERATION_END)) {
        (Some(start), Some(end)) => format!("{start}{body}{end}"),
        _ => body,
    }
}

/// Python's `str.strip`.
fn trim(value: &Value, characters: Option<String>) -> String {
    let text = python::str(value);
    let trimmed = match characters {
        Some(characters) => text.trim_matches(|one| characters.contains(one)),
        None => text
            .trim_matches(|one: char| one.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&one)),
    };
    trimmed.to_owned()
}

fn replace(value: &Value, from: &Value, to: &Value) -> Result<String, Error> {
    let (text, from, to) = (python::str(value), python::str(from), python::str(to));
    let longer = to.len().saturating_sub(from.len());
    // An empty pattern is found before every character and at the end.
    bounded(text.len() + longer.saturating_mul(text.matches(&from).count()))?;
    Ok(text.replace(&from, &to))
}

/// Jinja's `indent(width=4, first=False, blank=False)`; the width is in spaces, or what is put there.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands arguments over by value"
)]
fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = match width {
        Some(width) => Some(width),
        None => options.get::<Option<Value>>("width")?,
    };
    let first = match first {
        Some(first) => first,
        None => options.get::<Option<bool>>("first")?.unwrap_or(false),
    };
    let blank = match blank {
        Some(blank) => blank,
        None => options.get::<Option<bool>>("blank")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let indentation = match &width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(check_indent(usize::try_from(width.clone())?)?),
        },
    };
    let text = python::str(value) + "\n";
    let lines = text.lines().count();
    bounded(
        indentation
            .len()
            .saturating_mul(lines)
            .saturating_add(text.len()),
    )?;
    let mut indented = String::with_capacity(text.len() + indentation.len() * lines);
    for (index, line) in text.lines().enumerate() {
        if index > 0 {
            indented.push('\n');
        }
        if (index == 0 && first) || (index > 0 && (blank || !line.is_empty())) {
            indented.push_str(&indentation);
        }
        indented.push_str(line);
    }
    Ok(indented)
}

fn check_indent(width: usize) -> Result<usize, Error> {
    if width > MAX_INDENT {
        let message = format!("an indentation of {width} is more than {MAX_INDENT} spaces");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(width)
}

/// # Errors
/// For a text that is longer than any may become.
pub fn bounded(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_TEXT_BYTES {
        let message = format!("a text of more than {} MiB", MAX_TEXT_BYTES >> 20);
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(())
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The local time by a format of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let items: Vec<chrono::format::Item> = chrono::format::StrftimeItems::new(format).collect();
    if items.contains(&chrono::format::Item::Error) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now cannot use the format {format:?}"),
        ));
    }
    let mut text = String::new();
    write!(
        text,
        "{}",
        chrono::Local::now().format_with_items(items.iter())
    )
    .map_err(|_| Error::from(ErrorKind::WriteFailure))?;
    Ok(text)
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands arguments over by value"
)]
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    check_indent(indent.unwrap_or(0))?;
    let mut dump = python::Dump::new(
        indent,
        ensure_ascii.unwrap_or(false),
        sort_keys.unwrap_or(false),
    );
    if let Some([item, key]) = separators.as_deref() {
        dump.separators(item, key);
    }
    dump.json(value)
}

fn join(values: &Value, separator: Option<String>) -> Result<String, Error> {
    let separator = separator.unwrap_or_default();
    let values: Vec<String> = match values.as_str() {
        Some(text) => text.chars().map(String::from).collect(),
        None => values
            .try_iter()?
            .map(|value| python::str(&value))
            .collect(),
    };
    let separators = separator.len().saturating_mul(values.len());
    bounded(
        values
            .iter()
            .map(String::len)
            .sum::<usize>()
            .saturating_add(separators),
    )?;
    Ok(values.join(&separator))
}

/// Takes a text up to [`MAX_TEXT_BYTES`].
#[derive(Default)]
pub struct Bounded {
    pub bytes: Vec<u8>,
    /// More was to be written than it takes.
    pub full: bool,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_TEXT_BYTES {
            self.full = true;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
