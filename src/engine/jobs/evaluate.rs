//! The loss of a model on a text.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{plan, quantize, tokenizer, with_threads};
use crate::data::audit::AuditMode;
use crate::data::{Columns, DataConfig, Frames, Layout, Sequential, prepare_whole};
use crate::engine::models::llama::{Llama, LlamaConfig};
use crate::engine::{Control, EvalEvent, Event, Hooks, evaluate as evaluate_source};
use crate::error::{Error, Result};

/// Settings of an evaluation; every one of them must be named.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateConfig {
    pub model: PathBuf,
    pub data: Vec<PathBuf>,
    pub adapter: Option<PathBuf>,
    /// Quantise linear layers to this type; null leaves them as stored.
    pub quant_type: Option<String>,
    pub blocksize: usize,
    pub double_quant: bool,
    pub text_column: Option<String>,
    pub prompt_column: Option<String>,
    pub completion_column: Option<String>,
    pub messages_column: Option<String>,
    /// Tables in memory, by the names that stand for them in `data`.
    #[serde(skip)]
    pub frames: Frames,
    pub sequence_length: usize,
    pub packing: bool,
    pub batch_size: usize,
    /// Tokens to read at most; null for all.
    pub eval_tokens: Option<usize>,
    pub threads: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvaluateResult {
    /// Mean over the tokens predicted, nats.
    pub loss: f64,
    pub perplexity: f64,
    /// Mean bits for each UTF-8 byte of the text read; none if only a part of it was read, and for conversations.
    pub bits_per_byte: Option<f64>,
    /// Records left out.
    pub skipped: usize,
    /// Tokens predicted.
    pub tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
}

/// # Errors
/// `Argument` and `Format` for bad input; `Interrupted` when a hook says stop.
pub fn evaluate(config: &EvaluateConfig, hooks: &mut (dyn Hooks + Send)) -> Result<EvaluateResult> {
    for (name, value) in [
        ("sequence_length", config.sequence_length),
        ("batch_size", config.batch_size),
        ("eval_tokens", config.eval_tokens.unwrap_or(1)),
    ] {
        if value == 0 {
            return Err(Error::argument(format!("{name} must be at least 1, not 0")));
        }
    }
    with_threads(config.threads, || run(config, hooks))
}

fn run(config: &EvaluateConfig, hooks: &mut (dyn Hooks + Send)) -> Result<EvaluateResult> {
    let model_config = LlamaConfig::read(&config.model)?;
    let how = quantize(
        config.quant_type.as_deref(),
        config.blocksize,
        config.double_quant,
    )?;
    let (plan, warnings) = plan(
        &model_config,
        config.adapter.as_deref(),
        how,
        config.sequence_length,
    )?;
    for message in warnings {
        hooks.on_event(&Event::Warning { message })?;
    }
    let tokenizer = tokenizer(&config.model, &model_config)?;
    let model = Llama::load(&config.model, model_config, &plan)?;
    let whole = prepare_whole(
        &DataConfig {
            data: config.data.clone(),
            heldout: 0.0,
            heldout_data: Vec::new(),
            stratify: false,
            near_duplicates: 0.0,
            columns: Columns {
                text_column: config.text_column.clone(),
                prompt_column: config.prompt_column.clone(),
                completion_column: config.completion_column.clone(),
                messages_column: config.messages_column.clone(),
                label_column: None,
                group_column: None,
            },
            frames: config.frames.clone(),
            sequence_length: config.sequence_length,
            packing: config.packing,
            seed: 0,
            layout: Layout::Inputs,
            audit: AuditMode::Off,
        },
        &tokenizer,
    )?;
    if let Some(message) = whole.warning {
        hooks.on_event(&Event::Warning { message })?;
    }
    let source = Sequential::new(&whole.packed, config.batch_size)?;
    let begin = Instant::now();
    let limit = config.eval_tokens.unwrap_or(usize::MAX);
    let found = evaluate_source(&model, &source, limit, || {
        Ok(hooks.poll()? == Control::Continue)
    })?
    .ok_or(Error::Interrupted)?;
    let seconds = begin.elapsed().as_secs_f64();
    hooks.on_event(&Event::Eval(EvalEvent {
        step: 0,
        loss: found.loss,
        perplexity: found.loss.exp(),
        tokens: found.tokens,
        best: false,
    }))?;
    let all = found.tokens == whole.packed.targets();
    Ok(EvaluateResult {
        loss: found.loss,
        perplexity: found.loss.exp(),
        bits_per_byte: whole.bytes.filter(|_| all).map(|bytes| {
            found.loss * found.tokens as f64 / bytes.max(1) as f64 / std::f64::consts::LN_2
        }),
        skipped: whole.skipped,
        tokens: found.tokens,
        seconds,
        tokens_per_second: found.tokens as f64 / seconds,
    })
}
