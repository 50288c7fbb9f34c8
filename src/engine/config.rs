//! The settings of a training run.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::adapter::Variant;
use crate::data::Frames;
use crate::data::audit::AuditMode;
use crate::dtype::QuantType;
use crate::error::{Error, Result};

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Adapters beside frozen weights in their own dtype.
    Lora,
    /// Adapters beside frozen 4-bit weights.
    Qlora,
    /// Vectors that multiply keys, values and the MLP's inner activations: (IA)³.
    Ia3,
    /// Virtual tokens before each text: learned input embeddings.
    Prompt,
    /// Virtual tokens before each text: learned keys and values of every layer.
    Prefix,
    /// Bottleneck layers behind attention and MLP, or behind the MLP alone.
    Adapter,
    /// The head, and the last blocks where `trained_layers` says so; the rest stays frozen.
    Freeze,
    /// Every weight.
    Full,
}

/// What a model is trained to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskChoice {
    /// What the model's class says.
    Auto,
    /// To continue texts.
    Generation,
    /// To give a text its label.
    Classification,
}

/// What computes a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// This engine, on the CPU.
    Embedded,
    /// `PyTorch`, through a [`super::Learner`] of its own.
    Torch,
}

impl Method {
    /// Whether what is trained stands beside the base's weights, as an adapter.
    pub fn is_adapter(self) -> bool {
        !matches!(self, Self::Freeze | Self::Full)
    }

    /// Whether adapters are LoRA's.
    pub fn is_lora(self) -> bool {
        matches!(self, Self::Lora | Self::Qlora)
    }
}

/// Where the virtual tokens of a prompt begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptInit {
    /// At embeddings of tokens that are drawn from the vocabulary.
    SampleVocab,
    /// At normal numbers of deviation 1, PEFT's own default.
    Random,
}

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    Cosine,
    Constant,
    Linear,
}

/// Which layers get an adapter, in PEFT's sense.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `all-linear`, or a regular expression that matches a whole module name.
    Pattern(String),
    /// Module names or their last parts.
    Names(Vec<String>),
}

/// Every setting of a run. JSON must name each of them: the caller's signature owns the defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools)] // settings, not states
pub struct TrainConfig {
    pub model: PathBuf,
    pub data: Vec<PathBuf>,
    /// The run's folder.
    pub output: PathBuf,
    pub engine: EngineKind,
    pub task: TaskChoice,
    pub method: Method,
    /// Blocks at the end that [`Method::Freeze`] trains beside the head.
    pub trained_layers: usize,

    pub r: usize,
    pub lora_alpha: f64,
    /// Probability, in [0, 1).
    pub lora_dropout: f64,
    pub use_rslora: bool,
    /// Null for the method's own choice.
    #[serde(deserialize_with = "present")]
    pub target_modules: Option<TargetModules>,
    /// Those of (IA)³'s target modules whose input is multiplied; null for PEFT's choice.
    #[serde(deserialize_with = "present")]
    pub feedforward_modules: Option<TargetModules>,
    pub rank_pattern: BTreeMap<String, usize>,
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Of methods prompt and prefix, before each text.
    pub num_virtual_tokens: usize,
    pub prompt_tuning_init: PromptInit,
    /// Where method adapter puts its layers.
    pub adapter_variant: Variant,
    /// The hidden size as a multiple of an adapter's inner size.
    pub reduction_factor: usize,

    #[serde(with = "quant_type")]
    pub quant_type: QuantType,
    /// Elements that share an absmax.
    pub blocksize: usize,
    pub double_quant: bool,

    /// Passes over the training data, where `max_steps` does not say otherwise.
    pub epochs: f64,
    /// Optimiser steps; replaces `epochs`.
    #[serde(deserialize_with = "present")]
    pub max_steps: Option<usize>,
    /// Seconds that training and its evaluations may take, resumed parts included.
    #[serde(deserialize_with = "present")]
    pub max_seconds: Option<f64>,
    /// Rows of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of an optimiser step.
    pub gradient_accumulation: usize,
    /// Tokens of a row.
    pub sequence_length: usize,
    pub packing: bool,
    /// Batches of rows of about one length.
    pub sort_by_length: bool,

