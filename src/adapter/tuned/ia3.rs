//! PEFT's configuration of (IA)³, and the modules it chooses.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{ALWAYS, Common, KEPT};
use crate::adapter::fields::{Parsed, Problem, field, unknown};
use crate::adapter::selector::Choice;
use crate::adapter::{AdapterConfig, Modules, Selector, select};
use crate::error::{Error, Result};

pub(super) const PEFT_TYPE: &str = "IA3";
/// The end of a vector's name.
pub(super) const VECTOR: &str = ".ia3_l";

const READ: [&str; 5] = [
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "fan_in_fan_out",
    "init_ia3_weights",
];

/// PEFT's `IA3Config`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ia3Config {
    pub common: Common,
    pub target_modules: Selector,
    pub exclude_modules: Option<Selector>,
    /// Those of the target modules whose input is multiplied. A name chooses every module whose
    /// name ends with it, as in PEFT, whether after a dot or not.
    pub feedforward_modules: Selector,
    /// Whether the base's weights are stored `[k, n]` (transformers' Conv1D).
    pub fan_in_fan_out: bool,
}

/// Which modules a configuration chooses in a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Ia3Selection {
    /// As PEFT saves and reads it.
    pub config: Ia3Config,
    /// By module, in its order; true where the input is multiplied.
    pub modules: BTreeMap<String, bool>,
    pub warnings: Vec<String>,
}

impl Ia3Config {
    pub(super) fn parse(map: &Map<String, Value>) -> Parsed<(Self, Vec<String>)> {
        let selector = |name| {
            field(
                map,
                name,
                "a string or a list of strings",
                Selector::from_json,
            )
        };
        let needed = |name: &str, found: Option<Selector>| {
            found.ok_or_else(|| {
                Problem::Unsupported(format!(
                    "{name}=null (PEFT's choice by architecture) is not supported in a saved \
                     adapter; name the modules"
                ))
            })
        };
        let config = Self {
            common: Common::parse(map)?,
            target_modules: needed("target_modules", selector("target_modules")?)?,
            exclude_modules: selector("exclude_modules")?,
            feedforward_modules: needed("feedforward_modules", selector("feedforward_modules")?)?,
            fan_in_fan_out: field(map, "fan_in_fan_out", "true or false", Value::as_bool)?
                .unwrap_or(false),
        };
        let known = [&READ[..], &KEPT, &ALWAYS].concat();
        Ok((config, unknown(map, &known)))
    }

    pub(super) fn fields(&self) -> BTreeMap<&'static str, Value> {
        let mut fields = self.common.fields(PEFT_TYPE);
        let excluded = self.exclude_modules.as_ref().map(Selector::to_json);
        fields.extend([
            ("target_modules", self.target_modules.to_json()),
            ("exclude_modules", excluded.unwrap_or(Value::Null)),
            ("feedforward_modules", self.feedforward_modules.to_json()),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("init_ia3_weights", json!(true)),
        ]);
        fields
    }

    /// The modules that the configuration chooses in a model.
    ///
    /// # Errors
    /// As [`select`]'s.
    pub fn choose(&self, modules: Modules) -> Result<Ia3Selection> {
        let mut targets = AdapterConfig::new(self.target_modules.clone());
        targets.exclude_modules.clone_from(&self.exclude_modules);
        let selection = select(&targets, modules)?;
        let mut chosen = BTreeMap::new();
        for target in &selection.targets {
            let takes_input = self.is_feedforward(&target.module)?;
            chosen.insert(target.module.clone(), takes_input);
        }
        let mut config = self.clone();
        config.target_modules = selection.resolve(&targets, modules).target_modules;
        config.keep_subset(&chosen);
        Ok(Ia3Selection {
            config,
            modules: chosen,
            warnings: selection.warnings,
        })
    }

    fn is_feedforward(&self, module: &str) -> Result<bool> {
        match &self.feedforward_modules {
            Selector::Names(names) => Ok(names.iter().any(|name| module.ends_with(name.as_str()))),
            pattern @ Selector::Pattern(_) => {
                Choice::new("feedforward_modules", pattern)?.matches(module)
            }
        }
    }

    /// PEFT reads two lists only if every feed-forward name is among the target names: where it is
    /// not, the same modules are named in full.
    fn keep_subset(&mut self, chosen: &BTreeMap<String, bool>) {
        let (Selector::Names(targets), Selector::Names(names)) =
            (&mut self.target_modules, &mut self.feedforward_modules)
        else {
            return;
        };
        if names.iter().all(|name| targets.contains(name)) {
            return;
        }
        let inputs = chosen.iter().filter(|(_, takes_input)| **takes_input);
        *names = inputs.map(|(module, _)| module.clone()).collect();
        let missing = names.iter().filter(|name| !targets.contains(name)).cloned();
        let missing: Vec<String> = missing.collect();
        targets.extend(missing);
    }

    /// Whether `tensors` are exactly the vectors of `chosen`.
    ///
    /// # Errors
    /// `Argument`, naming the first module that is missing on either side.
    pub fn check<'a>(
        chosen: &BTreeMap<String, bool>,
        tensors: impl Iterator<Item = &'a String>,
    ) -> Result<()> {
        let found: Vec<&str> = tensors
            .filter_map(|name| name.strip_suffix(VECTOR))
            .collect();
        if let Some(module) = found.iter().find(|module| !chosen.contains_key(**module)) {
            return Err(Error::argument(format!(
                "the adapter has a vector for {module}, which this model does not have or its \
                 target_modules do not choose"
            )));
        }
        match chosen
            .keys()
            .find(|module| !found.contains(&module.as_str()))
        {
            None => Ok(()),
            Some(module) => Err(Error::argument(format!(
                "the adapter has no vector for {module}, which its target_modules choose in this \
                 model"
            ))),
        }
    }
}
