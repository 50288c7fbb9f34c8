//! Bottleneck adapters, which PEFT has no format for: ferrotune's own.
//!
//! A folder has adapter_config.json and adapter_model.safetensors. The configuration's fields are
//! `adapter_type` ("BOTTLENECK"), `format_version` (1), `variant` ("houlsby" or "pfeiffer"),
//! `bottleneck_size` (b), `hidden_size` (k), `activation` ("swish" of Houlsby's, "relu" of
//! Pfeiffer's), `num_layers`, `task_type`, `base_model_name_or_path`, `revision`, `auto_mapping` and
//! `modules_to_save`. The tensors are, for each layer and each block B that has an adapter (the
//! family's names of attention and MLP, such as `model.layers.0.self_attn`), `B.adapter.down.weight`
//! `[b, k]`, `B.adapter.down.bias` `[b]`, `B.adapter.up.weight` `[k, b]`, `B.adapter.up.bias` `[k]`;
//! and those of `modules_to_save` by their names in the base model. No name has a prefix.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Common, KEPT};
use crate::adapter::fields::{Parsed, Problem, field, rank, unknown};

pub(super) const ADAPTER_TYPE: &str = "BOTTLENECK";
const VERSION: u64 = 1;
/// What stands between a block's name and a tensor's.
pub const INFIX: &str = ".adapter.";

/// Where the adapters stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Behind attention and behind the MLP, before the residual sum (Houlsby et al., 2019).
    Houlsby,
    /// Behind the MLP's residual sum (Pfeiffer et al., 2021, as AdapterHub defines it).
    Pfeiffer,
}

impl Variant {
    pub fn name(self) -> &'static str {
        match self {
            Self::Houlsby => "houlsby",
            Self::Pfeiffer => "pfeiffer",
        }
    }

    fn activation(self) -> &'static str {
        match self {
            Self::Houlsby => "swish",
            Self::Pfeiffer => "relu",
        }
    }
}

/// The configuration of a folder of bottleneck adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct BottleneckConfig {
    pub common: Common,
    pub variant: Variant,
    /// b
    pub bottleneck_size: usize,
    /// k
    pub hidden_size: usize,
    pub num_layers: usize,
}

impl BottleneckConfig {
    pub(super) fn parse(map: &Map<String, Value>) -> Parsed<(Self, Vec<String>)> {
        let version = map.get("format_version").and_then(Value::as_u64);
        if version != Some(VERSION) {
            return Err(Problem::Unsupported(format!(
                "format_version {} of bottleneck adapters is not supported; {VERSION} is",
                map.get("format_version").unwrap_or(&Value::Null)
            )));
        }
        let size = |name: &str| -> Parsed<usize> {
            field(map, name, "a whole number of at least 1", rank)?
                .ok_or_else(|| Problem::Malformed(format!("missing field '{name}'")))
        };
        let text = |name: &str| map.get(name).and_then(Value::as_str);
        let variants = [Variant::Houlsby, Variant::Pfeiffer];
        let found = variants
            .into_iter()
            .find(|one| text("variant") == Some(one.name()));
        let variant = found.ok_or_else(|| {
            Problem::Malformed("field 'variant' must be \"houlsby\" or \"pfeiffer\"".to_owned())
        })?;
        if text("activation") != Some(variant.activation()) {
            return Err(Problem::Unsupported(format!(
                "activation={} is not supported; {} adapters have \"{}\"",
                map.get("activation").unwrap_or(&Value::Null),
                variant.name(),
                variant.activation()
            )));
        }
        let config = Self {
            common: Common::parse(map)?,
            variant,
            bottleneck_size: size("bottleneck_size")?,
            hidden_size: size("hidden_size")?,
            num_layers: size("num_layers")?,
        };
        let own = [
            "adapter_type",
            "format_version",
            "variant",
            "bottleneck_size",
            "hidden_size",
            "activation",
            "num_layers",
            "modules_to_save",
        ];
        Ok((config, unknown(map, &[&own[..], &KEPT].concat())))
    }

    pub(super) fn fields(&self) -> BTreeMap<&'static str, Value> {
        let mut fields = self.common.fields("");
        fields.retain(|name, _| KEPT.contains(name) || *name == "modules_to_save");
        fields.extend([
            ("adapter_type", json!(ADAPTER_TYPE)),
            ("format_version", json!(VERSION)),
            ("variant", json!(self.variant.name())),
            ("bottleneck_size", json!(self.bottleneck_size)),
            ("hidden_size", json!(self.hidden_size)),
            ("activation", json!(self.variant.activation())),
            ("num_layers", json!(self.num_layers)),
        ]);
        fields
    }
}
