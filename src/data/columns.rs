//! Which columns of a file hold the text, by name.

use std::collections::HashSet;

use serde::Deserialize;

use super::chat;
use super::record::{Content, Item, Reason, Record, Skip};
use crate::error::{Error, Result};

/// Names shown in an error before the rest is only counted.
const SHOWN_NAMES: usize = 20;
/// Characters shown of one name.
const SHOWN_CHARACTERS: usize = 40;

/// What conversations' tools are found under.
const TOOLS: &str = "tools";
/// What classes are found under, where no column is named for them.
const LABEL: &str = "label";

/// The caller's choice of columns. All `None`: `text`, or `messages`, or else `prompt` and `completion`; with a text its
/// `label`, and with messages their `tools`, where there are any.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Columns {
    pub text_column: Option<String>,
    pub prompt_column: Option<String>,
    pub completion_column: Option<String>,
    #[serde(default)]
    pub messages_column: Option<String>,
    #[serde(default)]
    pub label_column: Option<String>,
    /// Kept on each record for splits by group.
    #[serde(rename = "group")]
    pub group_column: Option<String>,
    /// Kept on each record, to compare how groups are treated.
    #[serde(default)]
    pub bias_column: Option<String>,
    /// Whether each record keeps all its columns ([`Record::row`]); texts of `.txt` files have none.
    #[serde(skip)]
    pub whole: bool,
}

/// A column by name, and its place among the names of a file.
#[derive(Debug, Clone)]
pub(super) struct Column {
    pub name: String,
    pub index: usize,
}

/// What a column's values may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Strings.
    Text,
    /// Lists and objects, or JSON in strings.
    Nested,
    /// Strings, numbers, truth values.
    Group,
    /// As a group; one that was not asked for is left out where it is something else.
    Label,
}

impl Role {
    pub fn wants(self) -> &'static str {
        match self {
            Self::Text => "a string",
            Self::Nested => "a list",
            Self::Group | Self::Label => "a string or a number",
        }
    }
}

/// The columns that one file is read by.
#[derive(Debug, Clone)]
pub(super) struct Selection {
    pub content: ContentColumns,
    pub label: Option<Column>,
    /// Whether the label was asked for, so that a record without one is left out.
    pub label_named: bool,
    pub group: Option<Column>,
    pub bias: Option<Column>,
}

#[derive(Debug, Clone)]
pub(super) enum ContentColumns {
    Text(Column),
    Completion {
        prompt: Column,
        completion: Column,
    },
    Messages {
        messages: Column,
        tools: Option<Column>,
    },
}

/// One value of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cell {
    Missing,
    Null,
    Text(String),
    /// A list or an object, as JSON.
    Nested(String),
}

/// One way to read a record, by the names of its columns.
#[derive(Debug, Clone, Copy)]
enum Choice<'a> {
    Text(&'a str),
    Messages(&'a str),
    Completion(&'a str, &'a str),
}

impl<'a> Choice<'a> {
    fn names(self) -> impl Iterator<Item = &'a str> {
        let (first, second) = match self {
            Self::Text(name) | Self::Messages(name) => (name, None),
            Self::Completion(prompt, completion) => (prompt, Some(completion)),
        };
        std::iter::once(first).chain(second)
    }
}

impl Columns {
    /// # Errors
    /// Two ways of reading the same record were asked for.
    pub fn validate(&self) -> Result<()> {
        let ways = [
            self.text_column.is_some(),
            self.messages_column.is_some(),
            self.prompt_column.is_some() || self.completion_column.is_some(),
        ];
        if ways.into_iter().filter(|way| *way).count() > 1 {
            return Err(Error::argument(
                "text_column cannot be combined with prompt_column or completion_column, nor messages_column with any of them: a record is either one text, a prompt with its completion, or messages",
            ));
        }
        Ok(())
    }

    pub(super) fn any_named(&self) -> bool {
        self.text_column.is_some()
            || self.prompt_column.is_some()
            || self.completion_column.is_some()
            || self.messages_column.is_some()
            || self.label_column.is_some()
            || self.group_column.is_some()
            || self.bias_column.is_some()
    }

