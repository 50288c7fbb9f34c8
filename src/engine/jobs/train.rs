//! Training, from settings to a run's folder.

use serde::Serialize;
use serde_json::{Map, json};

use super::bias::BiasPlan;
use super::judge::{Judge, Judgement, own_batches, own_text, refuse_forgetting};
use super::{Names, select, tokenizer, with_threads};
use crate::adapter::{AdapterConfig, Selector};
use crate::data::audit::Severity;
use crate::data::{
    BatchSource, DataConfig, DataReport, Few, Labelled, LabelledBatches, PreparedTexts, Sequential,
    Shuffled, Terms, prepare, prepare_texts,
};
use crate::engine::models::{
    Architecture, Head, Init, Labels, LoadPlan, Lora, Quantize, Task, Trained, Transformer,
};
use crate::engine::{
    DataEvent, Event, Hooks, Method, ModelEvent, RunFolder, Skip, StopReason, TaskChoice,
    TrainConfig, TrainResult, methods, train_in,
};
use crate::error::{Error, Result};

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
    #[serde(flatten)]
    pub judgement: Judgement,
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
    let mut architecture = Architecture::read(&config.model)?;
    match task(config.task, &architecture)? {
        Task::Generation => generation(config, architecture, hooks),
        Task::Classification => {
            if architecture.labels().is_none() {
                architecture.head = Head::Classification(Labels::fresh([]));
            }
            classification(config, architecture, hooks)
        }
    }
}

fn task(choice: TaskChoice, architecture: &Architecture) -> Result<Task> {
    match (choice, architecture.task()) {
        (TaskChoice::Auto, task) => Ok(task),
        (TaskChoice::Classification, _) => Ok(Task::Classification),
        (TaskChoice::Generation, Task::Generation) => Ok(Task::Generation),
        (TaskChoice::Generation, Task::Classification) => Err(Error::argument(format!(
            "task generation needs a causal language model, and {} is none; give another model, or \
             task classification",
            architecture.class
        ))),
    }
}

fn generation(
    config: &TrainConfig,
    architecture: Architecture,
    hooks: &mut (dyn Hooks + Send),
) -> Result<TrainOutcome> {
    let (trained, mut warnings) = trained(config, &architecture)?;
    let tokenizer = tokenizer(&config.model, &architecture)?;
    tokenizer.fits()?;
    let model = load(config, architecture, trained)?;
    let terms = terms(config)?;
    let names = terms.as_ref().map(|terms| terms.names.clone());
    if config.bias_column.is_some() {
        return Err(Error::argument(
            "bias_column compares the labels that groups are given, which generation has none of: \
             give bias_terms, or task classification",
        ));
    }
    let data = DataConfig {
        terms,
        ..data_config(config)
    };
    let mut prepared = prepare(&data, &tokenizer)?;
    let own = own_text(config, &tokenizer, &mut warnings)?;
    prepared.report.files.extend(config.forgetting.clone());
    drop(tokenizer);
    let train = Shuffled::new(&prepared.train, config.batch_size, config.seed)?
        .by_length(config.sort_by_length);
    let heldout = Sequential::new(&prepared.heldout, config.batch_size)?
        .spelling(prepared.report.heldout_bytes);
    let test = prepared.test.as_ref();
    let test = test.map(|test| {
        let source = Sequential::new(test, config.batch_size)?;
        Ok::<_, Error>(source.spelling(prepared.report.test_bytes))
    });
    let (test, own) = (test.transpose()?, own_batches(config, own.as_ref())?);
    let side = judged_side(test.is_some());
    let (swaps, left_out) = &prepared.swaps;
    if names.is_some() && swaps.is_empty() {
        return Err(no_group(side, "holds a term of bias_terms"));
    }
    let bias = names.map(|names| BiasPlan {
        side,
        swaps,
        left_out: *left_out,
        sequence_length: config.sequence_length,
        terms: Some(names),
        ..BiasPlan::default()
    });
    fit(
        config,
        &model,
        (&train, &heldout),
        Judge::new(config, test.as_ref().map(source), own.as_ref().map(source)).with_bias(bias),
        prepared.report,
        warnings,
        hooks,
    )
}

