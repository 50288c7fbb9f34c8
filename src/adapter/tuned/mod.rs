//! Adapters of the methods beside LoRA: their configurations, and one folder format for all.

mod bottleneck;
mod ia3;
mod prompt;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

pub use bottleneck::{BottleneckConfig, INFIX, Variant};
pub use ia3::{Ia3Config, Ia3Selection};
pub use prompt::{PROMPT_EMBEDDINGS, VirtualConfig, VirtualKind};

use super::config::{CONFIG_FILE, PEFT_VERSION, ascii, read_fields};
use super::fields::{Parsed, Problem, field, strings};
use super::file::{PREFIX, SavedTensor, WEIGHTS_FILE, is_saved, open_weights};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::folder::{PT_METADATA, Staging, Tensor};

/// What every configuration of PEFT has.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Common {
    /// Names or ends of names of modules that were trained whole and saved beside the method's tensors.
    pub modules_to_save: Vec<String>,
    /// `task_type`, `base_model_name_or_path`, `revision` and `auto_mapping`, where they are set.
    pub kept: Map<String, Value>,
}

const KEPT: [&str; 4] = [
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
];
const ALWAYS: [&str; 4] = [
    "peft_type",
    "peft_version",
    "inference_mode",
    "modules_to_save",
];

impl Common {
    fn parse(map: &Map<String, Value>) -> Parsed<Self> {
        let kept = KEPT.iter();
        let kept = kept.filter_map(|&name| Some((name.to_owned(), map.get(name)?.clone())));
        Ok(Self {
            modules_to_save: field(map, "modules_to_save", "a list of strings", strings)?
                .unwrap_or_default(),
            kept: kept.filter(|(_, value)| !value.is_null()).collect(),
        })
    }

    /// The fields that every file has, with `peft_type`.
    fn fields(&self, peft_type: &str) -> BTreeMap<&'static str, Value> {
        let kept = |name| self.kept.get(name).cloned().unwrap_or(Value::Null);
        let saved = &self.modules_to_save;
        let mut fields: BTreeMap<_, _> = KEPT.iter().map(|&name| (name, kept(name))).collect();
        fields.extend([
            ("peft_type", json!(peft_type)),
            ("peft_version", json!(PEFT_VERSION)),
            ("inference_mode", json!(true)),
            (
                "modules_to_save",
                if saved.is_empty() {
                    Value::Null
                } else {
                    json!(saved)
                },
            ),
        ]);
        fields
    }
}

/// The configuration of a method beside LoRA.
#[derive(Debug, Clone, PartialEq)]
pub enum TunedConfig {
    Ia3(Ia3Config),
    Virtual(VirtualConfig),
    Bottleneck(BottleneckConfig),
}

impl TunedConfig {
    /// The method's name in the settings of a run.
    pub fn method(&self) -> &'static str {
        match self {
            Self::Ia3(_) => "ia3",
            Self::Virtual(config) if config.is_prefix() => "prefix",
            Self::Virtual(_) => "prompt",
            Self::Bottleneck(_) => "adapter",
        }
    }

    pub fn common(&self) -> &Common {
        match self {
            Self::Ia3(config) => &config.common,
            Self::Virtual(config) => &config.common,
            Self::Bottleneck(config) => &config.common,
        }
    }

    pub fn common_mut(&mut self) -> &mut Common {
        match self {
            Self::Ia3(config) => &mut config.common,
            Self::Virtual(config) => &mut config.common,
            Self::Bottleneck(config) => &mut config.common,
        }
    }

    fn parse(map: &Map<String, Value>) -> Parsed<(Self, Vec<String>)> {
        if map.get("adapter_type").and_then(Value::as_str) == Some(bottleneck::ADAPTER_TYPE) {
            let (config, warnings) = BottleneckConfig::parse(map)?;
            return Ok((Self::Bottleneck(config), warnings));
        }
        let kind = map.get("peft_type").and_then(Value::as_str);
        match kind {
            Some(ia3::PEFT_TYPE) => {
                let (config, warnings) = Ia3Config::parse(map)?;
                Ok((Self::Ia3(config), warnings))
            }
            Some(prompt::PROMPT_TYPE | prompt::PREFIX_TYPE) => {
                let is_prefix = kind == Some(prompt::PREFIX_TYPE);
                let (config, warnings) = VirtualConfig::parse(map, is_prefix)?;
                Ok((Self::Virtual(config), warnings))
            }
            _ => Err(Problem::Unsupported(format!(
                "peft_type={} is not supported; LORA, IA3, PROMPT_TUNING and PREFIX_TUNING are",
                map.get("peft_type").unwrap_or(&Value::Null)
            ))),
        }
    }

    /// All fields of the file.
    pub fn to_json(&self) -> Map<String, Value> {
        let fields = match self {
            Self::Ia3(config) => config.fields(),
            Self::Virtual(config) => config.fields(),
            Self::Bottleneck(config) => config.fields(),
        };
        let owned = |(name, value): (&str, Value)| (name.to_owned(), value);
        fields.into_iter().map(owned).collect()
    }

    /// Whether a tensor is the method's own.
    fn owns(&self, tensor: &str) -> bool {
        match self {
            Self::Ia3(_) => tensor.ends_with(ia3::VECTOR),
            Self::Virtual(_) => tensor == PROMPT_EMBEDDINGS,
            Self::Bottleneck(_) => tensor.contains(INFIX),
        }
    }

    /// What stands before the names of modules in the file.
    fn prefix(&self) -> &'static str {
        match self {
            Self::Ia3(_) => PREFIX,
            Self::Virtual(_) => prompt::PREFIX,
            Self::Bottleneck(_) => "",
        }
    }

    /// The number of virtual tokens before each document.
    pub fn virtual_tokens(&self) -> usize {
        match self {
            Self::Virtual(config) => config.num_virtual_tokens,
            Self::Ia3(_) | Self::Bottleneck(_) => 0,
        }
    }
}

