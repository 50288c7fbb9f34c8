//! Which columns of a file hold the text, by name.

use serde::Deserialize;

use super::record::{Content, Item, Reason, Record, Skip};
use crate::error::{Error, Result};

/// Names shown in an error before the rest is only counted.
const SHOWN_NAMES: usize = 20;
/// Characters shown of one name.
const SHOWN_CHARACTERS: usize = 40;

/// The caller's choice of columns. All `None`: `text`, or else `prompt` and `completion`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Columns {
    pub text_column: Option<String>,
    pub prompt_column: Option<String>,
    pub completion_column: Option<String>,
    /// Kept on each record for splits by group.
    #[serde(rename = "group")]
    pub group_column: Option<String>,
}

/// A column by name, and its place among the names of a file.
#[derive(Debug, Clone)]
pub(super) struct Column {
    pub name: String,
    pub index: usize,
}

/// The columns that one file is read by.
#[derive(Debug, Clone)]
pub(super) struct Selection {
    pub content: ContentColumns,
    pub group: Option<Column>,
}

#[derive(Debug, Clone)]
pub(super) enum ContentColumns {
    Text(Column),
    Completion { prompt: Column, completion: Column },
}

/// One value of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Cell {
    Missing,
    Null,
    Text(String),
}

impl Columns {
    /// # Errors
    /// Two ways of reading the same record were asked for.
    pub fn validate(&self) -> Result<()> {
        if self.text_column.is_some()
            && (self.prompt_column.is_some() || self.completion_column.is_some())
        {
            return Err(Error::argument(
                "text_column cannot be combined with prompt_column or completion_column: a record is either one text or a prompt with its completion",
            ));
        }
        Ok(())
    }

    pub(super) fn any_named(&self) -> bool {
        self.text_column.is_some()
            || self.prompt_column.is_some()
            || self.completion_column.is_some()
            || self.group_column.is_some()
    }

    /// The content columns to look for, best first.
    fn choices(&self) -> Vec<[Option<&str>; 2]> {
        let prompt = self.prompt_column.as_deref().unwrap_or("prompt");
        let completion = self.completion_column.as_deref().unwrap_or("completion");
        let pair = [Some(prompt), Some(completion)];
        match &self.text_column {
            Some(text) => vec![[Some(text), None]],
            None if self.prompt_column.is_some() || self.completion_column.is_some() => vec![pair],
            None => vec![[Some("text"), None], pair],
        }
    }

    /// Every name that could be read, without repeats.
    pub(super) fn candidates(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        let content = self.choices().into_iter().flatten().flatten();
        for name in content.chain(self.group_column.as_deref()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// The first choice whose columns `find` all finds; the group column must be there too.
    pub(super) fn select_with(&self, find: impl Fn(&str) -> Option<usize>) -> Option<Selection> {
        let column = |name: &str| {
            find(name).map(|index| Column {
                name: name.to_owned(),
                index,
            })
        };
        let group = match &self.group_column {
            Some(name) => Some(column(name)?),
            None => None,
        };
        let content = self.choices().into_iter().find_map(|choice| match choice {
            [Some(text), None] => column(text).map(ContentColumns::Text),
            [Some(prompt), Some(completion)] => Some(ContentColumns::Completion {
                prompt: column(prompt)?,
                completion: column(completion)?,
            }),
            _ => None,
        })?;
        Some(Selection { content, group })
    }

    /// Chooses among the names of a file with a header or a schema.
    ///
    /// # Errors
    /// The message for a column that is not there (with those that are) or is there twice.
    pub(super) fn select(&self, names: &[&str]) -> std::result::Result<Selection, String> {
        let selection = self
            .select_with(|name| names.iter().position(|other| *other == name))
            .ok_or_else(|| self.missing(names))?;
        for column in selection.columns() {
            if names.iter().filter(|name| **name == column.name).count() > 1 {
                return Err(format!(
                    "the column `{}` is there more than once; rename one of them",
                    column.name
                ));
            }
        }
        Ok(selection)
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
            .any(|choice| choice.iter().flatten().all(|name| !absent(name)));
        if !found {
            wanted.extend(choices.iter().flatten().flatten().copied().filter(absent));
        }
        wanted.extend(self.group_column.as_deref().filter(absent));
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
            "; name yours with text_column, or with prompt_column and completion_column"
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
    pub fn columns(&self) -> impl Iterator<Item = &Column> {
        let (first, second) = match &self.content {
            ContentColumns::Text(text) => (text, None),
            ContentColumns::Completion { prompt, completion } => (prompt, Some(completion)),
        };
        std::iter::once(first)
            .chain(second)
            .chain(self.group.as_ref())
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
        }
        if let Some(group) = &mut self.group {
            change(group);
        }
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
            Cell::Text(text) => check(text, &column.name, may_be_empty),
        };
        let content = match &self.content {
            ContentColumns::Text(text) => Content::Text(value(text, false)?),
            ContentColumns::Completion { prompt, completion } => Content::Completion {
                prompt: value(prompt, true)?,
                completion: value(completion, false)?,
            },
        };
        let group = match &self.group {
            Some(group) => Some(value(group, false)?),
            None => None,
        };
        Ok(Record {
            content,
            group,
            file: 0,
            number,
        })
    }
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
