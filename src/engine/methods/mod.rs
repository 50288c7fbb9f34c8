//! The methods beside LoRA: what a run's settings, or a saved adapter, train of a model.

mod bottleneck;
mod ia3;
mod virtual_tokens;

use serde_json::{Map, json};

use super::models::{Architecture, Beside, Task, Trained};
use super::{Method, TargetModules, TrainConfig};
use crate::adapter::{Common, Modules, Selector, Tuned, TunedConfig};
use crate::error::Result;

/// What a run trains beside the base's weights, and warnings; none if its method is another.
///
/// # Errors
/// `Argument` for settings that do not fit the model.
pub fn fresh(
    config: &TrainConfig,
    model: &Architecture,
    modules: Modules,
) -> Result<Option<(Trained, Vec<String>)>> {
    let (beside, warnings) = match config.method {
        Method::Ia3 => ia3::fresh(config, model, modules)?,
        Method::Prompt | Method::Prefix => (virtual_tokens::fresh(config, model)?, Vec::new()),
        Method::Adapter => (bottleneck::fresh(config, model)?, Vec::new()),
        Method::Lora | Method::Qlora | Method::Freeze | Method::Full => return Ok(None),
    };
    let mut whole = Vec::new();
    if model.task() == Task::Classification {
        whole.push(model.names().classifier.to_owned());
    }
    let trained = Trained {
        whole,
        lora: None,
        beside: Some(beside),
    };
    Ok(Some((trained, warnings)))
}

/// A saved adapter in a model, and warnings.
///
/// # Errors
/// `Argument` where it does not fit the model.
pub fn saved(
    tuned: Tuned,
    model: &Architecture,
    modules: Modules,
) -> Result<(Beside, Vec<String>)> {
    let Tuned {
        config,
        mut tensors,
        saved,
    } = tuned;
    let (mut beside, warnings) = match config {
        TunedConfig::Ia3(config) => ia3::saved(&config, &tensors, modules)?,
        TunedConfig::Bottleneck(config) => {
            let beside = bottleneck::saved(config, &tensors, model)?;
            (beside, Vec::new())
        }
        TunedConfig::Virtual(config) => {
            let beside = virtual_tokens::saved(config, &mut tensors, model)?;
            (beside, Vec::new())
        }
    };
    beside.saved = Some(tensors.into_iter().chain(saved).collect());
    Ok((beside, warnings))
}

/// What every configuration says about a run's model.
fn common(config: &TrainConfig, model: &Architecture) -> Common {
    let task = match model.task() {
        Task::Generation => "CAUSAL_LM",
        Task::Classification => "SEQ_CLS",
    };
    Common {
        modules_to_save: Vec::new(),
        kept: Map::from_iter([
            ("task_type".to_owned(), json!(task)),
            (
                "base_model_name_or_path".to_owned(),
                json!(config.model.display().to_string()),
            ),
        ]),
    }
}

/// A setting that names modules, as an adapter's configuration does.
pub fn selector(setting: &TargetModules) -> Selector {
    match setting {
        TargetModules::Pattern(pattern) => Selector::Pattern(pattern.clone()),
        TargetModules::Names(names) => Selector::Names(names.clone()),
    }
}
