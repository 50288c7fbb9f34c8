//! An adapter folder with its tensors: `base_model.model.<module>.lora_A.weight` \[r, k\] and `.lora_B.weight` \[n, r\].

use std::collections::BTreeMap;
use std::path::Path;

use super::config::{AdapterConfig, CONFIG_FILE};
use super::rules::Rules;
use super::target::Selection;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::folder::{PT_METADATA, Staging, Tensor, Weights, listing};

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What PEFT puts before a module's name.
pub(super) const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// The two factors of one module, row-major f32.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LoraPair {
    pub r: usize,
    /// k
    pub in_features: usize,
    /// n
    pub out_features: usize,
    /// \[r, k\]
    pub lora_a: Vec<f32>,
    /// \[n, r\]
    pub lora_b: Vec<f32>,
}

/// A tensor of a module that was trained whole, row-major f32.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SavedTensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub config: AdapterConfig,
    /// By the module's name in the base model, such as `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, LoraPair>,
    /// Tensors of the configuration's `modules_to_save` by their names in the base model, such as `classifier.weight`.
    pub saved: BTreeMap<String, SavedTensor>,
}

impl Adapter {
    /// Whether the adapter has exactly the modules that its configuration chooses in a model.
    ///
    /// # Errors
    /// `Argument`, naming modules that are missing on either side.
    pub fn check(&self, selection: &Selection) -> Result<()> {
        let chosen: BTreeMap<&str, usize> = selection
            .targets
            .iter()
            .map(|target| (target.module.as_str(), target.r))
            .collect();
        let missing: Vec<&str> = chosen
            .keys()
            .copied()
            .filter(|name| !self.modules.contains_key(*name))
            .collect();
        if !missing.is_empty() {
            return Err(Error::argument(format!(
                "the adapter has no tensors for {} modules that its target_modules choose in this model: {}",
                missing.len(),
                some(&missing)
            )));
        }
        let extra: Vec<&str> = self
            .modules
            .keys()
            .map(String::as_str)
            .filter(|name| !chosen.contains_key(name))
            .collect();
        if !extra.is_empty() {
            return Err(Error::argument(format!(
                "the adapter has tensors for {} modules that this model does not have or its target_modules do not \
                 choose: {}",
                extra.len(),
                some(&extra)
            )));
        }
        Ok(())
    }

    /// Shapes against the configuration's r and each other. The message names the module.
    fn validate(&self) -> std::result::Result<(), String> {
        if self.modules.is_empty() {
            return Err("an adapter without any module".to_owned());
        }
        let rules = Rules::new(&self.config).map_err(|error| error.to_string())?;
        for (module, pair) in &self.modules {
            let r = rules.r(module).map_err(|error| error.to_string())?;
            if pair.r != r {
                return Err(format!(
                    "{module}: the tensors have r = {}, {CONFIG_FILE} says {r} for this module",
                    pair.r
                ));
            }
            if pair.in_features == 0
                || pair.out_features == 0
                || pair.lora_a.len() != r * pair.in_features
                || pair.lora_b.len() != pair.out_features * r
            {
                return Err(format!(
                    "{module}: lora_A has {} and lora_B {} values, which are not [{r}, {}] and [{}, {r}]",
                    pair.lora_a.len(),
                    pair.lora_b.len(),
                    pair.in_features,
                    pair.out_features
                ));
            }
            if !rules.chooses(module).map_err(|error| error.to_string())? {
                return Err(format!(
                    "{module}: has tensors, but {CONFIG_FILE}'s target_modules do not choose it"
                ));
            }
        }
        Ok(())
    }
}

/// Up to three names.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 3;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text += ", …";
    }
    text
}

/// Reads an adapter folder, and warnings for the caller to show.
///
/// # Errors
/// `Format` if a file is missing, truncated or malformed, a tensor has an unknown name or a shape that does not fit r
/// or its partner, or a partner is missing; `Argument` if the configuration asks for something that is not supported;
/// `Io` if the folder or a file cannot be read.
pub fn read(folder: &Path) -> Result<(Adapter, Vec<String>)> {
    let (config, warnings) = AdapterConfig::read(folder)?;
    let weights = open_weights(folder)?;
    let path = folder.join(WEIGHTS_FILE);
    let mut modules = BTreeMap::new();
    let mut saved = BTreeMap::new();
    for name in weights.names() {
        if let Some(tensor) = saved_name(&config, name) {
            let shape = weights.get(name)?.shape.to_vec();
            let values = weights.to_f32(name)?;
            saved.insert(tensor.to_owned(), SavedTensor { shape, values });
            continue;
        }
        let (module, partner) =
            split_name(name).map_err(|message| Error::format(&path, message))?;
        if !weights.contains(&partner) {
            return Err(Error::format(
                &path,
                format!("'{name}' has no partner '{partner}'"),
            ));
        }
        if let Some(module) = module {
            let pair = read_pair(&weights, name, &partner)?;
            modules.insert(module.to_owned(), pair);
        }
    }
    let adapter = Adapter {
        config,
        modules,
        saved,
    };
    adapter
        .validate()
        .map_err(|message| Error::format(&path, message))?;
    Ok((adapter, warnings))
}

