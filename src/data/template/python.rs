//! Values as Python prints them: `str`, `repr` and `json.dumps`.

use std::fmt::{self, Write};

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::budget::{Charged, fits, written};

/// `str(value)`.
///
/// # Errors
/// Where it is too long, or too much has been made with it.
pub fn str(value: &Value) -> Result<String, Error> {
    let mut text = Charged(String::new());
    written(write_str(&mut text, value))?;
    fits(text.0.len())?;
    Ok(text.0)
}

/// Writes `str(value)`.
pub fn write_str(output: &mut impl Write, value: &Value) -> fmt::Result {
    match (value.kind(), value.as_str()) {
        (ValueKind::Undefined, _) => Ok(()),
        (_, Some(text)) => output.write_str(text),
        _ => write_repr(output, value),
    }
}

fn write_repr(output: &mut impl Write, value: &Value) -> fmt::Result {
    match value.kind() {
        ValueKind::None => output.write_str("None"),
        ValueKind::Bool => output.write_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => write_number(output, value),
        ValueKind::String => write_quoted(output, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            output.write_char('[')?;
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    output.write_str(", ")?;
                }
                write_repr(output, &item)?;
            }
            output.write_char(']')
        }
        ValueKind::Map => {
            output.write_char('{')?;
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    output.write_str(", ")?;
                }
                write_repr(output, &key)?;
                output.write_str(": ")?;
                write_repr(output, &value.get_item(&key).unwrap_or_default())?;
            }
            output.write_char('}')
        }
        _ => write!(output, "{value}"),
    }
}

fn write_number(output: &mut impl Write, value: &Value) -> fmt::Result {
    if value.is_integer() {
        return write!(output, "{value}");
    }
    match f64::try_from(value.clone()) {
        Ok(number) => output.write_str(&float(number)),
        Err(_) => write!(output, "{value}"),
    }
}

/// `repr(number)`: the shortest digits that read back as the same number, scientific below 1e-4 and from 1e16.
pub fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.unsigned_abs());
    }
    let plain = format!("{number}");
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}

/// `repr(text)`.
fn write_quoted(output: &mut impl Write, text: &str) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    output.write_char(quote)?;
    for character in text.chars() {
        match character {
            '\\' => output.write_str("\\\\")?,
            '\n' => output.write_str("\\n")?,
            '\r' => output.write_str("\\r")?,
            '\t' => output.write_str("\\t")?,
            _ if character == quote => write!(output, "\\{quote}")?,
            '\0'..='\u{1f}' | '\u{7f}'..='\u{a0}' | '\u{ad}' => {
                write!(output, "\\x{:02x}", character as u32)?;
            }
            _ => output.write_char(character)?,
        }
    }
    output.write_char(quote)
}

/// The options of `json.dumps`.
pub struct Dump {
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
    item: String,
    key: String,
}

impl Dump {
    pub fn new(indent: Option<usize>, ensure_ascii: bool, sort_keys: bool) -> Self {
        Self {
            indent,
            ensure_ascii,
            sort_keys,
            item: if indent.is_some() { "," } else { ", " }.to_owned(),
            key: ": ".to_owned(),
        }
    }

    pub fn separators(&mut self, item: &str, key: &str) {
        item.clone_into(&mut self.item);
        key.clone_into(&mut self.key);
    }

    /// # Errors
    /// A value that JSON has no form for.
    pub fn json(&self, value: &Value) -> Result<String, Error> {
        let mut text = String::new();
        self.write(&mut text, value, 0)?;
        Ok(text)
    }

    fn write(&self, text: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        fits(text.len())?;
        match value.kind() {
            ValueKind::None => text.push_str("null"),
            ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let before = text.len();
                // A String takes whatever is written.
                let _ = write_number(text, value);
                let named = match &text[before..] {
                    "nan" => Some("NaN"),
                    "inf" => Some("Infinity"),
                    "-inf" => Some("-Infinity"),
                    _ => None,
                };
                if let Some(named) = named {
                    text.replace_range(before.., named);
                }
            }
            ValueKind::String => self.string(text, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.block(text, ['[', ']'], items.len(), depth, |text, index| {
                    self.write(text, &items[index], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.block(text, ['{', '}'], keys.len(), depth, |text, index| {
                    let name = match keys[index].as_str() {
                        Some(name) => name.to_owned(),
                        None => self.json(&keys[index])?,
                    };
                    self.string(text, &name);
                    text.push_str(&self.key);
                    self.write(text, &value.get_item(&keys[index])?, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::BadSerialization,
                    format!("tojson cannot write a value that is {kind}"),
                ));
            }
        }
        Ok(())
    }

    fn block(
        &self,
        text: &mut String,
        brackets: [char; 2],
        count: usize,
        depth: usize,
        mut write: impl FnMut(&mut String, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        text.push(brackets[0]);
        for index in 0..count {
            if index > 0 {
                text.push_str(&self.item);
            }
            self.line(text, depth + 1);
            write(text, index)?;
        }
        if count > 0 {
            self.line(text, depth);
        }
        text.push(brackets[1]);
        Ok(())
    }

    fn line(&self, text: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&self, text: &mut String, value: &str) {
        let quoted = serde_json::Value::from(value).to_string();
        if !self.ensure_ascii {
            text.push_str(&quoted);
            return;
        }
        let mut units = [0; 2];
        for character in quoted.chars() {
            if character.is_ascii() && character != '\u{7f}' {
                text.push(character);
                continue;
            }
            for unit in character.encode_utf16(&mut units) {
                // A String takes whatever is written.
                let _ = write!(text, "\\u{unit:04x}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::float;

    #[test]
    fn floats_as_python_prints_them() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1.25e-5, "1.25e-05"),
            (123456.789, "123456.789"),
        ];
        for (number, text) in cases {
            assert_eq!(float(number), text);
        }
    }
}