    /// The content columns to look for, best first.
    fn choices(&self) -> Vec<Choice<'_>> {
        let prompt = self.prompt_column.as_deref().unwrap_or("prompt");
        let completion = self.completion_column.as_deref().unwrap_or("completion");
        let pair = Choice::Completion(prompt, completion);
        if let Some(text) = &self.text_column {
            vec![Choice::Text(text)]
        } else if let Some(messages) = &self.messages_column {
            vec![Choice::Messages(messages)]
        } else if self.prompt_column.is_some() || self.completion_column.is_some() {
            vec![pair]
        } else {
            vec![Choice::Text("text"), Choice::Messages("messages"), pair]
        }
    }

    /// The column of the classes, named or not.
    pub(super) fn label(&self) -> &str {
        self.label_column.as_deref().unwrap_or(LABEL)
    }

    /// Every name that could be read, without repeats, and whether it may hold a list.
    pub(super) fn candidates(&self) -> Vec<(&str, bool)> {
        let mut names: Vec<(&str, bool)> = Vec::new();
        let mut add = |name, nested| {
            if !names.iter().any(|(other, _)| *other == name) {
                names.push((name, nested));
            }
        };
        for choice in self.choices() {
            let nested = matches!(choice, Choice::Messages(_));
            for name in choice.names() {
                add(name, nested);
            }
            match choice {
                Choice::Messages(_) => add(TOOLS, true),
                Choice::Text(_) => add(self.label(), false),
                Choice::Completion(..) => {}
            }
        }
        let groups = self.group_column.iter().chain(&self.bias_column);
        for name in self.label_column.iter().chain(groups) {
            add(name, false);
        }
        names
    }

    /// The first choice whose columns `find` all finds; the columns named for groups and label must be there too.
    pub(super) fn select_with(&self, find: impl Fn(&str) -> Option<usize>) -> Option<Selection> {
        let column = |name: &str| {
            find(name).map(|index| Column {
                name: name.to_owned(),
                index,
            })
        };
        let named = |name: &Option<String>| match name {
            Some(name) => column(name).map(Some),
            None => Some(None),
        };
        let (group, bias) = (named(&self.group_column)?, named(&self.bias_column)?);
        let content = self.choices().into_iter().find_map(|choice| match choice {
            Choice::Text(text) => column(text).map(ContentColumns::Text),
            Choice::Messages(messages) => Some(ContentColumns::Messages {
                messages: column(messages)?,
                tools: column(TOOLS),
            }),
            Choice::Completion(prompt, completion) => Some(ContentColumns::Completion {
                prompt: column(prompt)?,
                completion: column(completion)?,
            }),
        })?;
        let label = match (&self.label_column, &content) {
            (Some(name), _) => Some(column(name)?),
            (None, ContentColumns::Text(text)) if text.name != LABEL => column(LABEL),
            (None, _) => None,
        };
        Some(Selection {
            content,
            label,
            label_named: self.label_column.is_some(),
            group,
            bias,
        })
    }

    /// Chooses among the names of a file with a header or a schema.
    ///
    /// # Errors
    /// The message for a column that is not there (with those that are) or is there twice.
    pub(super) fn select(&self, names: &[&str]) -> std::result::Result<Selection, String> {
        let selection = self
            .select_with(|name| names.iter().position(|other| *other == name))
            .ok_or_else(|| self.missing(names))?;
        for (_, column) in selection.columns() {
            if names.iter().filter(|name| **name == column.name).count() > 1 {
                return Err(twice(&column.name));
            }
        }
        let mut seen = HashSet::new();
        match names.iter().find(|name| self.whole && !seen.insert(**name)) {
            Some(name) => Err(twice(name)),
            None => Ok(selection),
        }
    }

    /// Says which columns are not among `names`, and which are.
    pub(super) fn missing(&self, names: &[&str]) -> String {
        let quoted = |name: &str| {
            let short: String = name.chars().take(SHOWN_CHARACTERS).collect();
            let dots = if short.len() < name.len() { "…" } else { "" };
            format!("`{}{dots}`", short.escape_debug())
        };
        let absent = |name: &&str| !names.contains(name);
        let mut wanted: Vec<&str> = Vec::new();
        let choices = self.choices();
        let found = choices
            .iter()
            .any(|choice| choice.names().all(|name| !absent(&name)));
        if !found {
            wanted.extend(
                choices
                    .iter()
                    .flat_map(|choice| choice.names())
                    .filter(absent),
            );
        }
        wanted.extend(self.label_column.as_deref().filter(absent));
        wanted.extend(self.group_column.as_deref().filter(absent));
        wanted.extend(self.bias_column.as_deref().filter(absent));
        let wanted: Vec<String> = wanted.into_iter().map(quoted).collect();
        let mut there: Vec<String> = names
            .iter()
            .take(SHOWN_NAMES)
            .copied()
            .map(quoted)
            .collect();
        if names.len() > SHOWN_NAMES {
            there.push(format!("and {} more", names.len() - SHOWN_NAMES));
        }
        let there = if there.is_empty() {
            "none".to_owned()
        } else {
            there.join(", ")
        };
        let advice = if choices.len() > 1 && !found {
            "; name yours with text_column, with messages_column, or with prompt_column and completion_column"
        } else {
            ""
        };
        format!(
            "no column {}; the columns are: {there}{advice}",
            wanted.join(" or ")
        )
    }
}

