//! The ranges of the settings.

use std::fmt::Display;

use super::config::{Method, TargetModules, TrainConfig};
use crate::error::{Error, Result};

const MOST_THREADS: usize = 1024;
const MOST_EPOCHS: f64 = 1e6;

impl TrainConfig {
    /// # Errors
    /// `Argument` naming the first setting out of its range, its value and the range.
    pub fn validate(&self) -> Result<()> {
        self.validate_places()?;
        if self.method.is_lora() {
            self.validate_lora()?;
        }
        self.validate_method()?;
        let layers = self.trained_layers;
        if self.method != Method::Freeze && layers > 0 {
            return Err(Error::argument(format!(
                "trained_layers is {layers}, which method freeze alone takes; give method freeze, or leave it out"
            )));
        }
        if self.method == Method::Qlora {
            let blocksize = self.blocksize;
            within(
                "blocksize",
                blocksize,
                blocksize.is_power_of_two() && (32..=4096).contains(&blocksize),
                "a power of two from 32 to 4096",
            )?;
        }
        self.validate_length()?;
        self.validate_optimizer()?;
        self.validate_evaluation()
    }

    fn validate_places(&self) -> Result<()> {
        for (name, path) in [("model", &self.model), ("output", &self.output)] {
            within(name, "''", !path.as_os_str().is_empty(), "a folder's path")?;
        }
        if let Some(shots) = self.shots {
            at_least_one("shots", shots)?;
        }
        within("data", "[]", !self.data.is_empty(), "at least one file")
    }

    fn validate_lora(&self) -> Result<()> {
        at_least_one("r", self.r)?;
        positive("lora_alpha", self.lora_alpha)?;
        below_one("lora_dropout", self.lora_dropout)?;
        for (pattern, &r) in &self.rank_pattern {
            at_least_one(&format!("rank_pattern['{pattern}']"), r)?;
        }
        for (pattern, &alpha) in &self.alpha_pattern {
            positive(&format!("alpha_pattern['{pattern}']"), alpha)?;
        }
        Ok(())
    }

    /// The settings of what stands beside the base's weights.
    fn validate_method(&self) -> Result<()> {
        let named = match &self.target_modules {
            None => true,
            Some(TargetModules::Pattern(pattern)) => !pattern.is_empty(),
            Some(TargetModules::Names(names)) => {
                !names.is_empty() && names.iter().all(|name| !name.is_empty())
            }
        };
        within(
            "target_modules",
            "empty",
            named || !self.method.is_adapter(),
            "'all-linear', a list of module names or a regular expression",
        )?;
        if matches!(self.method, Method::Prompt | Method::Prefix) {
            at_least_one("num_virtual_tokens", self.num_virtual_tokens)?;
        }
        if self.method == Method::Adapter {
            at_least_one("reduction_factor", self.reduction_factor)?;
        }
        if self.method != Method::Ia3 && self.feedforward_modules.is_some() {
            return Err(Error::argument(
                "feedforward_modules is a setting of method ia3 alone; give method ia3, or leave it out",
            ));
        }
        Ok(())
    }

    fn validate_length(&self) -> Result<()> {
        let epochs = self.epochs;
        within(
            "epochs",
            epochs,
            epochs > 0.0 && epochs <= MOST_EPOCHS,
            "above 0 and at most 1e6",
        )?;
        if let Some(steps) = self.max_steps {
            at_least_one("max_steps", steps)?;
        }
        if let Some(seconds) = self.max_seconds {
            positive("max_seconds", seconds)?;
        }
        at_least_one("batch_size", self.batch_size)?;
        at_least_one("gradient_accumulation", self.gradient_accumulation)?;
        let length = self.sequence_length;
        within("sequence_length", length, length >= 2, "at least 2 tokens")?;
        self.threads.map_or(Ok(()), threads)
    }

    fn validate_optimizer(&self) -> Result<()> {
        positive("learning_rate", self.learning_rate)?;
        let ratio = self.min_learning_rate_ratio;
        within(
            "min_learning_rate_ratio",
            ratio,
            (0.0..=1.0).contains(&ratio),
            "from 0 to 1",
        )?;
        not_negative("weight_decay", self.weight_decay)?;
        below_one("beta1", self.beta1)?;
        below_one("beta2", self.beta2)?;
        positive("eps", self.eps)?;
        not_negative("max_grad_norm", self.max_grad_norm)
    }

    fn validate_evaluation(&self) -> Result<()> {
        if self.heldout_data.is_empty() {
            let heldout = self.heldout;
            within(
                "heldout",
                heldout,
                heldout > 0.0 && heldout < 1.0,
                "above 0 and below 1 (a part of the records)",
            )?;
        }
        let test = self.test;
        within(
            "test",
            test,
            (0.0..1.0).contains(&test),
            "at least 0 and below 1 (a part of the records)",
        )?;
        if test > 0.0 && !self.test_data.is_empty() {
            return Err(Error::argument(format!(
                "test is {test}, and test_data names files: give one of them"
            )));
        }
        let similarity = self.near_duplicates;
        within(
            "near_duplicates",
            similarity,
            (0.0..=1.0).contains(&similarity),
            "from 0 to 1",
        )?;
        at_least_one("eval_every", self.eval_every)?;
        at_least_one("eval_tokens", self.eval_tokens)?;
        at_least_one("checkpoint_every", self.checkpoint_every)?;
        self.patience
            .map_or(Ok(()), |patience| at_least_one("patience", patience))
    }
}

/// More than a machine's are only slower, and so many that they take minutes to start no use at all.
pub(super) fn threads(threads: usize) -> Result<()> {
    let fits = (1..=MOST_THREADS).contains(&threads);
    within(
        "threads",
        threads,
        fits,
        &format!("from 1 to {MOST_THREADS}"),
    )
}

fn within(name: &str, value: impl Display, fits: bool, range: &str) -> Result<()> {
    if fits {
        return Ok(());
    }
    Err(Error::argument(format!(
        "{name} must be {range}, not {value}"
    )))
}

fn at_least_one(name: &str, value: usize) -> Result<()> {
    within(name, value, value >= 1, "at least 1")
}

fn positive(name: &str, value: f64) -> Result<()> {
    let fits = value > 0.0 && value.is_finite();
    within(name, value, fits, "a finite number above 0")
}

fn not_negative(name: &str, value: f64) -> Result<()> {
    let fits = value >= 0.0 && value.is_finite();
    within(name, value, fits, "a finite number of at least 0")
}

fn below_one(name: &str, value: f64) -> Result<()> {
    let fits = (0.0..1.0).contains(&value);
    within(name, value, fits, "at least 0 and below 1")
}
