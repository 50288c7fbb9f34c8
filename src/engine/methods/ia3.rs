//! (IA)³ (Liu et al., 2022): learned vectors on keys, values and what the MLP's last layer takes in.

use std::collections::BTreeMap;

use super::{common, selector};
use crate::adapter::{Ia3Config, Ia3Selection, Modules, SavedTensor, Selector, TunedConfig};
use crate::engine::TrainConfig;
use crate::engine::models::{Architecture, Beside, Family};
use crate::error::{Error, Result};
use crate::lora::Scaled;

/// PEFT's `TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING` and `…_FEEDFORWARD_MODULES_MAPPING`.
fn defaults(family: Family) -> (&'static [&'static str], &'static [&'static str]) {
    match family {
        Family::Llama => (&["k_proj", "v_proj", "down_proj"], &["down_proj"]),
        Family::Gpt2 => (&["c_attn", "mlp.c_proj"], &["mlp.c_proj"]),
        Family::Bert => (&["key", "value", "output.dense"], &["output.dense"]),
    }
}

pub(super) fn fresh(
    config: &TrainConfig,
    model: &Architecture,
    modules: Modules,
) -> Result<(Beside, Vec<String>)> {
    let (targets, feedforward) = defaults(model.family);
    let chosen = |setting: &Option<_>, names: &[&str]| match setting {
        Some(setting) => selector(setting),
        None => Selector::Names(names.iter().map(|&name| name.to_owned()).collect()),
    };
    let own = Ia3Config {
        common: common(config, model),
        target_modules: chosen(&config.target_modules, targets),
        exclude_modules: None,
        feedforward_modules: chosen(&config.feedforward_modules, feedforward),
        fan_in_fan_out: model.family.is_transposed(),
    };
    let selection = choose(&own, modules)?;
    let named = match &own.feedforward_modules {
        Selector::Names(names) => !names.is_empty(),
        Selector::Pattern(_) => true,
    };
    let given = config.feedforward_modules.is_some() && named;
    if given && !selection.modules.values().any(|input| *input) {
        return Err(Error::argument(
            "feedforward_modules choose none of the target_modules: name some of these, or [] for \
             none",
        ));
    }
    Ok(beside(selection))
}

pub(super) fn saved(
    config: &Ia3Config,
    tensors: &BTreeMap<String, SavedTensor>,
    modules: Modules,
) -> Result<(Beside, Vec<String>)> {
    let selection = choose(config, modules)?;
    Ia3Config::check(&selection.modules, tensors.keys())?;
    Ok(beside(selection))
}

fn choose(config: &Ia3Config, modules: Modules) -> Result<Ia3Selection> {
    let selection = config.choose(modules)?;
    match modules.output {
        Some(output) if selection.modules.contains_key(output) => Err(Error::unsupported(format!(
            "target_modules chooses {output}; the engine adapts the layers' linear modules only"
        ))),
        _ => Ok(selection),
    }
}

fn beside(selection: Ia3Selection) -> (Beside, Vec<String>) {
    let scaled = |takes_input| {
        if takes_input {
            Scaled::Input
        } else {
            Scaled::Output
        }
    };
    let modules = selection.modules.into_iter();
    let beside = Beside {
        scaled: modules
            .map(|(module, takes_input)| (module, scaled(takes_input)))
            .collect(),
        ..Beside::new(TunedConfig::Ia3(selection.config))
    };
    (beside, selection.warnings)
}
