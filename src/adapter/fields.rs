//! Which fields of adapter_config.json mean something here, and the error for one that means something else.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::folder::kind;

/// What is wrong with a configuration: its form, or a meaning that is not supported here.
pub(super) enum Problem {
    Malformed(String),
    Unsupported(String),
}

impl Problem {
    /// As an error of the file it was found in.
    pub fn at(self, path: &Path) -> Error {
        match self {
            Self::Malformed(message) => Error::format(path, message),
            Self::Unsupported(message) => Error::argument(format!("{}: {message}", path.display())),
        }
    }
}

pub(super) type Parsed<T> = std::result::Result<T, Problem>;

/// Fields that must have their neutral value: anything else changes the model's mathematics or its parts.
const NEUTRAL: [&str; 14] = [
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
];

/// Fields kept as they are and written back: they do not change what a saved adapter computes.
pub(super) const KEPT: [&str; 9] = [
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "init_lora_weights",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
];

/// Fields read into `AdapterConfig`.
pub(super) const READ: [&str; 13] = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "peft_type",
];

/// Fields without a meaning for a saved adapter; the default is written.
const IGNORED: [&str; 6] = [
    "inference_mode",
    "peft_version",
    "qalora_group_size",
    "megatron_core",
    "runtime_config",
    "bias",
];

/// Initialisations that leave the base weights alone, so that a saved adapter means what its tensors say.
const INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// The value PEFT writes for every field of a LoRA configuration that is not set (PEFT 0.21).
pub(super) fn default_of(field: &str) -> Value {
    match field {
        "use_dora" | "lora_bias" | "use_qalora" | "ensure_weight_tying" => Value::Bool(false),
        "loftq_config" => Value::Object(Map::new()),
        "init_lora_weights" => Value::Bool(true),
        "qalora_group_size" => Value::from(16),
        "megatron_core" => Value::from("megatron.core"),
        "bias" => Value::from("none"),
        _ => Value::Null,
    }
}

/// All fields that are written without being read into `AdapterConfig`.
pub(super) fn constant_fields() -> impl Iterator<Item = &'static str> {
    NEUTRAL
        .into_iter()
        .chain(KEPT)
        .chain(["qalora_group_size", "megatron_core", "bias"])
}

/// Raises what is not supported and lists the fields nobody knows.
pub(super) fn check(map: &Map<String, Value>) -> Parsed<Vec<String>> {
    let unsupported = |field: &str, value: &Value, instead: &str| {
        Err(Problem::Unsupported(format!(
            "{field}={value} is not supported; {instead}"
        )))
    };
    match map.get("peft_type") {
        Some(Value::String(name)) if name == "LORA" => {}
        Some(value) => return unsupported("peft_type", value, "only \"LORA\" adapters are"),
        None => return Err(Problem::Malformed("missing field 'peft_type'".to_owned())),
    }
    for field in NEUTRAL {
        let value = map.get(field).unwrap_or(&Value::Null);
        if !is_neutral(value) {
            let instead = format!("only {} is", default_of(field));
            return unsupported(field, value, &instead);
        }
    }
    let bias = map.get("bias").unwrap_or(&Value::Null);
    if !bias.is_null() && bias != "none" {
        return unsupported("bias", bias, "only \"none\" is");
    }
    match map.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(name)) if INITIALISATIONS.contains(&name.to_lowercase().as_str()) => {}
        Some(value) => {
            let instead = format!(
                "it changes the base weights or the training; only true, false, {} are",
                INITIALISATIONS.join(", ")
            );
            return unsupported("init_lora_weights", value, &instead);
        }
    }
    let known = [&READ[..], &KEPT, &NEUTRAL, &IGNORED].concat();
    Ok(unknown(map, &known))
}

/// A warning where the file has fields that are not `known`.
pub(super) fn unknown(map: &Map<String, Value>, known: &[&str]) -> Vec<String> {
    let names = map.keys().map(String::as_str);
    let unknown: Vec<&str> = names.filter(|name| !known.contains(name)).collect();
    if unknown.is_empty() {
        Vec::new()
    } else {
        vec![format!(
            "unknown fields are ignored: {} (the file may come from a newer PEFT)",
            unknown.join(", ")
        )]
    }
}

/// Null, false and empty collections switch a feature off.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The field's value converted, or `None` where it is absent or null.
pub(super) fn field<T>(
    map: &Map<String, Value>,
    name: &str,
    expected: &str,
    convert: impl FnOnce(&Value) -> Option<T>,
) -> Parsed<Option<T>> {
    match map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => convert(value).map(Some).ok_or_else(|| {
            Problem::Malformed(format!(
                "field '{name}' must be {expected}, not {}",
                kind(value)
            ))
        }),
    }
}

pub(super) fn rank(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .and_then(|n| usize::try_from(n).ok())
        .filter(|&n| n > 0)
}

pub(super) fn strings(value: &Value) -> Option<Vec<String>> {
    value
        .as_array()?
        .iter()
        .map(|item| item.as_str().map(str::to_owned))
        .collect()
}

/// An object's entries in their order, which decides between patterns that match the same name.
pub(super) fn pairs<T>(
    value: &Value,
    convert: impl Fn(&Value) -> Option<T>,
) -> Option<Vec<(String, T)>> {
    value
        .as_object()?
        .iter()
        .map(|(key, value)| Some((key.clone(), convert(value)?)))
        .collect()
}