/// An adapter of a method beside LoRA, tensors in row-major f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    pub config: TunedConfig,
    /// The method's own, by name: those of modules by the module's name in the base model.
    pub tensors: BTreeMap<String, SavedTensor>,
    /// Tensors of the configuration's `modules_to_save` by their names in the base model.
    pub saved: BTreeMap<String, SavedTensor>,
}

/// Whether a folder's adapter_config.json is of LoRA, or of no method that is known.
///
/// # Errors
/// `Format` if the file is missing or no JSON object; `Io` if it cannot be read.
pub fn is_lora(folder: &Path) -> Result<bool> {
    let (_, map) = read_fields(folder)?;
    let kind = map.get("peft_type").and_then(Value::as_str);
    let own = map.contains_key("adapter_type");
    Ok(!own && kind.is_none_or(|kind| kind == "LORA"))
}

/// Reads an adapter folder of a method beside LoRA, and warnings for the caller to show.
///
/// # Errors
/// As [`super::read`]'s.
pub fn read_tuned(folder: &Path) -> Result<(Tuned, Vec<String>)> {
    let (path, map) = read_fields(folder)?;
    let (config, warnings) = TunedConfig::parse(&map).map_err(|problem| problem.at(&path))?;
    let weights = open_weights(folder)?;
    let (mut tensors, mut saved) = (BTreeMap::new(), BTreeMap::new());
    for stored in weights.names() {
        let name = stored.strip_prefix(config.prefix()).unwrap_or(stored);
        let tensor = SavedTensor {
            shape: weights.get(stored)?.shape.to_vec(),
            values: weights.to_f32(stored)?,
        };
        if config.owns(name) {
            tensors.insert(name.to_owned(), tensor);
        } else if is_saved(&config.common().modules_to_save, name) {
            saved.insert(name.to_owned(), tensor);
        } else {
            return Err(Error::format(
                weights.path(),
                format!(
                    "unexpected tensor '{stored}' in an adapter of {}",
                    config.method()
                ),
            ));
        }
    }
    if tensors.is_empty() {
        return Err(Error::format(
            folder.join(WEIGHTS_FILE),
            format!("no tensor of {}", config.method()),
        ));
    }
    let tuned = Tuned {
        config,
        tensors,
        saved,
    };
    Ok((tuned, warnings))
}

/// Writes the folder as PEFT's `save_pretrained` does, tensors in `dtype`: see [`super::write`].
///
/// # Errors
/// `Io` if a file cannot be written.
pub fn write_tuned(
    folder: &Path,
    tuned: &Tuned,
    dtype: DType,
    model_card: &str,
    model_config: Option<&str>,
) -> Result<()> {
    let tensors = tuned.tensors.iter().chain(&tuned.saved);
    let tensors = tensors.map(|(name, tensor)| {
        let name = match name.as_str() {
            PROMPT_EMBEDDINGS => name.clone(),
            _ => format!("{}{name}", tuned.config.prefix()),
        };
        Tensor::from_f32(name, dtype, &tensor.shape, &tensor.values)
    });
    let mut staging = Staging::new(folder)?;
    if let Some(config) = model_config {
        staging.write("config.json", config.as_bytes())?;
    }
    staging.safetensors(WEIGHTS_FILE, tensors.collect(), &PT_METADATA)?;
    staging.write("README.md", model_card.as_bytes())?;
    staging.write(CONFIG_FILE, ascii(tuned.config.to_json()).as_bytes())?;
    staging.commit()
}
