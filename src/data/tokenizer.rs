//! A model folder's tokenizer.json and chat template, and how a record becomes tokens.

use std::path::Path;

use rayon::prelude::*;
use serde::Deserialize;
use tokenizers::PostProcessor as _;

use super::example::Example;
use super::record::{Content, Reason, Record};
use super::template::{ChatTemplate, Conversation, deep};
use crate::error::{Error, Result};

/// Records that are tokenised as one piece of work.
const CHUNK_RECORDS: usize = 32;

/// A tokenizer with the special tokens a document begins and ends with.
///
/// Special tokens of documents come from the model's configuration alone: the post-processor, truncation and padding of
/// tokenizer.json are not applied, but for [`Tokenizer::classified`], which applies the first. Text that spells a special token is that token, as in transformers.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    /// Ids the model has embeddings for: `0..vocab_size`.
    vocab_size: usize,
    /// The folder's chat template, or what is wrong with it.
    template: std::result::Result<Option<ChatTemplate>, String>,
}

/// The part of tokenizer.json that names the token for what the vocabulary lacks.
#[derive(Deserialize)]
struct Unknown {
    model: UnknownModel,
}

#[derive(Deserialize)]
struct UnknownModel {
    unk_token: Option<String>,
    unk_id: Option<u32>,
}