fn classification(
    config: &TrainConfig,
    mut architecture: Architecture,
    hooks: &mut (dyn Hooks + Send),
) -> Result<TrainOutcome> {
    refuse_forgetting(config)?;
    let (trained, mut warnings) = trained(config, &architecture)?;
    let tokenizer = tokenizer(&config.model, &architecture)?;
    tokenizer.fits()?;
    let terms = terms(config)?;
    let names = terms.as_ref().map(|terms| terms.names.clone());
    let data = DataConfig {
        terms,
        ..data_config(config)
    };
    let PreparedTexts {
        train,
        heldout,
        test,
        report,
    } = prepare_texts(&data, &tokenizer)?;
    drop(tokenizer);
    let (labels, warning) = labels(
        &architecture,
        &train.labels,
        &[
            ("held-out", &heldout.labels),
            ("test", test.as_ref().map_or(&[], |test| &test.labels)),
        ],
    )?;
    warnings.extend(warning);
    let class = |label: &str| {
        let found = labels.index(label);
        found.ok_or_else(|| Error::run(format!("label '{label}' has no number")))
    };
    let judged = test.as_ref().unwrap_or(&heldout);
    let (groups, swapped) = (judged.groups.clone(), judged.swapped_texts());
    let (train, heldout) = (Labelled::new(train, class)?, Labelled::new(heldout, class)?);
    let test = test.map(|test| Labelled::new(test, class)).transpose()?;
    let (places, swapped) = swapped;
    let swapped = (!places.is_empty()).then(|| Labelled::new(swapped, class));
    let swapped = swapped.transpose()?;
    architecture.head = Head::Classification(labels);
    let model = load(config, architecture, trained)?;
    let train = LabelledBatches::new(&train, config.batch_size)?
        .shuffled(config.seed, config.sort_by_length);
    let heldout = LabelledBatches::new(&heldout, config.batch_size)?;
    let test = test.as_ref();
    let test = test.map(|test| LabelledBatches::new(test, config.batch_size));
    let test = test.transpose()?;
    let swapped = swapped.as_ref();
    let swapped = swapped.map(|swapped| LabelledBatches::new(swapped, config.batch_size));
    let swapped = swapped.transpose()?;
    let asked = config.bias_column.is_some() || names.is_some();
    let side = judged_side(test.is_some());
    if asked && groups.iter().all(Option::is_none) {
        return Err(no_group(side, "names a group"));
    }
    let bias = asked.then(|| BiasPlan {
        side,
        groups,
        records: Some(test.as_ref().map_or(&heldout, |test| test)),
        swapped: swapped.as_ref().map(source),
        places,
        terms: names,
        ..BiasPlan::default()
    });
    let judge = Judge::new(config, test.as_ref().map(source), None).with_bias(bias);
    fit(
        config,
        &model,
        (&train, &heldout),
        judge,
        report,
        warnings,
        hooks,
    )
}

fn terms(config: &TrainConfig) -> Result<Option<Terms>> {
    let pairs = &config.bias_terms;
    (!pairs.is_empty()).then(|| Terms::parse(pairs)).transpose()
}

/// Where groups are compared.
fn judged_side(has_test: bool) -> &'static str {
    if has_test { "test" } else { "held-out" }
}

fn no_group(side: &str, what: &str) -> Error {
    Error::argument(format!(
        "no record of the {side} data {what}, so that bias cannot be measured; give other records \
         or terms, or leave bias_column and bias_terms out"
    ))
}

fn source<S: BatchSource>(source: &S) -> &dyn BatchSource {
    source
}

