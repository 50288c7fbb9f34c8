//! Writing a Hugging Face model folder: weights in shards, config.json, and the base model's small files.

use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value, json};

use super::config::pretty;
use super::staging::Staging;
use super::weights::{INDEX, SINGLE};
use super::write::Tensor;
use super::{ConfigFile, PT_METADATA};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Bytes of tensors in one shard: the 5 GB that transformers 4 made the common size (transformers 5 writes 50 GB).
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// Files that go along with a model unchanged.
const SIDE_FILES: [&str; 16] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
];

/// A model to be written.
pub struct ModelFolder<'a> {
    /// The base model's config.json.
    pub config: &'a ConfigFile,
    /// The type that config.json will state; the tensors are written as they come.
    pub dtype: DType,
    pub tensors: Vec<Tensor<'a>>,
    /// Where tokenizer, generation settings and licence are copied from.
    pub base: Option<&'a Path>,
    /// README.md
    pub model_card: Option<&'a str>,
    /// Bytes; a larger tensor gets a shard of its own. `MAX_SHARD_SIZE` unless there is a reason.
    pub max_shard_size: u64,
}

/// Writes the folder so that `transformers` loads it: `model.safetensors`, or shards with
/// `model.safetensors.index.json`. All files are complete before the first appears; weight files of an earlier model
/// in the same folder are removed after that, so the folder never mixes two models. It may be the base's own folder.
///
/// # Errors
/// `Io` if a file cannot be written (the folder then is as it was); whatever a lazy tensor returns.
pub fn write_model(folder: &Path, model: ModelFolder) -> Result<()> {
    let parameters: u64 = model.tensors.iter().map(Tensor::elements).sum();
    let size: u64 = model.tensors.iter().map(Tensor::size).sum();
    let shards = split(model.tensors, model.max_shard_size);
    let count = shards.len();
    let mut staging = Staging::new(folder)?;
    let mut weight_map = Map::new();
    let mut written = Vec::with_capacity(count + 1);
    for (number, tensors) in shards.into_iter().enumerate() {
        let name = if count == 1 {
            SINGLE.to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", number + 1)
        };
        for tensor in &tensors {
            if let Some(Value::String(other)) =
                weight_map.insert(tensor.name.clone(), json!(name.clone()))
            {
                return Err(Error::argument(format!(
                    "two tensors are named '{}' (in {other} and {name})",
                    tensor.name
                )));
            }
        }
        staging.safetensors(&name, tensors, &PT_METADATA)?;
        written.push(name);
    }
    if count > 1 {
        weight_map.sort_keys();
        let index = json!({
            "metadata": {"total_parameters": parameters, "total_size": size},
            "weight_map": weight_map,
        });
        staging.write(INDEX, pretty(&index).as_bytes())?;
        written.push(INDEX.to_owned());
    }
    if let Some(base) = model.base {
        for name in SIDE_FILES {
            let path = base.join(name);
            if path.is_file() {
                staging.copy(&path, name)?;
            }
        }
    }
    if let Some(card) = model.model_card {
        staging.write("README.md", card.as_bytes())?;
    }
    let config = dense_config(model.config.fields(), model.dtype);
    staging.write("config.json", pretty(&Value::Object(config)).as_bytes())?;
    staging.commit()?;
    remove_other_weights(folder, &written)
}

/// In the given order; a shard is closed when the next tensor would take it over `limit`.
fn split(tensors: Vec<Tensor>, limit: u64) -> Vec<Vec<Tensor>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let size = tensor.size();
        if filled > 0 && filled + size > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    shards
}

/// The base's config with the new type under the name it used (`dtype`, or `torch_dtype` before transformers 4.56),
/// and without `quantization_config`: the weights are dense now.
fn dense_config(base: &Map<String, Value>, dtype: DType) -> Map<String, Value> {
    let mut config = base.clone();
    config.shift_remove("quantization_config");
    let mut named = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key) {
            *value = json!(dtype.torch_name());
            named = true;
        }
    }
    if !named {
        // Every transformers version reads this one.
        config.insert("torch_dtype".to_owned(), json!(dtype.torch_name()));
    }
    config
}

fn remove_other_weights(folder: &Path, keep: &[String]) -> Result<()> {
    let shard = Regex::new(r"\Amodel-\d{5}-of-\d{5}\.safetensors\z")
        .map_err(|error| Error::run(error.to_string()))?;
    for entry in std::fs::read_dir(folder)
        .map_err(Error::io(folder))?
        .flatten()
    {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let weights = name == SINGLE || name == INDEX || shard.is_match(&name);
        if weights && !keep.contains(&name) {
            std::fs::remove_file(entry.path()).map_err(Error::io(entry.path()))?;
        }
    }
    Ok(())
}
