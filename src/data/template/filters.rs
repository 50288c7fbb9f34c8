//! Filters, functions and methods of templates: Python's, and none that makes more than is counted or fits.

use minijinja::value::{Kwargs, Rest, Value};
use minijinja::{Error, ErrorKind, State};

use super::budget::{Charged, charge, fits, kept, written};
use super::python;

/// Widest indentation, in spaces.
const MAX_INDENT: usize = 1000;
/// Longest text that is made a list of its characters.
const MAX_SPREAD_BYTES: usize = 16 << 20;

/// Python's `str.strip`.
pub fn trim(value: &Value, characters: Option<String>) -> Result<String, Error> {
    let text = python::str(value)?;
    let trimmed = match characters {
        Some(characters) => text.trim_matches(|one| characters.contains(one)),
        None => text
            .trim_matches(|one: char| one.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&one)),
    };
    Ok(trimmed.to_owned())
}

pub fn concat(values: Rest<Value>) -> Result<String, Error> {
    let mut text = Charged(String::new());
    for value in values.0 {
        written(python::write_str(&mut text, &value))?;
        fits(text.0.len())?;
    }
    Ok(text.0)
}

pub fn list(state: &State, value: Value) -> Result<Value, Error> {
    spread(&value)?;
    minijinja::filters::list(state, value)
}

/// # Errors
/// For a text of too many characters to make a list of.
fn spread(value: &Value) -> Result<(), Error> {
    if value
        .as_str()
        .is_some_and(|text| text.len() > MAX_SPREAD_BYTES)
    {
        let message = format!(
            "a list of a text of more than {} MiB",
            MAX_SPREAD_BYTES >> 20
        );
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(())
}

/// Python's `str.capitalize`.
pub fn capitalize(value: &Value) -> Result<String, Error> {
    let text = python::str(value)?;
    let mut characters = text.chars();
    Ok(characters.next().map_or_else(String::new, |first| {
        let rest = characters.as_str().to_lowercase();
        first.to_uppercase().collect::<String>() + &rest
    }))
}

/// Python's methods, those aside that make a text as long as a number says.
pub fn method(
    state: &State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), name, arguments) {
        (Some(text), "join", [values]) => join(values, Some(text.to_owned())).map(Value::from),
        (Some(text), "replace", [from, to, ..]) => {
            replaced_length(text, &python::str(from)?, &python::str(to)?)?;
            call(state, value, name, arguments)
        }
        (Some(text), "format", _) => {
            formatted_length(text, arguments)?;
            call(state, value, name, arguments)
        }
        (Some(_), "split" | "splitlines", _) => {
            spread(value)?;
            call(state, value, name, arguments)
        }
        _ => call(state, value, name, arguments),
    }
}

fn call(state: &State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let found =
        minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)?;
    kept(found)
}

pub fn format(state: &State, text: &Value, values: Rest<Value>) -> Result<Value, Error> {
    formatted_length(text.as_str().unwrap_or_default(), &values)?;
    minijinja::filters::format(state, text, values)
}

/// # Errors
/// Where a text with these values in its places may be too long: one of them is, or a place is wider than 999.
fn formatted_length(text: &str, values: &[Value]) -> Result<(), Error> {
    let widths = text.split(|sign: char| !sign.is_ascii_digit());
    if text.contains('*') || widths.map(str::len).max() > Some(3) {
        let message = "format takes no width or precision of more than 999, and none from a value";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    let mut longest = 999;
    for value in values {
        longest = longest.max(python::str(value)?.len());
    }
    let places = text.matches(['{', '%']).count();
    fits(text.len().saturating_add(longest.saturating_mul(places)))
}

/// # Errors
/// Where the text with `to` for `from` is too long.
fn replaced_length(text: &str, from: &str, to: &str) -> Result<(), Error> {
    let longer = to.len().saturating_sub(from.len());
    // An empty pattern is found before every character and at the end.
    fits(
        text.len()
            .saturating_add(longer.saturating_mul(text.matches(from).count())),
    )
}

pub fn replace(value: &Value, from: &Value, to: &Value) -> Result<String, Error> {
    let (text, from, to) = (python::str(value)?, python::str(from)?, python::str(to)?);
    replaced_length(&text, &from, &to)?;
    Ok(text.replace(&from, &to))
}

/// Jinja's `indent(width=4, first=False, blank=False)`; the width is in spaces, or what is put there.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands arguments over by value"
)]
pub fn indent(
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
    let text = python::str(value)? + "\n";
    let lines = text.lines().count();
    fits(
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

/// Python's `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands arguments over by value"
)]
pub fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
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

pub fn join(values: &Value, separator: Option<String>) -> Result<String, Error> {
    let separator = separator.unwrap_or_default();
    let mut text = Charged(String::new());
    let mut item = |number: usize, value: &Value| {
        if number > 0 {
            charge(separator.len())?;
            text.0.push_str(&separator);
        }
        written(python::write_str(&mut text, value))?;
        fits(text.0.len())
    };
    match values.as_str() {
        Some(characters) => {
            for (number, character) in characters.chars().enumerate() {
                item(number, &Value::from(character))?;
            }
        }
        None => {
            for (number, value) in values.try_iter()?.enumerate() {
                item(number, &value)?;
            }
        }
    }
    Ok(text.0)
}
