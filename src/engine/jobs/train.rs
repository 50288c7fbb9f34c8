//! Training, from settings to a run's folder.

use serde::Serialize;
use serde_json::{Map, json};

use super::{Names, select, tokenizer, with_threads};
use crate::adapter::{AdapterConfig, Selector};
use crate::data::audit::Severity;
use crate::data::{DataConfig, DataReport, Sequential, Shuffled, prepare};
use crate::engine::models::llama::{
    ARCHITECTURE, Init, Llama, LlamaConfig, LoadPlan, Quantize, Trained,
};
use crate::engine::{
    DataEvent, Event, Hooks, Method, ModelEvent, RunFolder, Skip, TargetModules, TrainConfig,
    TrainResult, train_in,
};
use crate::error::Result;

/// How a run ended, and what it worked on.
#[derive(Debug, Clone, Serialize)]
pub struct TrainOutcome {
    #[serde(flatten)]
    pub result: TrainResult,
    pub output: std::path::PathBuf,
    /// Folder of the adapter; none if every weight was trained.
    pub adapter: Option<std::path::PathBuf>,
    pub model: ModelEvent,
    pub data: DataReport,
}

/// Reads, checks and trains. Nothing is written before model, data and settings are known to be good.
///
/// # Errors
/// As the parts' own: `Argument` and `Format` for bad input, `Run` for a run that failed.
pub fn train(config: &TrainConfig, hooks: &mut (dyn Hooks + Send)) -> Result<TrainOutcome> {
    config.validate()?;
    with_threads(config.threads, || run(config, hooks))
}

fn run(config: &TrainConfig, hooks: &mut (dyn Hooks + Send)) -> Result<TrainOutcome> {
    let model_config = LlamaConfig::read(&config.model)?;
    let (trained, warnings) = trained(config, &model_config)?;
    let tokenizer = tokenizer(&config.model, &model_config)?;
    let plan = LoadPlan {
        quantize: (config.method == Method::Qlora).then_some(Quantize {
            quant_type: config.quant_type,
            blocksize: config.blocksize,
            double_quant: config.double_quant,
        }),
        trained,
        positions: config.sequence_length,
    };
    let model = Llama::load(&config.model, model_config, &plan)?;
    let prepared = prepare(&data_config(config), &tokenizer)?;
    drop(tokenizer);

    let folder = RunFolder::open(&config.output, config.resume)?;
    let model_event = model_event(config, &model);
    hooks.on_event(&Event::Data(data_event(&prepared.report)))?;
    hooks.on_event(&Event::Model(model_event.clone()))?;
    let faults = prepared.report.audit.iter();
    let faults = faults
        .filter(|finding| finding.severity >= Severity::Warning)
        .map(|finding| format!("data: {}", finding.message));
    let warnings = faults.chain(warnings);
    for message in warnings {
        hooks.on_event(&Event::Warning { message })?;
    }
    let train = Shuffled::new(&prepared.train, config.batch_size, config.seed)?
        .by_length(config.sort_by_length);
    let heldout = Sequential::new(&prepared.heldout, config.batch_size)?;
    let result = train_in(&folder, config, &model, &train, &heldout, hooks)?;
    let adapter = (config.method != Method::Full).then(|| config.output.join("adapter"));
    Ok(TrainOutcome {
        result,
        output: config.output.clone(),
        adapter,
        model: model_event,
        data: prepared.report,
    })
}

/// What the settings train of the model.
fn trained(config: &TrainConfig, model: &LlamaConfig) -> Result<(Trained, Vec<String>)> {
    if config.method == Method::Full {
        return Ok((Trained::Everything, Vec::new()));
    }
    let target = match &config.target_modules {
        TargetModules::Pattern(pattern) => Selector::Pattern(pattern.clone()),
        TargetModules::Names(names) => Selector::Names(names.clone()),
    };
    let mut adapter = AdapterConfig::new(target);
    adapter.r = config.r;
    adapter.lora_alpha = config.lora_alpha;
    adapter.lora_dropout = config.lora_dropout;
    adapter.use_rslora = config.use_rslora;
    adapter.rank_pattern = config.rank_pattern.clone().into_iter().collect();
    adapter.alpha_pattern = config.alpha_pattern.clone().into_iter().collect();
    adapter.kept.insert(
        "base_model_name_or_path".to_owned(),
        json!(config.model.display().to_string()),
    );
    let (resolved, selection) = select(&adapter, model)?;
    let trained = Trained::Lora {
        config: Box::new(resolved),
        targets: selection.targets,
        init: Init::Random { seed: config.seed },
    };
    Ok((trained, selection.warnings))
}

fn data_config(config: &TrainConfig) -> DataConfig {
    DataConfig {
        data: config.data.clone(),
        heldout: config.heldout,
        heldout_data: config.heldout_data.clone(),
        stratify: config.stratify,
        near_duplicates: config.near_duplicates,
        columns: crate::data::Columns {
            text_column: config.text_column.clone(),
            prompt_column: config.prompt_column.clone(),
            completion_column: config.completion_column.clone(),
            messages_column: config.messages_column.clone(),
            label_column: config.label_column.clone(),
            group_column: config.group.clone(),
        },
        frames: config.frames.clone(),
        sequence_length: config.sequence_length,
        packing: config.packing,
        seed: config.seed,
        layout: crate::data::Layout::Inputs,
        audit: config.audit,
    }
}

fn data_event(report: &DataReport) -> DataEvent {
    DataEvent {
        records: report.records,
        train_records: report.train_records,
        heldout_records: report.heldout_records,
        train_tokens: report.train_tokens,
        heldout_tokens: report.heldout_tokens,
        truncated: report.truncated,
        skipped: report
            .skipped
            .iter()
            .map(|skip| Skip {
                file: skip.file.display().to_string(),
                record: skip.record,
                reason: skip.reason.clone(),
            })
            .collect(),
        skipped_total: report.skipped_total,
        files: report.files.clone(),
    }
}

fn model_event(config: &TrainConfig, model: &Llama) -> ModelEvent {
    let mut details = Map::new();
    if config.method != Method::Full {
        let names = Names::new(&model.config);
        let adapted = model.adapter_modules().len();
        details.insert("adapted_modules".to_owned(), json!(adapted));
        details.insert("linear_modules".to_owned(), json!(names.linear.len() - 1));
    }
    ModelEvent {
        architecture: ARCHITECTURE.to_owned(),
        parameters: model.base_parameters(),
        trainable: model.trainable(),
        quantized_bytes: model.quantized_bytes(),
        details,
    }
}
