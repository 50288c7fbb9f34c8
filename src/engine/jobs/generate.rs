//! Text from a model.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{Ready, plan, quantize, tokenizer, with_threads};
use crate::engine::generate::{Sampling, generate as sample};
use crate::engine::models::{Architecture, Decoder, Transformer};
use crate::error::Result;

/// Settings of a generation; every one of them must be named.
#[derive(Debug, Clone, Deserialize)]
pub struct GenerateConfig {
    pub model: PathBuf,
    pub adapter: Option<PathBuf>,
    pub prompt: String,
    pub quant_type: Option<String>,
    pub blocksize: usize,
    pub double_quant: bool,
    #[serde(flatten)]
    pub sampling: Sampling,
    pub threads: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerateResult {
    pub text: String,
    pub tokens: usize,
    /// Loading left out.
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// What the user may not have meant about the adapter.
    pub warnings: Vec<String>,
}

/// # Errors
/// `Argument` and `Format` for bad input.
pub fn generate(
    config: &GenerateConfig,
    on_text: impl FnMut(&str) -> Result<bool> + Send,
) -> Result<GenerateResult> {
    config.sampling.validate()?;
    with_threads(config.threads, || run(config, on_text))
}

fn run(
    config: &GenerateConfig,
    on_text: impl FnMut(&str) -> Result<bool>,
) -> Result<GenerateResult> {
    let architecture = Architecture::read(&config.model)?;
    let how = quantize(
        config.quant_type.as_deref(),
        config.blocksize,
        config.double_quant,
    )?;
    let positions = architecture.max_position_embeddings;
    let Ready {
        architecture,
        plan,
        warnings,
    } = plan(architecture, config.adapter.as_deref(), how, positions)?;
    let tokenizer = tokenizer(&config.model, &architecture)?;
    let eos = architecture.eos_token_ids.clone();
    let model = Transformer::load(&config.model, architecture, &plan)?;
    let begin = Instant::now();
    let made = sample(
        Decoder::new(&model)?,
        &tokenizer,
        &eos,
        &config.prompt,
        &config.sampling,
        on_text,
    )?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(GenerateResult {
        text: made.text,
        tokens: made.tokens,
        seconds,
        tokens_per_second: made.tokens as f64 / seconds,
        warnings,
    })
}
