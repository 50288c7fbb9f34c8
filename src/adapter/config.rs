//! PEFT's adapter_config.json for LoRA.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::fields::{self, Parsed, Problem, constant_fields, default_of, field, pairs, rank};
use super::rules::Rules;
use super::selector::Selector;
use crate::error::{Error, Result};
use crate::folder::listing;

pub const CONFIG_FILE: &str = "adapter_config.json";
/// The PEFT whose fields are written.
pub const PEFT_VERSION: &str = "0.21.2";

/// A LoRA configuration with PEFT's names and meanings. Fields that PEFT has and this type lacks are either kept in
/// `kept` (they do not change what an adapter computes) or must have their neutral value to be read at all.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    pub r: usize,
    pub lora_alpha: f64,
    /// In \[0, 1).
    pub lora_dropout: f64,
    /// scaling = `lora_alpha`/√r instead of `lora_alpha`/r.
    pub use_rslora: bool,
    pub target_modules: Selector,
    pub exclude_modules: Option<Selector>,
    /// Layer numbers; with `target_modules` as a list only. A module named in full is chosen whatever its layer.
    pub layers_to_transform: Option<Vec<i64>>,
    /// Regular expressions for the name of the list of layers, such as `layers` or `h`.
    pub layers_pattern: Vec<String>,
    /// Per-module r; the first pattern that matches a name (or its end after a dot) decides.
    pub rank_pattern: Vec<(String, usize)>,
    /// Per-module `lora_alpha`, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Names or ends of names of modules that were trained whole and saved beside the adapter.
    pub modules_to_save: Vec<String>,
    /// Whether the base's weights are stored `[k, n]` (transformers' Conv1D); the factors are not.
    pub fan_in_fan_out: bool,
    /// `task_type`, `base_model_name_or_path`, `revision`, `auto_mapping`, `init_lora_weights` and the configurations
    /// of initialisations, where they differ from PEFT's default.
    pub kept: Map<String, Value>,
}

impl AdapterConfig {
    /// PEFT's defaults, for a causal language model.
    pub fn new(target_modules: Selector) -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            fan_in_fan_out: false,
            kept: Map::from_iter([("task_type".to_owned(), json!("CAUSAL_LM"))]),
        }
    }

    /// A configuration from its JSON fields, and warnings for the caller to show.
    ///
    /// # Errors
    /// `Argument`, naming the field and its value.
    pub fn from_json(map: &Map<String, Value>) -> Result<(Self, Vec<String>)> {
        parse(map).map_err(|problem| match problem {
            Problem::Malformed(message) | Problem::Unsupported(message) => Error::Argument(message),
        })
    }

    /// Reads `adapter_config.json` of an adapter folder.
    ///
    /// # Errors
    /// `Format` if the file is missing or a field is missing or of the wrong type; `Argument` if a field asks for
    /// something that is not supported here; `Io` if the folder or the file cannot be read.
    pub fn read(folder: &Path) -> Result<(Self, Vec<String>)> {
        let (path, map) = read_fields(folder)?;
        parse(&map).map_err(|problem| problem.at(&path))
    }

    /// The values that no model can be trained or run with.
    ///
    /// # Errors
    /// `Argument`, naming the field and its value.
    pub fn validate(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::Argument(message));
        let ranks = self.rank_pattern.iter().map(|(_, r)| *r);
        if self.r == 0 || ranks.into_iter().any(|r| r == 0) {
            return wrong(
                "r=0 gives no adapter; r (and each value of rank_pattern) must be at least 1"
                    .to_owned(),
            );
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong(format!(
                "lora_dropout={} must be at least 0 and below 1",
                self.lora_dropout
            ));
        }
        let mut alphas = self
            .alpha_pattern
            .iter()
            .map(|(_, alpha)| *alpha)
            .chain([self.lora_alpha]);
        if let Some(alpha) = alphas.find(|alpha| !alpha.is_finite()) {
            return wrong(format!("lora_alpha={alpha} must be a finite number"));
        }
        if matches!(self.target_modules, Selector::Pattern(_)) {
            if let Some(layers) = &self.layers_to_transform {
                return wrong(format!(
                    "layers_to_transform={layers:?} needs target_modules as a list of names, not one string"
                ));
            }
            if !self.layers_pattern.is_empty() {
                return wrong(format!(
                    "layers_pattern={:?} needs target_modules as a list of names, not one string",
                    self.layers_pattern
                ));
            }
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return wrong(format!(
                "layers_pattern={:?} needs layers_to_transform too",
                self.layers_pattern
            ));
        }
        Ok(())
    }

    /// The scaling of one module: `lora_alpha`/r, or `lora_alpha`/√r with `use_rslora`, with the module's own values.
    /// `Rules` answers this for many modules.
    pub fn scaling(&self, module: &str) -> Result<f64> {
        Rules::new(self)?.scaling(module)
    }

    /// All fields of PEFT's file, sorted; `inference_mode` is true, as in every saved adapter.
    ///
    /// Unlike PEFT's writer it keeps the order inside `rank_pattern` and `alpha_pattern`: there the first match decides.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut all: BTreeMap<&str, Value> = constant_fields()
            .map(|name| {
                let value = self.kept.get(name).cloned();
                (name, value.unwrap_or_else(|| default_of(name)))
            })
            .collect();
        let alphas = self.alpha_pattern.iter();
        let ranks = self.rank_pattern.iter();
        all.extend([
            ("peft_type", json!("LORA")),
            ("peft_version", json!(PEFT_VERSION)),
            ("inference_mode", json!(true)),
            ("r", json!(self.r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("use_rslora", json!(self.use_rslora)),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            (
                "modules_to_save",
                if self.modules_to_save.is_empty() {
                    Value::Null
                } else {
                    json!(self.modules_to_save)
                },
            ),
            ("target_modules", self.target_modules.to_json()),
            (
                "exclude_modules",
                self.exclude_modules
                    .as_ref()
                    .map_or(Value::Null, Selector::to_json),
            ),
            ("layers_to_transform", json!(self.layers_to_transform)),
            (
                "layers_pattern",
                if self.layers_pattern.is_empty() {
                    Value::Null
                } else {
                    json!(self.layers_pattern)
                },
            ),
            (
                "rank_pattern",
                ranks.map(|(key, r)| (key.clone(), json!(r))).collect(),
            ),
            (
                "alpha_pattern",
                alphas
                    .map(|(key, alpha)| (key.clone(), number(*alpha)))
                    .collect(),
            ),
        ]);
        all.into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }

    /// The file's text: two spaces of indentation, ASCII only, as Python's `json.dumps` writes it.
    pub fn to_text(&self) -> String {
        ascii(self.to_json())
    }
}

