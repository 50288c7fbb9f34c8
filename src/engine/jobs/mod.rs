//! The commands a user gives: train, evaluate, generate, merge, audit, each from its settings alone.

mod audit;
mod compute;
mod evaluate;
mod generate;
mod merge;
mod train;

use std::path::Path;

pub use audit::{AuditJob, audit};
pub use compute::compute;
pub use evaluate::{EvaluateConfig, EvaluateResult, evaluate};
pub use generate::{GenerateConfig, GenerateResult, generate};
pub use merge::{MergeConfig, MergeResult, merge};
pub use train::{TrainOutcome, train};

use crate::adapter::{self, Modules};
use crate::data::Tokenizer;
use crate::dtype::QuantType;
use crate::engine::models::llama::{
    Init, LlamaConfig, LoadPlan, Quantize, Trained, linear_modules,
};
use crate::error::{Error, Result};

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
        .build()
        .map_err(|error| Error::run(format!("cannot start {threads} threads: {error}")))?;
    pool.install(work)
}

/// The modules of a model as adapters see them.
struct Names {
    linear: Vec<String>,
    other: Vec<String>,
}

impl Names {
    fn new(config: &LlamaConfig) -> Self {
        // Every module that contains no other: a pattern that chooses one of these is PEFT's error.
        let inner = (0..config.num_hidden_layers).flat_map(|at| {
            ["input_layernorm", "post_attention_layernorm", "mlp.act_fn"]
                .map(|name| format!("model.layers.{at}.{name}"))
        });
        let outer = ["embed_tokens", "norm", "rotary_emb"].map(|name| format!("model.{name}"));
        Self {
            linear: linear_modules(config),
            other: inner.chain(outer).collect(),
        }
    }

    fn modules(&self) -> Modules<'_> {
        Modules {
            linear: &self.linear,
            other: &self.other,
            output: Some("lm_head"),
        }
    }
}

/// What `config` chooses in this model; the output layer cannot be adapted here.
fn select(
    config: &adapter::AdapterConfig,
    model: &LlamaConfig,
) -> Result<(adapter::AdapterConfig, adapter::Selection)> {
    let names = Names::new(model);
    let selection = adapter::select(config, names.modules())?;
    if selection
        .targets
        .iter()
        .any(|target| target.module == "lm_head")
    {
        return Err(Error::unsupported(
            "target_modules chooses lm_head; the engine adapts the layers' linear modules only",
        ));
    }
    Ok((selection.resolve(config, names.modules()), selection))
}

/// Reads an adapter for a model: what is trained, and warnings for the user.
fn saved_adapter(folder: &Path, model: &LlamaConfig) -> Result<(Trained, Vec<String>)> {
    let (adapter, mut warnings) = adapter::read(folder)?;
    let (config, selection) = select(&adapter.config, model)?;
    adapter.check(&selection)?;
    warnings.extend(selection.warnings);
    let trained = Trained::Lora {
        config: Box::new(config),
        targets: selection.targets,
        init: Init::Saved(Box::new(adapter)),
    };
    Ok((trained, warnings))
}

/// How to load a model that is not trained.
fn plan(
    config: &LlamaConfig,
    adapter: Option<&Path>,
    quantize: Option<Quantize>,
    positions: usize,
) -> Result<(LoadPlan, Vec<String>)> {
    let (trained, warnings) = match adapter {
        Some(folder) => saved_adapter(folder, config)?,
        None => (Trained::Nothing, Vec::new()),
    };
    let plan = LoadPlan {
        quantize,
        trained,
        positions,
    };
    Ok((plan, warnings))
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
fn tokenizer(folder: &Path, config: &LlamaConfig) -> Result<Tokenizer> {
    Tokenizer::from_folder(
        folder,
        config.bos_token_id,
        config.eos_token_ids.first().copied(),
        Some(config.vocab_size),
    )
}
