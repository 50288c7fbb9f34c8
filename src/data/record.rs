//! One record of training text, and why a record was left out.

use std::borrow::Cow;

use sha2::{Digest as _, Sha256};

/// What a record trains on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Running text: every token is trained.
    Text(String),
    /// The prompt is read, the completion is trained.
    Completion { prompt: String, completion: String },
    /// A conversation: the assistant's turns are trained. Both as JSON text: a list of objects with a `role`, and the
    /// tools' schemas.
    Messages {
        messages: String,
        tools: Option<String>,
    },
}

impl Content {
    /// All that is said in it, as one text.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Text(text) => Cow::Borrowed(text),
            Self::Completion { prompt, completion } => {
                Cow::Owned(format!("{prompt}\n{completion}"))
            }
            Self::Messages { messages, .. } => Cow::Owned(super::chat::text(messages)),
        }
    }
}

/// One record as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub content: Content,
    /// Class of a `text`: what a split is balanced by.
    pub label: Option<String>,
    /// Value of the group column: a split keeps all records of one group on one side.
    pub group: Option<String>,
    /// Value of the bias column: the group whose treatment is compared.
    pub bias: Option<String>,
    /// All its columns as a JSON object of one line, where they were to be kept ([`super::Columns::whole`]).
    pub row: Option<Box<str>>,
    /// Index of its file among those being read.
    pub file: usize,
    /// Its number in that file, from 1: paragraph (.txt), line (.jsonl), row below the header (.csv, .tsv), row
    /// (.parquet, .arrow, frames).
    pub number: usize,
}

/// 128 bits of SHA-256: records with equal digests are the same text.
pub type Digest = [u8; 16];

impl Record {
    /// Identifies the content, surrounding white space aside; the label, groups, row, file and number play no part.
    pub fn digest(&self) -> Digest {
        let mut hash = Sha256::new();
        let mut part = |tag: u8, text: &str| {
            let text = text.trim();
            hash.update([tag]);
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        match &self.content {
            Content::Text(text) => part(0, text),
            Content::Completion { prompt, completion } => {
                part(1, prompt);
                part(2, completion);
            }
            Content::Messages { messages, tools } => {
                part(3, messages);
                part(4, tools.as_deref().unwrap_or_default());
            }
        }
        let mut digest = Digest::default();
        digest.copy_from_slice(&hash.finalize()[..16]);
        digest
    }
}

/// What a reader yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Record(Record),
    Skip(Skip),
}

impl Item {
    /// Keeps what `row` says of all the columns of a record, where `keep` asks for it.
    pub(super) fn with_row(self, keep: bool, row: impl FnOnce() -> String) -> Self {
        match self {
            Self::Record(record) if keep => Self::Record(Record {
                row: Some(row().into_boxed_str()),
                ..record
            }),
            other => other,
        }
    }
}

/// A record that was left out, to be counted and reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip {
    /// As in [`Record`].
    pub file: usize,
    /// As in [`Record`]; 0 stands for the whole file.
    pub number: usize,
    pub reason: Reason,
}

/// Why a record was left out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    #[error("the file holds no records")]
    EmptyFile,
    #[error("no `{0}` in this record")]
    Missing(String),
    #[error("`{0}` is null")]
    Null(String),
    #[error("`{0}` is empty")]
    Empty(String),
    #[error("`{0}` contains a NUL byte, which no text has")]
    Nul(String),
    #[error("`{column}` {problem}")]
    Malformed { column: String, problem: String },
    #[error("no `{0}` in this record, where shots are drawn of each label")]
    Unlabelled(String),
    #[error("the same text is in the {0} data")]
    HeldOutText(&'static str),
    #[error("a near duplicate ({1} alike) is in the {0} data")]
    HeldOutNear(&'static str, String),
    #[error("its group `{1}` is in the {0} data")]
    HeldOutGroup(&'static str, String),
    #[error(
        "the tokenizer has no chat template to turn messages into text with; give a model folder whose tokenizer_config.json or chat_template.jinja holds one"
    )]
    NoTemplate,
    #[error("the chat template fails: {0}")]
    Template(String),
    #[error("no turn of an assistant, which is what is trained")]
    NoAssistant,
    #[error("the tokenizer cannot encode it: {0}")]
    Tokenizer(String),
    #[error("the tokenizer gives no tokens for it")]
    NoTokens,
    #[error("the tokenizer gives only unknown tokens for it")]
    UnknownTokens,
    #[error(
        "the tokenizer gives token {id}, outside the model's vocabulary of {vocab_size}: tokenizer and model do not belong together"
    )]
    OutsideVocabulary { id: u32, vocab_size: usize },
    #[error("no trained token in its first {0} tokens (sequence_length)")]
    Untrained(usize),
}
