//! The commands a user gives: train, evaluate, generate, merge, audit, each from its settings alone.

mod audit;
mod bias;
mod compute;
mod evaluate;
mod generate;
mod judge;
mod learning;
mod merge;
mod run_data;
mod run_model;
mod train;

use std::collections::BTreeMap;
use std::path::Path;

pub use audit::{AuditJob, audit};
pub use bias::{Bias, Said};
pub use compute::compute;
pub use evaluate::{EvaluateConfig, EvaluateResult, Scores, evaluate};
pub use generate::{GenerateConfig, GenerateResult, generate};
pub use judge::{Forgetting, Judgement, Tested};
pub use learning::{Engine, Flat, MakesLearners, Outline, Part};
pub use merge::{MergeConfig, MergeResult, merge};
pub use train::{TrainOutcome, train};

use crate::adapter::{self, Modules};
use crate::data::Tokenizer;
use crate::dtype::QuantType;
use crate::engine::methods;
use crate::engine::models::{
    Architecture, Head, Init, Labels, LoadPlan, Lora, Quantize, Trained, linear_modules,
    other_modules,
};
use crate::error::{Error, Result};
use crate::folder::ConfigFile;

/// Of a job's threads, in bytes: as much as a main thread usually has.
const STACK: usize = 8 << 20;

/// Tensors of an adapter's `modules_to_save`.
type Saved = BTreeMap<String, adapter::SavedTensor>;

/// Rayon threads for everything that runs in `work`; all of the machine's if `threads` is none.
///
/// # Errors
/// `Argument` for zero threads and for more than any machine has; whatever `work` returns.
pub fn with_threads<R: Send>(
    threads: Option<usize>,
    work: impl FnOnce() -> Result<R> + Send,
) -> Result<R> {
    let Some(threads) = threads else {
        return work();
    };
    super::validate::threads(threads)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(STACK)
        .build()
        .map_err(|error| Error::run(format!("cannot start {threads} threads: {error}")))?;
    pool.install(work)
}

/// The modules of a model as adapters see them.
struct Names {
    linear: Vec<String>,
    other: Vec<String>,
    output: &'static str,
}

impl Names {
    fn new(architecture: &Architecture) -> Self {
        Self {
            linear: linear_modules(architecture),
            // Every module that contains no other: a pattern that chooses one of these is PEFT's error.
            other: other_modules(architecture),
            output: architecture.output(),
        }
    }

    fn modules(&self) -> Modules<'_> {
        Modules {
            linear: &self.linear,
            other: &self.other,
            output: Some(self.output),
        }
    }
}

/// What `config` chooses in this model; the output layer cannot be adapted here.
fn select(
    config: &adapter::AdapterConfig,
    model: &Architecture,
) -> Result<(adapter::AdapterConfig, adapter::Selection)> {
    let names = Names::new(model);
    let selection = adapter::select(config, names.modules())?;
    let mut targets = selection.targets.iter();
    if targets.any(|target| target.module == names.output) {
        return Err(Error::unsupported(format!(
            "target_modules chooses {}; the engine adapts the layers' linear modules only",
            names.output
        )));
    }
    Ok((selection.resolve(config, names.modules()), selection))
}

/// A model that can be loaded, and warnings for the user.
struct Ready {
    architecture: Architecture,
    plan: LoadPlan,
    warnings: Vec<String>,
}

/// How to load a model that is not trained.
fn plan(
    mut architecture: Architecture,
    adapter: Option<&Path>,
    quantize: Option<Quantize>,
    positions: usize,
) -> Result<Ready> {
    let (trained, warnings) = match adapter {
        Some(folder) => saved_adapter(folder, &mut architecture)?,
        None => (Trained::nothing(), Vec::new()),
    };
    let limit = architecture.max_position_embeddings;
    let plan = LoadPlan {
        quantize,
        positions: limit
            .min(positions + trained.virtual_tokens())
            .max(positions),
        trained,
        seed: 0,
        hollow: false,
    };
    Ok(Ready {
        architecture,
        plan,
        warnings,
    })
}

