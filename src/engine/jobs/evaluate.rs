//! The loss of a model on a text.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{Ready, plan, quantize, tokenizer, with_threads};
use crate::data::audit::AuditMode;
use crate::data::{
    BatchSource, Columns, DataConfig, Frames, Labelled, LabelledBatches, Layout, Sequential,
    Tokenizer, prepare_whole, prepare_whole_texts,
};
use crate::engine::metrics::{ClassificationMetrics, GenerationMetrics};
use crate::engine::models::{Architecture, Labels, Task, Transformer};
use crate::engine::{
    Control, EvalEvent, Evaluation, Event, Hooks, Judging, Measures, evaluate as evaluate_source,
};
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
    pub label_column: Option<String>,
    /// Tables in memory, by the names that stand for them in `data`.
    #[serde(skip)]
    pub frames: Frames,
    pub sequence_length: usize,
    pub packing: bool,
    pub batch_size: usize,
    /// Tokens (of a classification model: texts) to read at most; null for all.
    pub eval_tokens: Option<usize>,
    /// Of the bootstrap.
    pub seed: u64,
    /// Whether the result has what was said of every record; of a language model, without `packing`.
    #[serde(default)]
    pub records: bool,
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
    /// Tokens (or labels) predicted.
    pub tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
    /// A language model's measures with their intervals.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<GenerationMetrics>,
    /// A classification model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classification: Option<ClassificationMetrics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records: Option<Scores>,
}

/// What was said of each record, in order.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    /// Negative log-likelihood of what was predicted, nats, summed over it.
    pub loss: Vec<f64>,
    /// Tokens (or labels) predicted.
    pub tokens: Vec<f64>,
    /// A classifier's true and predicted classes, and the names of all.
    pub truth: Vec<u32>,
    pub predicted: Vec<u32>,
    pub labels: Vec<String>,
}

impl Scores {
    /// `order` says which record each row holds, where the rows are not in the records' order.
    fn of(found: Evaluation, labels: &[String], order: &[usize]) -> Self {
        let (truth, predicted, losses) = match found.predictions {
            Some(said) => (said.truth, said.predicted, said.loss),
            None => Default::default(),
        };
        let mut rows: Vec<_> = (0..).zip(found.rows).collect();
        rows.sort_by_key(|(row, _)| order.get(*row).copied().unwrap_or(*row));
        let rows = rows.into_iter().map(|(_, row)| row);
        let (mut loss, mut tokens): (Vec<f64>, Vec<f64>) = rows.unzip();
        loss.extend(&losses);
        tokens.extend(losses.iter().map(|_| 1.0));
        Self {
            loss,
            tokens,
            truth,
            predicted,
            labels: labels.to_vec(),
        }
    }
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
    if config.records && config.packing {
        return Err(Error::argument(
            "records is what is said of each record, which packing mixes: give packing false",
        ));
    }
    with_threads(config.threads, || run(config, hooks))
}

fn run(config: &EvaluateConfig, hooks: &mut (dyn Hooks + Send)) -> Result<EvaluateResult> {
    let architecture = Architecture::read(&config.model)?;
    let how = quantize(
        config.quant_type.as_deref(),
        config.blocksize,
        config.double_quant,
    )?;
    let (adapter, length) = (config.adapter.as_deref(), config.sequence_length);
    let Ready {
        architecture,
        plan,
        warnings,
    } = plan(architecture, adapter, how, length)?;
    for message in warnings {
        hooks.on_event(&Event::Warning { message })?;
    }
    let tokenizer = tokenizer(&config.model, &architecture)?;
    let task = architecture.task();
    let model = Transformer::load(&config.model, architecture, &plan)?;
    match task {
        Task::Generation => generation(config, &model, &tokenizer, hooks),
        Task::Classification => labels(config, &model, &tokenizer, hooks),
    }
}

fn data(config: &EvaluateConfig) -> DataConfig {
    DataConfig {
        data: config.data.clone(),
        heldout: 0.0,
        heldout_data: Vec::new(),
        test: 0.0,
        test_data: Vec::new(),
        stratify: false,
        near_duplicates: 0.0,
        columns: Columns {
            text_column: config.text_column.clone(),
            prompt_column: config.prompt_column.clone(),
            completion_column: config.completion_column.clone(),
            messages_column: config.messages_column.clone(),
            label_column: config.label_column.clone(),
            group_column: None,
            bias_column: None,
            whole: false,
        },
        frames: config.frames.clone(),
        sequence_length: config.sequence_length,
        packing: config.packing,
        few: None,
        seed: 0,
        layout: Layout::Inputs,
        audit: AuditMode::Off,
        terms: None,
    }
}

fn labels(
    config: &EvaluateConfig,
    model: &Transformer,
    tokenizer: &Tokenizer,
    hooks: &mut (dyn Hooks + Send),
) -> Result<EvaluateResult> {
    let (texts, skipped, warning) = prepare_whole_texts(&data(config), tokenizer)?;
    if let Some(message) = warning {
        hooks.on_event(&Event::Warning { message })?;
    }
    let known = model.architecture.labels();
    let class = |label: &str| {
        let found = known.and_then(|known| known.index(label));
        found.ok_or_else(|| {
            Error::argument(format!(
                "the data have the label '{label}', which the model was not trained on; it knows {}",
                known.map_or_else(String::new, |known: &Labels| known.names.join(", "))
            ))
        })
    };
    let set = Labelled::new(texts, class)?;
    let source = LabelledBatches::new(&set, config.batch_size)?;
    measured(config, model, &source, &[], skipped, hooks)
}

fn generation(
    config: &EvaluateConfig,
    model: &Transformer,
    tokenizer: &Tokenizer,
    hooks: &mut (dyn Hooks + Send),
) -> Result<EvaluateResult> {
    let whole = prepare_whole(&data(config), tokenizer)?;
    if let Some(message) = whole.warning {
        hooks.on_event(&Event::Warning { message })?;
    }
    let source = Sequential::new(&whole.packed, config.batch_size)?.spelling(whole.bytes);
    let order = whole.packed.examples_of_rows();
    measured(config, model, &source, &order, whole.skipped, hooks)
}

fn measured(
    config: &EvaluateConfig,
    model: &Transformer,
    source: &dyn BatchSource,
    order: &[usize],
    skipped: usize,
    hooks: &mut (dyn Hooks + Send),
) -> Result<EvaluateResult> {
    let begin = Instant::now();
    let limit = config.eval_tokens.unwrap_or(usize::MAX);
    let found = evaluate_source(model, source, limit, || {
        Ok(hooks.poll()? == Control::Continue)
    })?
    .ok_or(Error::Interrupted)?;
    let seconds = begin.elapsed().as_secs_f64();
    let Measures {
        generation,
        classification,
    } = found.measures(model.labels(), source.bytes(), config.seed);
    hooks.on_event(&Event::Eval(EvalEvent {
        step: 0,
        loss: found.loss,
        perplexity: found.loss.exp(),
        tokens: found.tokens,
        best: false,
        generation,
        classification: classification.as_ref().map(|found| found.summary),
    }))?;
    Ok(EvaluateResult {
        loss: found.loss,
        perplexity: found.loss.exp(),
        bits_per_byte: generation.and_then(|found| Some(found.bits_per_byte?.value)),
        skipped,
        tokens: found.tokens,
        seconds,
        tokens_per_second: found.tokens as f64 / seconds,
        generation,
        classification,
        records: config
            .records
            .then(|| Scores::of(found, model.labels(), order)),
    })
}
