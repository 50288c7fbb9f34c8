//! Bottleneck adapters (Houlsby et al., 2019; Pfeiffer et al., 2021).

use std::collections::BTreeMap;

use super::common;
use crate::adapter::{BottleneckConfig, SavedTensor, TunedConfig, Variant};
use crate::engine::TrainConfig;
use crate::engine::models::{Architecture, Beside};
use crate::error::{Error, Result};

pub(super) fn fresh(config: &TrainConfig, model: &Architecture) -> Result<Beside> {
    let (factor, k) = (config.reduction_factor, model.hidden_size);
    if factor > k {
        return Err(Error::argument(format!(
            "reduction_factor {factor} leaves nothing of the model's hidden size {k}: give at most \
             {k}"
        )));
    }
    Ok(Beside::new(TunedConfig::Bottleneck(BottleneckConfig {
        common: common(config, model),
        variant: config.adapter_variant,
        bottleneck_size: k / factor,
        hidden_size: k,
        num_layers: model.num_hidden_layers,
    })))
}

pub(super) fn saved(
    config: BottleneckConfig,
    tensors: &BTreeMap<String, SavedTensor>,
    model: &Architecture,
) -> Result<Beside> {
    let sizes = [
        ("hidden_size", config.hidden_size, model.hidden_size),
        ("num_layers", config.num_layers, model.num_hidden_layers),
    ];
    for (name, found, expected) in sizes {
        if found != expected {
            return Err(Error::argument(format!(
                "the adapter's {name} is {found}, but this model needs {expected}"
            )));
        }
    }
    let blocks = match config.variant {
        Variant::Houlsby => 2,
        Variant::Pfeiffer => 1,
    };
    let expected = 4 * blocks * config.num_layers;
    if tensors.len() != expected {
        return Err(Error::argument(format!(
            "the adapter has {} tensors, but {} adapters of {} layers have {expected}",
            tensors.len(),
            config.variant.name(),
            config.num_layers
        )));
    }
    Ok(Beside::new(TunedConfig::Bottleneck(config)))
}
