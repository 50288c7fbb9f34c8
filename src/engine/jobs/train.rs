//! Training, from settings to a run's folder.

use serde::Serialize;

use super::bias::BiasPlan;
use super::judge::{Judge, Judgement, own_batches, own_text, refuse_forgetting};
use super::learning::Engine;
use super::run_data::{data_config, data_event, labels};
use super::run_model::{load, model_event, trained};
use super::{tokenizer, with_threads};
use crate::data::audit::Severity;
use crate::data::{
    BatchSource, DataConfig, DataReport, Labelled, LabelledBatches, PreparedTexts, Sequential,
    Shuffled, Terms, prepare, prepare_texts,
};
use crate::engine::models::{Architecture, Head, Labels, Task, Transformer};
use crate::engine::{
    Event, Hooks, ModelEvent, RunFolder, StopReason, TaskChoice, TrainConfig, TrainResult, train_in,
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
pub fn train(
    config: &TrainConfig,
    engine: Engine<'_>,
    hooks: &mut (dyn Hooks + Send),
) -> Result<TrainOutcome> {
    config.validate()?;
    engine.check(config)?;
    with_threads(config.threads, || run(config, engine, hooks))
}

fn run(
    config: &TrainConfig,
    engine: Engine<'_>,
    hooks: &mut (dyn Hooks + Send),
) -> Result<TrainOutcome> {
    let mut architecture = Architecture::read(&config.model)?;
    match task(config.task, &architecture)? {
        Task::Generation => generation(config, architecture, engine, hooks),
        Task::Classification => {
            if architecture.labels().is_none() {
                architecture.head = Head::Classification(Labels::fresh([]));
            }
            classification(config, architecture, engine, hooks)
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
    engine: Engine<'_>,
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
    let own_files = own.iter().flat_map(|own| &own.files);
    prepared.report.files.extend(own_files.cloned());
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
        engine,
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
    engine: Engine<'_>,
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
        engine,
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

/// Takes the run's folder, tells what is worked on, and trains.
fn fit<'a>(
    config: &TrainConfig,
    engine: Engine<'a>,
    model: &'a Transformer,
    (train, heldout): (&dyn BatchSource, &dyn BatchSource),
    mut judge: Judge<'_>,
    report: DataReport,
    warnings: Vec<String>,
    hooks: &mut (dyn Hooks + Send),
) -> Result<TrainOutcome> {
    let mut learner = engine.learner(config, model)?;
    let mut model_event = model_event(config, model);
    engine.describe(config, &*learner, &mut model_event)?;
    let folder = RunFolder::open(&config.output, config.resume)?;
    hooks.on_event(&Event::Data(data_event(&report)))?;
    hooks.on_event(&Event::Model(model_event.clone()))?;
    let faults = report.audit.iter();
    let faults = faults
        .filter(|finding| finding.severity >= Severity::Warning)
        .map(|finding| format!("data: {}", finding.message));
    let again = config.resume && !folder.resumes();
    let again =
        again.then(|| "there is no checkpoint yet: the run begins from its start".to_owned());
    for message in faults.chain(warnings).chain(again) {
        hooks.on_event(&Event::Warning { message })?;
    }
    judge.before(&*learner, hooks)?;
    let result = train_in(&folder, config, &mut *learner, train, heldout, hooks)?;
    let judgement = match result.stop_reason {
        StopReason::Interrupted => Judgement::default(),
        _ => judge.after(&*learner, hooks)?,
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