/// JSON as Python's `json.dumps(…, indent=2)` writes it.
pub(super) fn ascii(fields: Map<String, Value>) -> String {
    let mut text = String::new();
    for character in format!("{:#}", Value::Object(fields)).chars() {
        if character.is_ascii() {
            text.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(text, "\\u{unit:04x}");
            }
        }
    }
    text
}

/// The fields of a folder's adapter_config.json, and the file's path.
///
/// # Errors
/// `Format` if the file is missing or no JSON object; `Io` if the folder or the file cannot be read.
pub(super) fn read_fields(folder: &Path) -> Result<(PathBuf, Map<String, Value>)> {
    let path = folder.join(CONFIG_FILE);
    std::fs::read_dir(folder).map_err(Error::io(folder))?;
    if !path.exists() {
        return Err(Error::format(
            folder,
            format!("missing {CONFIG_FILE}: {}", listing(folder)),
        ));
    }
    let text = std::fs::read(&path).map_err(Error::io(&path))?;
    let map = serde_json::from_slice(&text)
        .map_err(|error| Error::format(&path, format!("not a JSON object: {error}")))?;
    Ok((path, map))
}

/// PEFT declares alpha as an int: whole values are written as one.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) {
        json!(value as i64)
    } else {
        json!(value)
    }
}

fn parse(map: &Map<String, Value>) -> Parsed<(AdapterConfig, Vec<String>)> {
    let warnings = fields::check(map)?;
    let target_modules = field(map, "target_modules", "a string or a list of strings", Selector::from_json)?
        .ok_or_else(|| {
            Problem::Unsupported(
                "target_modules=null (PEFT's choice by architecture) is not supported; name the modules".to_owned(),
            )
        })?;
    let mut config = AdapterConfig::new(target_modules);
    config.kept = fields::KEPT
        .iter()
        .filter_map(|&name| Some((name.to_owned(), map.get(name)?.clone())))
        .filter(|(name, value)| !value.is_null() && *value != default_of(name))
        .collect();
    if let Some(r) = field(map, "r", "a whole number of at least 1", rank)? {
        config.r = r;
    }
    if let Some(alpha) = field(map, "lora_alpha", "a number", Value::as_f64)? {
        config.lora_alpha = alpha;
    }
    if let Some(p) = field(map, "lora_dropout", "a number", Value::as_f64)? {
        config.lora_dropout = p;
    }
    config.use_rslora = field(map, "use_rslora", "true or false", Value::as_bool)?.unwrap_or(false);
    config.fan_in_fan_out =
        field(map, "fan_in_fan_out", "true or false", Value::as_bool)?.unwrap_or(false);
    config.modules_to_save =
        field(map, "modules_to_save", "a list of strings", fields::strings)?.unwrap_or_default();
    config.exclude_modules = field(
        map,
        "exclude_modules",
        "a string or a list of strings",
        Selector::from_json,
    )?;
    config.layers_to_transform = field(
        map,
        "layers_to_transform",
        "a layer number or a list of them",
        |value| match value {
            Value::Array(items) => items.iter().map(Value::as_i64).collect(),
            one => one.as_i64().map(|layer| vec![layer]),
        },
    )?;
    config.layers_pattern = field(
        map,
        "layers_pattern",
        "a string or a list of strings",
        |value| match value {
            Value::String(text) if text.is_empty() => Some(Vec::new()),
            Value::String(text) => Some(vec![text.clone()]),
            list => fields::strings(list),
        },
    )?
    .unwrap_or_default();
    config.rank_pattern = field(
        map,
        "rank_pattern",
        "an object of whole numbers of at least 1",
        |value| pairs(value, rank),
    )?
    .unwrap_or_default();
    config.alpha_pattern = field(map, "alpha_pattern", "an object of numbers", |value| {
        pairs(value, Value::as_f64)
    })?
    .unwrap_or_default();
    match config.validate() {
        Ok(()) => Ok((config, warnings)),
        Err(error) => Err(Problem::Malformed(error.to_string())),
    }
}
