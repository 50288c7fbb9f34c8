//! What a configuration says about one module's name: chosen or not, r, `lora_alpha`, scaling.
//!
//! The rules are PEFT's `check_target_module_exists` and `get_pattern_key`.

use super::config::AdapterConfig;
use super::pattern::{Layer, Pattern};
use super::selector::{Choice, Selector};
use crate::error::Result;

/// A configuration with its patterns compiled.
#[derive(Debug)]
pub struct Rules<'a> {
    pub(super) config: &'a AdapterConfig,
    pub(super) target: Choice<'a>,
    pub(super) exclude: Option<Choice<'a>>,
    /// Patterns that find a layer's number; empty where `layers_to_transform` is not set.
    layers: Vec<Pattern>,
    pub(super) ranks: Vec<(Pattern, usize)>,
    pub(super) alphas: Vec<(Pattern, f64)>,
}

impl<'a> Rules<'a> {
    /// # Errors
    /// `Argument` if the configuration is not valid or a pattern cannot be compiled.
    pub fn new(config: &'a AdapterConfig) -> Result<Self> {
        config.validate()?;
        let target = if config.target_modules.is_all_linear() {
            Choice::All
        } else {
            Choice::new("target_modules", &config.target_modules)?
        };
        // PEFT: an empty string or list excludes nothing.
        let exclude = config
            .exclude_modules
            .as_ref()
            .filter(|selector| match selector {
                Selector::Pattern(text) => !text.is_empty(),
                Selector::Names(names) => !names.is_empty(),
            })
            .map(|selector| Choice::new("exclude_modules", selector))
            .transpose()?;
        let layers = match &config.layers_to_transform {
            None => Vec::new(),
            Some(numbers) if numbers.is_empty() => Vec::new(),
            Some(_) if config.layers_pattern.is_empty() => vec![Pattern::any_layer()?],
            Some(_) => {
                let patterns = config.layers_pattern.iter();
                patterns
                    .map(|text| Pattern::layers(text))
                    .collect::<Result<_>>()?
            }
        };
        Ok(Self {
            config,
            target,
            exclude,
            layers,
            ranks: compile("rank_pattern", &config.rank_pattern)?,
            alphas: compile("alpha_pattern", &config.alpha_pattern)?,
        })
    }

    pub fn r(&self, module: &str) -> Result<usize> {
        Ok(first(&self.ranks, module)?.unwrap_or(self.config.r))
    }

    pub fn lora_alpha(&self, module: &str) -> Result<f64> {
        Ok(first(&self.alphas, module)?.unwrap_or(self.config.lora_alpha))
    }

    /// `lora_alpha`/r, or `lora_alpha`/√r with `use_rslora`.
    pub fn scaling(&self, module: &str) -> Result<f64> {
        let r = self.r(module)? as f64;
        let divisor = if self.config.use_rslora { r.sqrt() } else { r };
        Ok(self.lora_alpha(module)? / divisor)
    }

    /// Whether the configuration chooses a module of this name. With `all-linear` that is any linear layer.
    pub fn chooses(&self, module: &str) -> Result<bool> {
        Ok(!self.excludes(module)? && self.target.matches(module)? && self.in_layers(module)?)
    }

    fn excludes(&self, module: &str) -> Result<bool> {
        self.exclude
            .as_ref()
            .map_or(Ok(false), |exclude| exclude.matches(module))
    }

    fn in_layers(&self, module: &str) -> Result<bool> {
        let Some(numbers) = self
            .config
            .layers_to_transform
            .as_ref()
            .filter(|_| !self.layers.is_empty())
        else {
            return Ok(true);
        };
        if matches!(&self.target, Choice::Names(names) if names.contains(module)) {
            return Ok(true);
        }
        for pattern in &self.layers {
            match pattern.layer(module)? {
                Layer::NoMatch => {}
                Layer::NoNumber => return Ok(false),
                Layer::Number(number) => return Ok(numbers.contains(&number)),
            }
        }
        Ok(false)
    }
}

fn compile<T: Copy>(field: &'static str, pairs: &[(String, T)]) -> Result<Vec<(Pattern, T)>> {
    pairs
        .iter()
        .map(|(text, value)| Ok((Pattern::suffix(field, text)?, *value)))
        .collect()
}

/// The value of the first pattern that matches, else of the one that is literally the module's name.
fn first<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.matches(module)? {
            return Ok(Some(*value));
        }
    }
    let literal = patterns
        .iter()
        .find(|(pattern, _)| pattern.text() == module);
    Ok(literal.map(|(_, value)| *value))
}