/// The head's classes: the stored head's where they name every label of the data, else the data's;
/// and a warning where a stored head is given up.
fn labels(
    architecture: &Architecture,
    train: &[String],
    others: &[(&str, &[String])],
) -> Result<(Labels, Option<String>)> {
    let seen = Labels::fresh(train.iter().cloned());
    let quoted = |names: &[String]| {
        const SHOWN: usize = 10;
        let more = if names.len() > SHOWN { ", …" } else { "" };
        let names: Vec<String> = names.iter().take(SHOWN).map(|n| format!("'{n}'")).collect();
        format!("{}{more}", names.join(", "))
    };
    for (side, given) in others {
        let mut unseen: Vec<String> = given.to_vec();
        unseen.retain(|label| seen.index(label).is_none());
        unseen.sort();
        unseen.dedup();
        if !unseen.is_empty() {
            return Err(Error::argument(format!(
                "the {side} data have labels that the training data never show: {}; hold out other \
                 records, or add some of these labels to the training data",
                quoted(&unseen)
            )));
        }
    }
    if seen.len() < 2 {
        return Err(Error::argument(format!(
            "the training data have one label alone ({}), which leaves nothing to tell apart",
            quoted(&seen.names)
        )));
    }
    match architecture.labels().filter(|stored| !stored.fresh) {
        Some(stored) if seen.names.iter().all(|name| stored.index(name).is_some()) => {
            Ok((stored.clone(), None))
        }
        Some(stored) => {
            let warning = format!(
                "the model's head knows the labels {}, the data have {}: a new head is trained",
                quoted(&stored.names),
                quoted(&seen.names)
            );
            Ok((seen, Some(warning)))
        }
        None => Ok((seen, None)),
    }
}

fn load(config: &TrainConfig, architecture: Architecture, trained: Trained) -> Result<Transformer> {
    let plan = LoadPlan {
        quantize: (config.method == Method::Qlora).then_some(Quantize {
            quant_type: config.quant_type,
            blocksize: config.blocksize,
            double_quant: config.double_quant,
        }),
        positions: config.sequence_length + trained.virtual_tokens(),
        trained,
        seed: config.seed,
    };
    Transformer::load(&config.model, architecture, &plan)
}

/// Takes the run's folder, tells what is worked on, and trains.
fn fit(
    config: &TrainConfig,
    model: &Transformer,
    (train, heldout): (&dyn BatchSource, &dyn BatchSource),
    mut judge: Judge<'_>,
    report: DataReport,
    warnings: Vec<String>,
    hooks: &mut (dyn Hooks + Send),
) -> Result<TrainOutcome> {
    let folder = RunFolder::open(&config.output, config.resume)?;
    let model_event = model_event(config, model);
    hooks.on_event(&Event::Data(data_event(&report)))?;
    hooks.on_event(&Event::Model(model_event.clone()))?;
    let faults = report.audit.iter();
    let faults = faults
        .filter(|finding| finding.severity >= Severity::Warning)
        .map(|finding| format!("data: {}", finding.message));
    for message in faults.chain(warnings) {
        hooks.on_event(&Event::Warning { message })?;
    }
    judge.before(model, hooks)?;
    let result = train_in(&folder, config, model, train, heldout, hooks)?;
    let judgement = match result.stop_reason {
        StopReason::Interrupted => Judgement::default(),
        _ => judge.after(model, hooks)?,
    };
    let adapter = config
        .method
        .is_adapter()
        .then(|| config.output.join("adapter"));
    Ok(TrainOutcome {
        result,
        output: config.output.clone(),
        adapter,
        model: model_event,
        data: report,
        judgement,
    })
}

