//! An adapter merged into its base model's weights.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Ready, plan};
use crate::dtype::DType;
use crate::engine::models::{Architecture, Transformer};
use crate::error::{Error, Result};

/// Settings of a merge; every one of them must be named.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeConfig {
    pub model: PathBuf,
    pub adapter: PathBuf,
    pub output: PathBuf,
    /// float32, float16 or bfloat16; null for the base model's own.
    pub dtype: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MergeResult {
    pub output: PathBuf,
    pub files: Vec<String>,
    pub merged_modules: usize,
    /// What the user may not have meant about the adapter.
    pub warnings: Vec<String>,
}

/// # Errors
/// `Argument` and `Format` for bad input; `Io` if the folder cannot be written.
pub fn merge(config: &MergeConfig) -> Result<MergeResult> {
    let dtype = config
        .dtype
        .as_deref()
        .map(DType::from_torch_name)
        .transpose()?;
    let taken = std::fs::read_dir(&config.output).is_ok_and(|mut entries| entries.next().is_some());
    if taken {
        return Err(Error::argument(format!(
            "{} is not empty: give a new output folder",
            config.output.display()
        )));
    }
    let architecture = Architecture::read(&config.model)?;
    let Ready {
        architecture,
        plan,
        warnings,
    } = plan(architecture, Some(&config.adapter), None, 1)?;
    if let Some(beside) = &plan.trained.beside {
        beside.mergeable(&config.adapter)?;
    }
    let model = Transformer::load(&config.model, architecture, &plan)?;
    let merged_modules = model.write_merged(&config.output, dtype)?;
    let mut files: Vec<String> = std::fs::read_dir(&config.output)
        .map_err(Error::io(&config.output))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    files.sort();
    Ok(MergeResult {
        output: config.output.clone(),
        files,
        merged_modules,
        warnings,
    })
}
