//! Jinja as transformers sets it up: its whitespace rules, functions and filters, and Python's way of printing values.
//!
//! A template is a program of a stranger: it reaches nothing but the conversation (minijinja has no files, modules or
//! attributes of Python objects), its steps, time and recursion, what it makes and the text it writes are bounded.

use std::fmt::Write as _;
use std::sync::LazyLock;

use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior};
use regex::Regex;

use super::budget::{Charged, MAX_TEXT_BYTES, kept, timed, written};
use super::{filters, python, source};

/// Steps (minijinja's instructions) a template may take for one conversation.
pub const MAX_STEPS: u64 = 2_000_000;
/// Calls of macros and includes inside one another.
const MAX_DEPTH: usize = 100;

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
    environment.set_unknown_method_callback(filters::method);
    environment.set_formatter(|output, _state, value| {
        written(python::write_str(&mut Charged(output), value))
    });
    environment.add_function(source::CONCAT, filters::concat);
    environment.add_filter(source::KEPT, kept);
    environment.add_filter(source::TIMED, timed);
    environment.add_filter("tojson", filters::tojson);
    // What they are given is made a string first.
    environment.add_filter("string", |value: &Value| python::str(value));
    environment.add_filter("trim", filters::trim);
    environment.add_filter("upper", |value: &Value| {
        Ok::<_, Error>(python::str(value)?.to_uppercase())
    });
    environment.add_filter("lower", |value: &Value| {
        Ok::<_, Error>(python::str(value)?.to_lowercase())
    });
    environment.add_filter("title", |value: &Value| {
        Ok::<_, Error>(minijinja::filters::title(python::str(value)?.into()))
    });
    environment.add_filter("capitalize", filters::capitalize);
    environment.add_filter("list", filters::list);
    environment.add_filter("format", filters::format);
    // They take a number for how much they make, and no chat template uses them.
    for name in ["batch", "slice", "pprint"] {
        environment.remove_filter(name);
    }
    environment.add_filter("replace", filters::replace);
    environment.add_filter("indent", filters::indent);
    environment.add_filter("join", filters::join);
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