/// What the settings train of the model. A classification head is trained beside adapters.
fn trained(config: &TrainConfig, model: &Architecture) -> Result<(Trained, Vec<String>)> {
    match config.method {
        Method::Full => return Ok((Trained::everything(), Vec::new())),
        Method::Freeze => return Ok((last_layers(config, model)?, Vec::new())),
        _ => {}
    }
    if let Some(found) = methods::fresh(config, model, Names::new(model).modules())? {
        return Ok(found);
    }
    let all = || Selector::Pattern("all-linear".to_owned());
    let target = (config.target_modules.as_ref()).map_or_else(all, methods::selector);
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
    let mut whole = Vec::new();
    if model.task() == Task::Classification {
        adapter
            .kept
            .insert("task_type".to_owned(), json!("SEQ_CLS"));
        whole.push(model.names().classifier.to_owned());
    }
    let (resolved, selection) = select(&adapter, model)?;
    let lora = Some(Lora {
        config: Box::new(resolved),
        targets: selection.targets,
        init: Init::Random,
    });
    let trained = Trained {
        whole,
        lora,
        beside: None,
    };
    Ok((trained, selection.warnings))
}

/// The head and the last blocks, with the norm behind them.
fn last_layers(config: &TrainConfig, model: &Architecture) -> Result<Trained> {
    let (names, count) = (model.names(), config.trained_layers);
    let all = model.num_hidden_layers;
    if count > all {
        return Err(Error::argument(format!(
            "trained_layers is {count}, but the model has {all} blocks"
        )));
    }
    let tied = model.task() == Task::Generation && model.tie_word_embeddings;
    if tied && count == 0 {
        return Err(Error::argument(
            "the model's output layer is its embedding, which method freeze leaves frozen: give \
             trained_layers, the number of blocks to train at the end",
        ));
    }
    let mut whole: Vec<String> = (all - count..all).map(|at| names.layer(at)).collect();
    if !tied {
        whole.push(model.output().to_owned());
    }
    if model.task() == Task::Classification {
        whole.extend(names.pooler.map(|pooler| names.outer(pooler)));
    }
    if count > 0 {
        whole.extend(names.norm.map(|norm| names.outer(norm)));
    }
    Ok(Trained {
        whole,
        ..Trained::nothing()
    })
}

pub(super) fn data_config(config: &TrainConfig) -> DataConfig {
    DataConfig {
        data: config.data.clone(),
        heldout: config.heldout,
        heldout_data: config.heldout_data.clone(),
        test: config.test,
        test_data: config.test_data.clone(),
        stratify: config.stratify,
        near_duplicates: config.near_duplicates,
        columns: crate::data::Columns {
            text_column: config.text_column.clone(),
            prompt_column: config.prompt_column.clone(),
            completion_column: config.completion_column.clone(),
            messages_column: config.messages_column.clone(),
            label_column: config.label_column.clone(),
            group_column: config.group.clone(),
            bias_column: config.bias_column.clone(),
        },
        frames: config.frames.clone(),
        sequence_length: config.sequence_length,
        packing: config.packing,
        seed: config.split_seed.unwrap_or(config.seed),
        few: config.shots.map(|shots| Few {
            shots,
            seed: config.seed,
        }),
        layout: crate::data::Layout::Inputs,
        audit: config.audit,
        terms: None,
    }
}

fn data_event(report: &DataReport) -> DataEvent {
    DataEvent {
        records: report.records,
        train_records: report.train_records,
        heldout_records: report.heldout_records,
        test_records: report.test_records,
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

fn model_event(config: &TrainConfig, model: &Transformer) -> ModelEvent {
    let architecture = &model.architecture;
    let mut details = Map::new();
    if config.method.is_adapter() {
        let names = Names::new(architecture);
        let adapted = model.adapter_modules().len();
        if adapted > 0 {
            details.insert("adapted_modules".to_owned(), json!(adapted));
            details.insert("linear_modules".to_owned(), json!(names.linear.len() - 1));
        }
    }
    if let Some(labels) = architecture.labels() {
        details.insert("labels".to_owned(), json!(labels.names));
        details.insert("new_head".to_owned(), json!(labels.fresh));
    }
    ModelEvent {
        architecture: architecture.trained_class().to_owned(),
        parameters: model.base_parameters(),
        trainable: model.trainable(),
        quantized_bytes: model.quantized_bytes(),
        details,
    }
}