impl Tokenizer {
    /// Reads `folder/tokenizer.json`. `bos` and `eos` are put around every document where given; `vocab_size` is the
    /// number of rows in the model's embedding.
    ///
    /// # Errors
    /// A missing or broken tokenizer.json; `bos` or `eos` outside the vocabulary.
    pub fn from_folder(
        folder: &Path,
        bos: Option<u32>,
        eos: Option<u32>,
        vocab_size: Option<usize>,
    ) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotFound && folder.is_dir() {
                Error::format(
                    folder,
                    "the model folder has no tokenizer.json; save the tokenizer in its fast form (`AutoTokenizer.from_pretrained(…).save_pretrained(…)`)",
                )
            } else {
                Error::io(&path)(error)
            }
        })?;
        let broken = |error: &dyn std::fmt::Display| {
            Error::format(&path, format!("not a tokenizer that can be read: {error}"))
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| broken(&error))?;
        inner
            .with_truncation(None)
            .map_err(|error| broken(&error))?;
        inner.with_padding(None);
        let Unknown { model } = serde_json::from_slice(&bytes).map_err(|error| broken(&error))?;
        let unknown = model
            .unk_id
            .or_else(|| inner.token_to_id(&model.unk_token?));

        let vocab_size = vocab_size
            .unwrap_or(i32::MAX as usize)
            .min(i32::MAX as usize);
        for (name, id) in [("bos_token_id", bos), ("eos_token_id", eos)] {
            if let Some(id) = id
                && id as usize >= vocab_size
            {
                return Err(Error::argument(format!(
                    "{name} {id} is outside the model's vocabulary of {vocab_size}"
                )));
            }
        }
        Ok(Self {
            inner,
            bos,
            eos,
            unknown,
            vocab_size,
            template: ChatTemplate::from_folder(folder).map_err(|error| error.to_string()),
        })
    }

    /// The folder's chat template.
    ///
    /// # Errors
    /// [`Reason::NoTemplate`] where it has none, [`Reason::Template`] for one that cannot be used.
    pub fn template(&self) -> std::result::Result<&ChatTemplate, Reason> {
        match &self.template {
            Ok(Some(template)) => Ok(template),
            Ok(None) => Err(Reason::NoTemplate),
            Err(message) => Err(Reason::Template(message.clone())),
        }
    }

    /// The tokens of a conversation as the chat template renders it, of which the assistant's are trained. The template
    /// writes its own special tokens: none is added.
    ///
    /// With markers the mask is transformers' own: from the first token of the text's first character to the first token
    /// of its last. Without them it is every token of the text, as in TRL's completion masks.
    ///
    /// # Errors
    /// The reason to skip the record.
    pub fn chat(&self, conversation: &Conversation) -> std::result::Result<Example, Reason> {
        let template = self.template()?;
        let (text, spans) = template.spans(conversation)?;
        let exact = !template.is_marked(conversation);
        let encoding = self
            .inner
            .encode_char_offsets(text, false)
            .map_err(|error| Reason::Tokenizer(error.to_string()))?;
        let ids = encoding.get_ids().to_vec();
        self.check(&ids)?;
        let mut trained: Vec<std::ops::Range<usize>> = Vec::new();
        for span in spans {
            let Some(start) = encoding.char_to_token(span.start, 0) else {
                continue;
            };
            let end = if exact {
                // Every token that begins before the end, white space without characters too.
                let offsets = encoding.get_offsets();
                let after = offsets.iter().position(|(begin, _)| *begin >= span.end);
                after.unwrap_or(ids.len())
            } else {
                let last = span.end.checked_sub(1);
                let last = last.and_then(|last| encoding.char_to_token(last, 0));
                last.map_or(ids.len(), |last| last + 1)
            };
            let start = trained.last().map_or(start, |before| start.max(before.end));
            if start < end {
                trained.push(start..end);
            }
        }
        Ok(Example::new(ids, trained))
    }

    /// # Errors
    /// [`Error::Argument`] if the vocabulary has ids that the model has no embedding for.
    pub fn fits(&self) -> Result<()> {
        let largest = self.inner.get_vocab(true).into_values().max();
        match largest {
            Some(id) if id as usize >= self.vocab_size => Err(Error::argument(format!(
                "tokenizer.json has tokens up to id {id}, but the model's embedding has {} rows: tokenizer and model do \
                 not belong together, or the embedding was not resized to its tokenizer",
                self.vocab_size
            ))),
            _ => Ok(()),
        }
    }

    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The text's own tokens, without `bos` and `eos`.
    ///
    /// # Errors
    /// [`Error::Argument`] for text that the tokenizer refuses.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text)
            .map_err(|reason| Error::argument(reason.to_string()))
    }

    /// What a model is given to continue `text`: `bos` and the text's tokens, as a prompt is in training.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], and a token outside the model's vocabulary.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        ids.extend(self.encode(text)?);
        self.check(&ids)
            .map_err(|reason| Error::argument(reason.to_string()))?;
        Ok(ids)
    }

    /// A text's tokens for a classifier, with those that tokenizer.json's own post-processor adds (as transformers
    /// does), cut to `length` before they are added; and whether any were cut.
    ///
    /// # Errors
    /// The reason to skip the record.
    pub fn classified(
        &self,
        text: &str,
        length: usize,
    ) -> std::result::Result<(Vec<u32>, bool), Reason> {
        let refused = |error: tokenizers::Error| Reason::Tokenizer(error.to_string());
        let mut encoding = self.inner.encode_fast(text, false).map_err(refused)?;
        if encoding.is_empty() {
            return Err(Reason::NoTokens);
        }
        let unknown = |id: &u32| Some(*id) == self.unknown;
        if encoding.get_ids().iter().all(unknown) {
            return Err(Reason::UnknownTokens);
        }
        let processor = self.inner.get_post_processor();
        let added = processor.map_or(0, |processor| processor.added_tokens(false));
        let room = length.saturating_sub(added).max(1);
        let cut = encoding.len() > room;
        encoding.truncate(room, 0, tokenizers::TruncationDirection::Right);
        let encoding = self
            .inner
            .post_process(encoding, None, true)
            .map_err(refused)?;
        let ids = encoding.get_ids().to_vec();
        self.check(&ids)?;
        Ok((ids, cut))
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// [`Error::Run`] for ids that the tokenizer does not know how to spell.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, true)
            .map_err(|error| Error::run(format!("the tokenizer cannot decode: {error}")))
    }

    /// Tokenises a document: `bos`, its tokens, `eos`.
    ///
    /// In a text every token is trained, `eos` too and `bos` not. Of a prompt with its completion, the completion's
    /// tokens and `eos` are trained, and the boundary is exact: where the tokens of `prompt + completion` begin with
    /// those of the prompt alone, they are taken and the rest is the completion; where a token would straddle the
    /// boundary, prompt and completion are tokenised apart. Either way the prompt's tokens are those of
    /// [`Tokenizer::encode_prompt`], which the model sees when it generates.
    ///
    /// # Errors
    /// The reason to skip the record.
    pub fn example(&self, content: &Content) -> std::result::Result<Example, Reason> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        let start = match content {
            Content::Text(text) => {
                ids.extend(self.ids(text)?);
                self.bos.map_or(0, |_| 1)
            }
            Content::Completion { prompt, completion } => {
                let before = self.ids(prompt)?;
                let whole = self.ids(&format!("{prompt}{completion}"))?;
                let start = ids.len() + before.len();
                if whole.starts_with(&before) {
                    ids.extend(whole);
                } else {
                    ids.extend(before);
                    ids.extend(self.ids(completion)?);
                }
                start
            }
            Content::Messages { messages, tools } => {
                return self.chat(&Conversation::parse(messages, tools.as_deref())?);
            }
        };
        if ids.len() == start {
            return Err(Reason::NoTokens);
        }
        if ids[start..].iter().all(|id| Some(*id) == self.unknown) {
            return Err(Reason::UnknownTokens);
        }
        self.check(&ids)?;
        ids.extend(self.eos);
        let end = ids.len();
        Ok(Example::new(ids, Some(start..end)))
    }

    /// Tokenises records on rayon's threads, in order. Every thread works on records of its own: the tokenizers crate's
    /// inner parallelism (`TOKENIZERS_PARALLELISM`) is not used.
    pub fn examples(&self, records: &[&Record]) -> Vec<std::result::Result<Example, Reason>> {
        let chunks = records.par_chunks(CHUNK_RECORDS).map(|chunk| {
            let work = || -> Vec<_> {
                let examples = chunk.iter().map(|record| self.example(&record.content));
                examples.collect()
            };
            let is_chat = |record: &&Record| matches!(record.content, Content::Messages { .. });
            if chunk.iter().any(is_chat) {
                // One stack for all of them; without it each says what is wrong.
                deep(work).unwrap_or_else(|_| work())
            } else {
                work()
            }
        });
        chunks.flatten_iter().collect()
    }

    fn ids(&self, text: &str) -> std::result::Result<Vec<u32>, Reason> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        self.inner
            .encode_fast(text, false)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| Reason::Tokenizer(error.to_string()))
    }

    fn check(&self, ids: &[u32]) -> std::result::Result<(), Reason> {
        let vocab_size = self.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab_size) {
            Some(&id) => Err(Reason::OutsideVocabulary { id, vocab_size }),
            None => Ok(()),
        }
    }
}
