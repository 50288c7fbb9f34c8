//! Prompt tuning (Lester et al., 2021) and prefix tuning (Li and Liang, 2021).

use std::collections::BTreeMap;

use super::common;
use crate::adapter::{PROMPT_EMBEDDINGS, SavedTensor, TunedConfig, VirtualConfig, VirtualKind};
use crate::engine::models::{Architecture, Beside, split_prefix};
use crate::engine::{Method, PromptInit, TrainConfig};
use crate::error::{Error, Result};

pub(super) fn fresh(config: &TrainConfig, model: &Architecture) -> Result<Beside> {
    let count = config.num_virtual_tokens;
    let (length, limit) = (config.sequence_length, model.max_position_embeddings);
    if length + count > limit {
        return Err(Error::argument(format!(
            "sequence_length {length} with num_virtual_tokens {count} is longer than the {limit} \
             positions the model was made for (max_position_embeddings)"
        )));
    }
    let kind = if config.method == Method::Prefix {
        VirtualKind::Prefix
    } else {
        VirtualKind::Prompt {
            sample_vocab: config.prompt_tuning_init == PromptInit::SampleVocab,
        }
    };
    let (token_dim, num_attention_heads) = sizes(kind, model);
    Ok(Beside::new(TunedConfig::Virtual(VirtualConfig {
        common: common(config, model),
        kind,
        num_virtual_tokens: count,
        token_dim,
        num_attention_heads,
        num_layers: model.num_hidden_layers,
    })))
}

/// `token_dim` and `num_attention_heads` as PEFT sets them for a model.
fn sizes(kind: VirtualKind, model: &Architecture) -> (usize, usize) {
    match kind {
        VirtualKind::Prompt { .. } => (model.hidden_size, model.num_attention_heads),
        VirtualKind::Prefix => {
            let heads = model.num_key_value_heads;
            (heads * model.head_dim, heads)
        }
    }
}

/// A saved adapter in a model; `tensors` become those of the engine.
pub(super) fn saved(
    config: VirtualConfig,
    tensors: &mut BTreeMap<String, SavedTensor>,
    model: &Architecture,
) -> Result<Beside> {
    let (token_dim, heads) = sizes(config.kind, model);
    let fits = |name: &str, found: usize, expected: usize| {
        if found == expected {
            return Ok(());
        }
        Err(Error::argument(format!(
            "the adapter's {name} is {found}, but this model needs {expected}"
        )))
    };
    fits("token_dim", config.token_dim, token_dim)?;
    if config.is_prefix() {
        fits("num_attention_heads", config.num_attention_heads, heads)?;
    }
    fits("num_layers", config.num_layers, model.num_hidden_layers)?;
    let count = config.num_virtual_tokens;
    if count >= model.max_position_embeddings {
        return Err(Error::argument(format!(
            "the adapter's {count} virtual tokens leave no position of the model's {} for a text",
            model.max_position_embeddings
        )));
    }
    let width = if config.is_prefix() {
        config.num_layers * 2 * token_dim
    } else {
        token_dim
    };
    let found = tensors.remove(PROMPT_EMBEDDINGS);
    let found = found.filter(|tensor| tensor.shape == [count, width]);
    let Some(tensor) = found else {
        return Err(Error::argument(format!(
            "the adapter's {PROMPT_EMBEDDINGS} must have the shape [{count}, {width}]"
        )));
    };
    if config.is_prefix() {
        tensors.extend(split_prefix(&tensor, model));
    } else {
        tensors.insert(PROMPT_EMBEDDINGS.to_owned(), tensor);
    }
    Ok(Beside::new(TunedConfig::Virtual(config)))
}