/// The folder's tensors.
///
/// # Errors
/// `Format` if the file is missing or broken.
pub(super) fn open_weights(folder: &Path) -> Result<Weights> {
    let path = folder.join(WEIGHTS_FILE);
    if !path.exists() {
        let hint = if folder.join("adapter_model.bin").exists() {
            "; adapter_model.bin is a pickle and is not read: PeftModel.save_pretrained writes safetensors"
        } else {
            ""
        };
        return Err(Error::format(
            folder,
            format!("missing {WEIGHTS_FILE}: {}{hint}", listing(folder)),
        ));
    }
    Weights::open_file(&path)
}

/// The name in the base model of a tensor that `modules_to_save` covers.
fn saved_name<'a>(config: &AdapterConfig, name: &'a str) -> Option<&'a str> {
    let own = name.strip_prefix(PREFIX)?;
    let is_factor = own.ends_with(A) || own.ends_with(B);
    (!is_factor && is_saved(&config.modules_to_save, own)).then_some(own)
}

/// Whether a tensor of the base model belongs to a module that `modules_to_save` covers.
pub(super) fn is_saved(modules_to_save: &[String], tensor: &str) -> bool {
    let holders = tensor.match_indices('.').map(|(dot, _)| &tensor[..dot]);
    let covers = |module: &str| {
        let saved = modules_to_save.iter();
        saved
            .map(String::as_str)
            .any(|end| module == end || super::selector::suffixes(module).any(|own| own == end))
    };
    holders.into_iter().any(covers)
}

/// The partner's name, and the module's where `name` is the first of the two.
fn split_name(name: &str) -> std::result::Result<(Option<&str>, String), String> {
    if let Some(rest) = name.strip_prefix(PREFIX) {
        if let Some(module) = rest.strip_suffix(A) {
            return Ok((Some(module), format!("{PREFIX}{module}{B}")));
        }
        if let Some(module) = rest.strip_suffix(B) {
            return Ok((None, format!("{PREFIX}{module}{A}")));
        }
    }
    let instead = if name.contains("lora_embedding_") {
        "adapters of embeddings are not supported"
    } else if name.ends_with(".lora_B.bias") {
        "lora_bias is not supported"
    } else if name.contains("lora_magnitude_vector") {
        "DoRA (use_dora) is not supported"
    } else if name.ends_with(".base_layer.weight") || name.ends_with("embed_tokens.weight") {
        "it replaces a base weight, which is not supported; save with save_embedding_layers=False"
    } else {
        "expected base_model.model.<module>.lora_A.weight and .lora_B.weight only"
    };
    Err(format!("unexpected tensor '{name}': {instead}"))
}

fn read_pair(weights: &Weights, a: &str, b: &str) -> Result<LoraPair> {
    let shape = |name: &str| -> Result<[usize; 2]> {
        let shape = weights.get(name)?.shape;
        <[usize; 2]>::try_from(shape)
            .ok()
            .filter(|[rows, columns]| rows * columns > 0)
            .ok_or_else(|| {
                Error::format(
                    weights.path(),
                    format!("'{name}' has shape {shape:?}; expected two sizes above 0"),
                )
            })
    };
    let ([r, in_features], [out_features, columns]) = (shape(a)?, shape(b)?);
    if columns != r {
        return Err(Error::format(
            weights.path(),
            format!(
                "'{a}' has shape [{r}, {in_features}] and '{b}' has [{out_features}, {columns}]: expected [r, k] and \
                 [n, r] with one r"
            ),
        ));
    }
    Ok(LoraPair {
        r,
        in_features,
        out_features,
        lora_a: weights.to_f32(a)?,
        lora_b: weights.to_f32(b)?,
    })
}

/// Writes the folder as PEFT's `save_pretrained` does: tensors in `dtype`, adapter_config.json, and `model_card` as
/// README.md; `model_config` as config.json, which names a classifier's labels. All appear together; if one cannot be
/// written the folder stays as it was.
///
/// # Errors
/// `Argument` if the tensors do not fit each other or the configuration; `Io` if a file cannot be written.
pub fn write(
    folder: &Path,
    adapter: &Adapter,
    dtype: DType,
    model_card: &str,
    model_config: Option<&str>,
) -> Result<()> {
    adapter.validate().map_err(Error::Argument)?;
    let mut tensors = Vec::with_capacity(2 * adapter.modules.len());
    for (module, pair) in &adapter.modules {
        let (r, k, n) = (pair.r, pair.in_features, pair.out_features);
        tensors.push(Tensor::from_f32(
            format!("{PREFIX}{module}{A}"),
            dtype,
            &[r, k],
            &pair.lora_a,
        ));
        tensors.push(Tensor::from_f32(
            format!("{PREFIX}{module}{B}"),
            dtype,
            &[n, r],
            &pair.lora_b,
        ));
    }
    for (name, tensor) in &adapter.saved {
        tensors.push(Tensor::from_f32(
            format!("{PREFIX}{name}"),
            dtype,
            &tensor.shape,
            &tensor.values,
        ));
    }
    let mut staging = Staging::new(folder)?;
    if let Some(config) = model_config {
        staging.write("config.json", config.as_bytes())?;
    }
    staging.safetensors(WEIGHTS_FILE, tensors, &PT_METADATA)?;
    staging.write("README.md", model_card.as_bytes())?;
    staging.write(CONFIG_FILE, adapter.config.to_text().as_bytes())?;
    staging.commit()
}