    pub learning_rate: f64,
    pub warmup_steps: usize,
    pub schedule: ScheduleKind,
    /// The learning rate at the end, as a part of `learning_rate`.
    pub min_learning_rate_ratio: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Gradients of a larger L2 norm are scaled down to it; 0 switches this off.
    pub max_grad_norm: f64,
    pub seed: u64,
    /// Seed of the split; null for `seed`.
    #[serde(deserialize_with = "present")]
    pub split_seed: Option<u64>,
    /// Training records of each label, or of all, that `seed` draws; null for all there are.
    #[serde(deserialize_with = "present")]
    pub shots: Option<usize>,

    /// Part of the records that is held out, where `heldout_data` is empty.
    pub heldout: f64,
    pub heldout_data: Vec<PathBuf>,
    /// Part of the records that is kept for one test at the end, where `test_data` is empty.
    pub test: f64,
    pub test_data: Vec<PathBuf>,
    /// Text of the base model's own domain, whose loss tells what a language model forgot.
    pub forgetting: Vec<PathBuf>,
    /// Column of the groups whose treatment is compared.
    #[serde(deserialize_with = "present")]
    pub bias_column: Option<String>,
    /// Pairs of terms that name two groups, such as `he/she`.
    pub bias_terms: Vec<String>,
    /// Whether the held-out part has its share of every label.
    pub stratify: bool,
    /// Jaccard similarity of character 5-grams from which texts stay on one side; 0 for exact duplicates alone.
    pub near_duplicates: f64,
    /// Column whose equal values stay on one side of the split.
    #[serde(deserialize_with = "present")]
    pub group: Option<String>,
    #[serde(deserialize_with = "present")]
    pub text_column: Option<String>,
    #[serde(deserialize_with = "present")]
    pub prompt_column: Option<String>,
    #[serde(deserialize_with = "present")]
    pub completion_column: Option<String>,
    #[serde(deserialize_with = "present")]
    pub messages_column: Option<String>,
    #[serde(deserialize_with = "present")]
    pub label_column: Option<String>,
    /// What becomes of the run where its data is found fault with.
    pub audit: AuditMode,
    /// Tables in memory, by the names that stand for them among the files.
    #[serde(skip)]
    pub frames: Frames,

    /// Steps between evaluations.
    pub eval_every: usize,
    /// Held-out tokens an evaluation reads at most.
    pub eval_tokens: usize,
    /// Evaluations without a new best after which training stops.
    #[serde(deserialize_with = "present")]
    pub patience: Option<usize>,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    pub resume: bool,
    /// Threads to use; null for all.
    #[serde(deserialize_with = "present")]
    pub threads: Option<usize>,
}

/// Settings that a checkpoint may be continued under another value of: they change where a run
/// writes, looks and ends, never what it computes. Data is compared by its fingerprint, the model
/// by a loss, the length by the schedule's steps.
const FREE: [&str; 16] = [
    "model",
    "data",
    "heldout_data",
    "test_data",
    "forgetting",
    "bias_column",
    "bias_terms",
    "output",
    "resume",
    "threads",
    "epochs",
    "max_steps",
    "max_seconds",
    "eval_every",
    "patience",
    "checkpoint_every",
];

impl TrainConfig {
    /// Reads and validates settings.
    ///
    /// # Errors
    /// `Argument` naming the setting that is missing, unknown, of the wrong type or out of range.
    pub fn from_json(text: &str) -> Result<Self> {
        let mut json = serde_json::Deserializer::from_str(text);
        let config: Self = serde_path_to_error::deserialize(&mut json)
            .map_err(|error| Error::argument(format!("training settings: {error}")))?;
        config.validate()?;
        Ok(config)
    }

    /// The settings that decide a run's numbers, for comparison with a checkpoint's.
    pub(super) fn fingerprint(&self) -> Result<serde_json::Map<String, serde_json::Value>> {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(mut settings)) => {
                settings.retain(|name, _| !FREE.contains(&name.as_str()));
                Ok(settings)
            }
            Ok(_) => Err(Error::run("settings are not a JSON object")),
            Err(error) => Err(Error::argument(format!("training settings: {error}"))),
        }
    }
}

/// An `Option` whose key must be there: serde takes a missing one for null.
fn present<'de, T, D>(deserializer: D) -> std::result::Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: serde::Deserializer<'de>,
{
    Option::deserialize(deserializer)
}

mod quant_type {
    use serde::{Deserialize, Deserializer, Serializer, de};

    use crate::dtype::QuantType;

    // The reference is serde's: `with` hands fields over so.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub fn serialize<S: Serializer>(value: &QuantType, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(value.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<QuantType, D::Error> {
        QuantType::from_name(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}
