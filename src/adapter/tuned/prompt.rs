//! PEFT's configurations of prompt tuning and prefix tuning: learned virtual tokens.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{ALWAYS, Common, KEPT};
use crate::adapter::fields::{Parsed, Problem, field, rank, unknown};

pub(super) const PROMPT_TYPE: &str = "PROMPT_TUNING";
pub(super) const PREFIX_TYPE: &str = "PREFIX_TUNING";
/// The one tensor of either: `[num_virtual_tokens, token_dim]` of prompt tuning,
/// `[num_virtual_tokens, layers · 2 · token_dim]` of prefix tuning.
pub const PROMPT_EMBEDDINGS: &str = "prompt_embeddings";
/// What PEFT puts before the names of modules that are saved beside virtual tokens.
pub(super) const PREFIX: &str = "base_model.";

const SIZES: [&str; 5] = [
    "num_virtual_tokens",
    "token_dim",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
];
const OF_PROMPTS: [&str; 4] = [
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
];
const OF_PREFIXES: [&str; 3] = ["encoder_hidden_size", "prefix_projection", "init_weights"];

/// What a virtual token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VirtualKind {
    /// An input embedding (Lester et al., 2021).
    Prompt {
        /// Whether it began as the embedding of a token of the vocabulary.
        sample_vocab: bool,
    },
    /// A key and a value of every layer (Li and Liang, 2021), as they stand in the cache.
    Prefix,
}

/// PEFT's `PromptTuningConfig` or `PrefixTuningConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualConfig {
    pub common: Common,
    pub kind: VirtualKind,
    pub num_virtual_tokens: usize,
    /// Of a prompt the hidden size; of a prefix `num_attention_heads · head_dim`.
    pub token_dim: usize,
    /// Of a prefix the number of key/value heads.
    pub num_attention_heads: usize,
    pub num_layers: usize,
}

impl VirtualConfig {
    pub fn is_prefix(&self) -> bool {
        self.kind == VirtualKind::Prefix
    }

    pub(super) fn parse(map: &Map<String, Value>, prefix: bool) -> Parsed<(Self, Vec<String>)> {
        let size = |name: &str| -> Parsed<usize> {
            field(map, name, "a whole number of at least 1", rank)?
                .ok_or_else(|| Problem::Malformed(format!("missing field '{name}'")))
        };
        let submodules = field(map, SIZES[4], "a whole number of at least 1", rank)?;
        if submodules.is_some_and(|count| count != 1) {
            return Err(Problem::Unsupported(
                "num_transformer_submodules must be 1: encoder-decoder models are not supported"
                    .to_owned(),
            ));
        }
        if field(map, "prefix_projection", "true or false", Value::as_bool)? == Some(true) {
            return Err(Problem::Unsupported(
                "prefix_projection=true is not supported: the file holds the projected keys and \
                 values, set it to false to read them"
                    .to_owned(),
            ));
        }
        let init = map.get("prompt_tuning_init").and_then(Value::as_str);
        let kind = if prefix {
            VirtualKind::Prefix
        } else {
            VirtualKind::Prompt {
                sample_vocab: init == Some("SAMPLE_VOCAB"),
            }
        };
        let config = Self {
            common: Common::parse(map)?,
            kind,
            num_virtual_tokens: size("num_virtual_tokens")?,
            token_dim: size("token_dim")?,
            num_attention_heads: size("num_attention_heads")?,
            num_layers: size("num_layers")?,
        };
        let own: &[&str] = if prefix { &OF_PREFIXES } else { &OF_PROMPTS };
        let known = [&SIZES[..], own, &KEPT, &ALWAYS].concat();
        Ok((config, unknown(map, &known)))
    }

    pub(super) fn fields(&self) -> BTreeMap<&'static str, Value> {
        let kind = if self.is_prefix() {
            PREFIX_TYPE
        } else {
            PROMPT_TYPE
        };
        let mut fields = self.common.fields(kind);
        fields.extend([
            ("num_virtual_tokens", json!(self.num_virtual_tokens)),
            ("token_dim", json!(self.token_dim)),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_layers", json!(self.num_layers)),
            ("num_transformer_submodules", json!(1)),
        ]);
        match self.kind {
            VirtualKind::Prompt { sample_vocab } => {
                let init = if sample_vocab {
                    "SAMPLE_VOCAB"
                } else {
                    "RANDOM"
                };
                fields.extend(OF_PROMPTS.map(|name| (name, Value::Null)));
                fields.insert("prompt_tuning_init", json!(init));
            }
            VirtualKind::Prefix => fields.extend([
                ("encoder_hidden_size", json!(self.token_dim)),
                ("prefix_projection", json!(false)),
                ("init_weights", Value::Null),
            ]),
        }
        fields
    }
}
