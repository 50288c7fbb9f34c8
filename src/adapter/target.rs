//! Which modules of a model an adapter configuration chooses.
//!
//! `all-linear` is PEFT's `_maybe_include_all_linear_layers`; what it warns about, `inject_adapter`'s.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write;

use super::config::AdapterConfig;
use super::rules::Rules;
use super::selector::{Choice, Selector, last_part, suffixes};
use crate::error::{Error, Result};

/// The names of a model's modules, in the model's order.
#[derive(Debug, Clone, Copy, Default)]
pub struct Modules<'a> {
    /// Linear layers, the output layer among them.
    pub linear: &'a [String],
    /// Other modules that are known by name (embeddings, norms): choosing one is an error. The modules that contain
    /// others need not be listed.
    pub other: &'a [String],
    /// The output layer, which `all-linear` leaves out.
    pub output: Option<&'a str>,
}

/// A chosen module.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    pub module: String,
    pub r: usize,
    pub lora_alpha: f64,
    pub scaling: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// In the model's order; never empty.
    pub targets: Vec<Target>,
    /// Parts of the configuration that have no effect on this model.
    pub warnings: Vec<String>,
}

/// The modules that the configuration chooses in a model.
///
/// # Errors
/// `Argument` if nothing is chosen (with the kinds of names there are), if a module that is not linear is, or if the
/// configuration itself cannot be used.
pub fn select(config: &AdapterConfig, modules: Modules) -> Result<Selection> {
    let mut rules = Rules::new(config)?;
    if config.target_modules.is_all_linear() {
        let linear = modules.linear.iter().map(String::as_str);
        rules.target = Choice::Names(
            linear
                .filter(|&name| Some(name) != modules.output)
                .collect(),
        );
    }
    let mut targets = Vec::new();
    for module in modules.linear {
        if rules.chooses(module)? {
            targets.push(Target {
                module: module.clone(),
                r: rules.r(module)?,
                lora_alpha: rules.lora_alpha(module)?,
                scaling: rules.scaling(module)?,
            });
        }
    }
    let others = not_linear(modules);
    for module in &others {
        if rules.chooses(module)? {
            return Err(Error::argument(format!(
                "target_modules chooses '{module}', which is not a linear layer; LoRA adapts linear layers only here"
            )));
        }
    }
    if targets.is_empty() {
        return Err(nothing_chosen(config, modules));
    }
    let warnings = without_effect(&rules, modules, &others, &targets)?;
    Ok(Selection { targets, warnings })
}

/// Listed modules that are not linear, and every module that contains another.
fn not_linear(modules: Modules<'_>) -> BTreeSet<&str> {
    let listed = modules.linear.iter().chain(modules.other);
    let mut names: BTreeSet<&str> = listed
        .flat_map(|name| name.match_indices('.').map(|(dot, _)| &name[..dot]))
        .chain(modules.other.iter().map(String::as_str))
        .collect();
    for name in modules.linear {
        names.remove(name.as_str());
    }
    names
}

fn nothing_chosen(config: &AdapterConfig, modules: Modules) -> Error {
    let mut kinds: Vec<&str> = Vec::new();
    for name in modules.linear {
        let kind = last_part(name);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let target = match &config.target_modules {
        Selector::Pattern(text) => format!("'{text}'"),
        Selector::Names(names) => format!("{names:?}"),
    };
    let mut message = format!("target_modules={target}");
    // Writing to a string cannot fail.
    if let Some(layers) = &config.layers_to_transform {
        let _ = write!(message, " with layers_to_transform={layers:?}");
    }
    if let Some(exclude) = &config.exclude_modules {
        let _ = write!(message, " without exclude_modules={:?}", exclude.texts());
    }
    let _ = match modules.linear.first() {
        None => write!(message, " chooses nothing: the model has no linear layers"),
        Some(example) => write!(
            message,
            " chooses none of the model's {} linear layers; their names end in {} (the first is {example})",
            modules.linear.len(),
            kinds.join(", ")
        ),
    };
    Error::Argument(message)
}

fn without_effect(
    rules: &Rules,
    modules: Modules,
    others: &BTreeSet<&str>,
    targets: &[Target],
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    if let (Selector::Names(names), false) = (&rules.config.target_modules, targets.is_empty()) {
        let ends = |name: &String| {
            let linear = modules.linear.iter();
            linear
                .into_iter()
                .any(|module| module == name || suffixes(module).any(|end| end == name))
        };
        let unused: Vec<&String> = names.iter().filter(|name| !ends(name)).collect();
        if !unused.is_empty() {
            warnings.push(format!("target_modules {unused:?} match no linear layer"));
        }
    }
    if let Some(exclude) = &rules.exclude {
        let mut used = false;
        for module in modules
            .linear
            .iter()
            .map(String::as_str)
            .chain(others.iter().copied())
        {
            used |= exclude.matches(module)?;
        }
        if !used {
            let texts = rules.config.exclude_modules.as_ref().map(Selector::texts);
            warnings.push(format!(
                "exclude_modules {:?} exclude no module",
                texts.unwrap_or_default()
            ));
        }
    }
    let ranks = rules
        .ranks
        .iter()
        .map(|(pattern, _)| ("rank_pattern", pattern));
    let alphas = rules
        .alphas
        .iter()
        .map(|(pattern, _)| ("alpha_pattern", pattern));
    for (field, pattern) in ranks.chain(alphas) {
        let mut used = false;
        for target in targets {
            used |= pattern.matches(&target.module)?;
        }
        if !used {
            warnings.push(format!(
                "{field} '{}' matches no chosen module",
                pattern.text()
            ));
        }
    }
    Ok(warnings)
}

impl Selection {
    /// The configuration as PEFT saves it: `all-linear` replaced by what it chose in this model, in the shortest list
    /// of names that chooses exactly that.
    pub fn resolve(&self, config: &AdapterConfig, modules: Modules) -> AdapterConfig {
        let mut resolved = config.clone();
        if config.target_modules.is_all_linear() {
            let chosen: HashSet<&str> = self
                .targets
                .iter()
                .map(|target| target.module.as_str())
                .collect();
            let kinds: BTreeSet<&str> = chosen.iter().map(|module| last_part(module)).collect();
            let others = not_linear(modules);
            let mut rest = modules
                .linear
                .iter()
                .map(String::as_str)
                .chain(others)
                .filter(|name| !chosen.contains(name));
            let names = if rest.any(|name| kinds.contains(last_part(name))) {
                self.targets
                    .iter()
                    .map(|target| target.module.clone())
                    .collect()
            } else {
                kinds.into_iter().map(str::to_owned).collect()
            };
            resolved.target_modules = Selector::Names(names);
        }
        resolved
    }
}