/// Reads an adapter for a model, which gets the head that the adapter was trained with.
fn saved_adapter(folder: &Path, model: &mut Architecture) -> Result<(Trained, Vec<String>)> {
    if !adapter::is_lora(folder)? {
        let (tuned, mut warnings) = adapter::read_tuned(folder)?;
        let whole = saved_head(folder, &tuned.saved, model)?;
        let (beside, more) = methods::saved(tuned, model, Names::new(model).modules())?;
        warnings.extend(more);
        let trained = Trained {
            whole,
            lora: None,
            beside: Some(beside),
        };
        return Ok((trained, warnings));
    }
    let (adapter, mut warnings) = adapter::read(folder)?;
    let whole = saved_head(folder, &adapter.saved, model)?;
    let (config, selection) = select(&adapter.config, model)?;
    adapter.check(&selection)?;
    warnings.extend(selection.warnings);
    let trained = Trained {
        whole,
        lora: Some(Lora {
            config: Box::new(config),
            targets: selection.targets,
            init: Init::Saved(Box::new(adapter)),
        }),
        beside: None,
    };
    Ok((trained, warnings))
}

/// Gives the model the head that an adapter brings along; its modules.
fn saved_head(folder: &Path, saved: &Saved, model: &mut Architecture) -> Result<Vec<String>> {
    if let Some(labels) = saved_labels(folder, saved, model)? {
        model.head = Head::Classification(labels);
    }
    saved_modules(folder, saved, model)
}

/// The classes of an adapter with a head of its own: those of the config.json beside it, or of the
/// model where their number fits, or nameless ones.
fn saved_labels(folder: &Path, saved: &Saved, model: &Architecture) -> Result<Option<Labels>> {
    let weight = format!("{}.weight", model.names().classifier);
    let Some(head) = saved.get(&weight) else {
        return Ok(None);
    };
    let count = head.shape.first().copied().unwrap_or(0);
    let beside = ConfigFile::open_optional(folder, "config.json")?;
    let beside = beside.as_ref().map(Labels::read).transpose()?;
    let own = model.labels().filter(|labels| !labels.fresh).cloned();
    let found = beside.into_iter().chain(own);
    let mut fitting = found.filter(|labels| labels.len() == count);
    let nameless = || Labels {
        names: (0..count).map(|at| format!("LABEL_{at}")).collect(),
        fresh: false,
    };
    Ok(Some(fitting.next().unwrap_or_else(nameless)))
}

/// The modules whose weights the adapter brings along, all of them parts of the model's head.
fn saved_modules(folder: &Path, saved: &Saved, model: &Architecture) -> Result<Vec<String>> {
    let names = model.names();
    let pooler = names.pooler.map(|pooler| names.outer(pooler));
    let mut whole: Vec<String> = Vec::new();
    for name in saved.keys() {
        let module = name
            .rsplit_once('.')
            .map_or(name.as_str(), |(module, _)| module);
        let of_head = model.labels().is_some() && module == names.classifier;
        if !of_head && pooler.as_deref() != Some(module) {
            return Err(Error::unsupported(format!(
                "{}: modules_to_save has {name}; the engine takes a classification head's only",
                folder.display()
            )));
        }
        if !whole.iter().any(|done| done == module) {
            whole.push(module.to_owned());
        }
    }
    Ok(whole)
}

/// 4-bit settings as a user gives them; none where no type is named.
fn quantize(
    quant_type: Option<&str>,
    blocksize: usize,
    double_quant: bool,
) -> Result<Option<Quantize>> {
    quant_type
        .map(|name| {
            Ok(Quantize {
                quant_type: QuantType::from_name(name)?,
                blocksize,
                double_quant,
            })
        })
        .transpose()
}

/// The model folder's tokenizer, putting the model's own start and end tokens around documents.
fn tokenizer(folder: &Path, config: &Architecture) -> Result<Tokenizer> {
    Tokenizer::from_folder(
        folder,
        config.bos_token_id,
        config.eos_token_ids.first().copied(),
        Some(config.vocab_size),
    )
}