impl Selection {
    pub fn columns(&self) -> impl Iterator<Item = (Role, &Column)> {
        let (first, second) = match &self.content {
            ContentColumns::Text(text) => ((Role::Text, text), None),
            ContentColumns::Completion { prompt, completion } => {
                ((Role::Text, prompt), Some((Role::Text, completion)))
            }
            ContentColumns::Messages { messages, tools } => (
                (Role::Nested, messages),
                tools.as_ref().map(|tools| (Role::Nested, tools)),
            ),
        };
        let label = if self.label_named {
            Role::Group
        } else {
            Role::Label
        };
        std::iter::once(first)
            .chain(second)
            .chain(self.label.as_ref().map(|column| (label, column)))
            .chain(self.group.as_ref().map(|column| (Role::Group, column)))
            .chain(self.bias.as_ref().map(|column| (Role::Group, column)))
    }

    /// Replaces each column's index, as after a projection.
    pub fn reindex(&mut self, index: impl Fn(usize) -> usize) {
        let change = |column: &mut Column| column.index = index(column.index);
        match &mut self.content {
            ContentColumns::Text(text) => change(text),
            ContentColumns::Completion { prompt, completion } => {
                change(prompt);
                change(completion);
            }
            ContentColumns::Messages { messages, tools } => {
                change(messages);
                tools.iter_mut().for_each(change);
            }
        }
        self.label.iter_mut().for_each(change);
        self.group.iter_mut().for_each(change);
        self.bias.iter_mut().for_each(change);
    }

    /// Makes the record `number` (of file 0) from its cells, or the reason to skip it.
    pub fn item(&self, number: usize, mut cell: impl FnMut(&Column) -> Cell) -> Item {
        match self.record(number, &mut cell) {
            Ok(record) => Item::Record(record),
            Err(reason) => Item::Skip(Skip {
                file: 0,
                number,
                reason,
            }),
        }
    }

    fn record(
        &self,
        number: usize,
        cell: &mut impl FnMut(&Column) -> Cell,
    ) -> std::result::Result<Record, Reason> {
        let mut value = |column: &Column, may_be_empty: bool| match cell(column) {
            Cell::Missing => Err(Reason::Missing(column.name.clone())),
            Cell::Null => Err(Reason::Null(column.name.clone())),
            Cell::Text(text) | Cell::Nested(text) => check(text, &column.name, may_be_empty),
        };
        let content = match &self.content {
            ContentColumns::Text(text) => Content::Text(value(text, false)?),
            ContentColumns::Completion { prompt, completion } => Content::Completion {
                prompt: value(prompt, true)?,
                completion: value(completion, false)?,
            },
            ContentColumns::Messages { messages, tools } => Content::Messages {
                messages: nested(messages, &value(messages, false)?, chat::messages)?
                    .ok_or_else(|| Reason::Empty(messages.name.clone()))?,
                tools: match tools {
                    Some(tools) => match value(tools, false) {
                        Ok(text) => nested(tools, &text, chat::tools)?,
                        Err(Reason::Missing(_) | Reason::Null(_) | Reason::Empty(_)) => None,
                        Err(reason) => return Err(reason),
                    },
                    None => None,
                },
            },
        };
        let label = match &self.label {
            Some(label) if self.label_named => Some(value(label, false)?),
            Some(label) => value(label, false).ok(),
            None => None,
        };
        let group = match &self.group {
            Some(group) => Some(value(group, false)?),
            None => None,
        };
        Ok(Record {
            content,
            label,
            group,
            // A record that names no group is trained on all the same.
            bias: self.bias.as_ref().and_then(|bias| value(bias, false).ok()),
            row: None,
            file: 0,
            number,
        })
    }
}

fn twice(name: &str) -> String {
    format!("the column `{name}` is there more than once; rename one of them")
}

/// What `parse` makes of a column's JSON.
fn nested(
    column: &Column,
    text: &str,
    parse: fn(&str) -> std::result::Result<Option<String>, String>,
) -> std::result::Result<Option<String>, Reason> {
    let parsed = parse(text).map_err(|problem| Reason::Malformed {
        column: column.name.clone(),
        problem,
    })?;
    // A NUL is escaped in JSON: what `check` looks for in other texts.
    if parsed.as_ref().is_some_and(|json| json.contains("\\u0000")) {
        return Err(Reason::Nul(column.name.clone()));
    }
    Ok(parsed)
}

/// Lets a text through that can be trained on. An empty prompt is one: its completion then begins the document.
pub(super) fn check(
    text: String,
    name: &str,
    may_be_empty: bool,
) -> std::result::Result<String, Reason> {
    if !may_be_empty && text.trim().is_empty() {
        Err(Reason::Empty(name.to_owned()))
    } else if text.contains('\0') {
        Err(Reason::Nul(name.to_owned()))
    } else {
        Ok(text)
    }
}
