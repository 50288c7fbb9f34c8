//! What a model folder's config.json says, in the terms of the one transformer.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::labels::Labels;
use super::names::{Family, Names};
use super::transformer::{Activation, NormKind, Placement};
use super::{bert, gpt2, llama};
use crate::engine::ops::gelu::Gelu;
use crate::engine::ops::rope::Scaling;
use crate::error::{Error, Result};
use crate::folder::ConfigFile;

/// What a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    Generation,
    Classification,
}

/// What stands on top of the layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// A token of the vocabulary follows.
    Language,
    /// A class for a whole text.
    Classification(Labels),
}

/// Sizes, constants and parts of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub family: Family,
    /// The class that config.json names.
    pub class: String,
    pub head: Head,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub norm: NormKind,
    pub norm_eps: f32,
    pub placement: Placement,
    pub activation: Activation,
    /// Base and scaling of the rotary embedding; none where positions are learned.
    pub rope: Option<(f64, Scaling)>,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

/// Classes that can be read, and what the weights in their folders are for.
const CLASSES: [(&str, Family, Task); 10] = [
    ("LlamaForCausalLM", Family::Llama, Task::Generation),
    (
        "LlamaForSequenceClassification",
        Family::Llama,
        Task::Classification,
    ),
    ("LlamaModel", Family::Llama, Task::Classification),
    ("GPT2LMHeadModel", Family::Gpt2, Task::Generation),
    (
        "GPT2ForSequenceClassification",
        Family::Gpt2,
        Task::Classification,
    ),
    ("GPT2Model", Family::Gpt2, Task::Classification),
    (
        "BertForSequenceClassification",
        Family::Bert,
        Task::Classification,
    ),
    ("BertModel", Family::Bert, Task::Classification),
    ("BertForMaskedLM", Family::Bert, Task::Classification),
    ("BertForPreTraining", Family::Bert, Task::Classification),
];

impl Architecture {
    /// Reads `folder`'s config.json; the defaults of absent fields are transformers'.
    ///
    /// # Errors
    /// `Unsupported` for a class or a setting without code here; `Format` for a broken file.
    pub fn read(folder: &Path) -> Result<Self> {
        Self::of(&ConfigFile::open(folder)?)
    }

    /// As [`Self::read`], for a file that is open.
    pub fn of(file: &ConfigFile) -> Result<Self> {
        let class = file.architecture()?;
        let Some(&(_, family, task)) = CLASSES.iter().find(|(name, ..)| *name == class) else {
            let known: Vec<&str> = CLASSES.iter().map(|(name, ..)| *name).collect();
            return Err(Error::unsupported(format!(
                "{}: the architecture {class} is not supported; the engine runs {}",
                file.path().display(),
                known.join(", ")
            )));
        };
        let head = match task {
            Task::Generation => Head::Language,
            Task::Classification if class == family.classification_class() => {
                single_label(file)?;
                Head::Classification(Labels::read(file)?)
            }
            Task::Classification => Head::Classification(Labels {
                names: Vec::new(),
                fresh: true,
            }),
        };
        let read = match family {
            Family::Llama => llama::read,
            Family::Gpt2 => gpt2::read,
            Family::Bert => bert::read,
        };
        let architecture = Self {
            class: class.to_owned(),
            head,
            ..read(file)?
        };
        architecture.check(file)?;
        Ok(architecture)
    }

    fn check(&self, file: &ConfigFile) -> Result<()> {
        let size = |llamas: &'static str, gpt2s: &'static str| match self.family {
            Family::Gpt2 => gpt2s,
            _ => llamas,
        };
        for (key, value) in [
            (size("hidden_size", "n_embd"), self.hidden_size),
            (size("intermediate_size", "n_inner"), self.intermediate_size),
            (size("num_hidden_layers", "n_layer"), self.num_hidden_layers),
            (
                size("num_attention_heads", "n_head"),
                self.num_attention_heads,
            ),
            ("num_key_value_heads", self.num_key_value_heads),
            ("vocab_size", self.vocab_size),
            (
                size("max_position_embeddings", "n_positions"),
                self.max_position_embeddings,
            ),
        ] {
            if value == 0 {
                return Err(file.wrong(key, "a positive whole number"));
            }
        }
        let rotary = self.rope.is_some();
        if self.head_dim == 0 || (rotary && self.head_dim % 2 == 1) {
            return Err(file.wrong("head_dim", "an even positive number"));
        }
        if !rotary && !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(file.wrong(
                size("hidden_size", "n_embd"),
                "a multiple of the number of attention heads",
            ));
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            return Err(file.wrong("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        Ok(())
    }

    pub fn names(&self) -> &'static Names {
        self.family.names()
    }

    pub fn task(&self) -> Task {
        match self.head {
            Head::Language => Task::Generation,
            Head::Classification(_) => Task::Classification,
        }
    }

    /// The classes; none of a language model.
    pub fn labels(&self) -> Option<&Labels> {
        match &self.head {
            Head::Language => None,
            Head::Classification(labels) => Some(labels),
        }
    }

    /// The class of a model that was trained as this one is.
    pub fn trained_class(&self) -> &str {
        match self.head {
            Head::Language => &self.class,
            Head::Classification(_) => self.family.classification_class(),
        }
    }

    /// The module whose output is the model's.
    pub fn output(&self) -> &'static str {
        match self.head {
            Head::Language => super::names::LM_HEAD,
            Head::Classification(_) => self.names().classifier,
        }
    }

    /// The fields of config.json that are others once the model is trained for its task.
    pub fn changes(&self, file: &ConfigFile) -> Map<String, Value> {
        let mut changes = Map::new();
        if let Head::Classification(labels) = &self.head {
            changes.insert("architectures".to_owned(), json!([self.trained_class()]));
            let labels = labels.to_json();
            changes.extend(labels.map(|(key, value)| (key.to_owned(), value)));
            let problem = json!("single_label_classification");
            changes.insert("problem_type".to_owned(), problem);
            // Without one, transformers classifies a single row at a time.
            if self.family.is_causal()
                && file.opt("pad_token_id").is_none()
                && let Some(eos) = self.eos_token_ids.first()
            {
                changes.insert("pad_token_id".to_owned(), json!(eos));
            }
        }
        changes
    }
}

fn single_label(file: &ConfigFile) -> Result<()> {
    match file.str_opt("problem_type")? {
        None | Some("single_label_classification") => Ok(()),
        Some(other) => Err(Error::unsupported(format!(
            "{}: problem_type {other} is not supported; single_label_classification is",
            file.path().display()
        ))),
    }
}

/// The GELU that a config.json names under `key`, or `default` where it names none.
pub(super) fn gelu(file: &ConfigFile, key: &'static str, default: &str) -> Result<Gelu> {
    match file.str_opt(key)?.unwrap_or(default) {
        "gelu" => Ok(Gelu::Exact),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Gelu::Tanh),
        _ => Err(file.wrong(key, "\"gelu\", \"gelu_new\" or \"gelu_pytorch_tanh\"")),
    }
}

/// An error for a setting that changes a model's mathematics into what there is no code for.
pub(super) fn unsupported(file: &ConfigFile, what: &str, instead: &str) -> Error {
    Error::unsupported(format!(
        "{}: {what} is not supported; {instead}",
        file.path().display()
    ))
}
