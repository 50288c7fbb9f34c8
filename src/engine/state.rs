//! What a checkpoint remembers beside weights and moments, and whether a run may go on from it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::{ScheduleKind, TrainConfig};
use super::metrics::{ClassificationMetrics, GenerationMetrics};
use super::{Parameter, Schedule};
use crate::data::BatchSource;
use crate::error::{Error, Result};

/// A held-out loss (mean nats per token) and the step after which it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub step: usize,
    pub loss: f64,
}

/// Where a run stands after `step` steps. The next micro-batch is number
/// `step · gradient_accumulation`; dropout's seeds follow from `seed`, step and micro-batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    pub version: u32,
    pub step: usize,
    pub total_steps: usize,
    pub tokens: u64,
    pub elapsed_seconds: f64,
    /// Seconds of the steps alone.
    pub step_seconds: f64,
    pub train_loss_last: Option<f64>,
    pub heldout_loss_before: Option<f64>,
    pub heldout_last: Option<Measured>,
    pub best: Option<Measured>,
    pub evaluations_since_best: usize,
    /// A language model's measures at the best step.
    pub generation_best: Option<GenerationMetrics>,
    /// A classifier's measures before step 1, and at the best step.
    pub classification_before: Option<ClassificationMetrics>,
    pub classification_best: Option<ClassificationMetrics>,
    pub metrics_bytes: u64,
    /// Loss of a few held-out tokens under the checkpoint's weights: what tells another base model.
    pub probe: f64,
    pub settings: Map<String, Value>,
    pub train_data: String,
    pub heldout_data: String,
    pub layout: Vec<Layout>,
}

/// The names and places inside a flat parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub name: String,
    pub elements: usize,
    pub segments: Vec<(String, usize, Vec<usize>)>,
}

const VERSION: u32 = 1;

impl State {
    pub fn new(
        config: &TrainConfig,
        schedule: &Schedule,
        parameters: &[Parameter],
        train: &dyn BatchSource,
        heldout: &dyn BatchSource,
    ) -> Result<Self> {
        Ok(Self {
            version: VERSION,
            step: 0,
            total_steps: schedule.total_steps,
            tokens: 0,
            elapsed_seconds: 0.0,
            step_seconds: 0.0,
            train_loss_last: None,
            heldout_loss_before: None,
            heldout_last: None,
            best: None,
            evaluations_since_best: 0,
            generation_best: None,
            classification_before: None,
            classification_best: None,
            metrics_bytes: 0,
            probe: 0.0,
            settings: config.fingerprint()?,
            train_data: train.fingerprint(),
            heldout_data: heldout.fingerprint(),
            layout: parameters.iter().map(layout).collect(),
        })
    }

    /// Whether the run that `fresh` begins may go on from this state.
    ///
    /// # Errors
    /// `Argument` naming every setting that differs, or the data, or the model.
    pub fn admit(&self, fresh: &Self, kind: ScheduleKind) -> Result<()> {
        let mut differences = Vec::new();
        for (name, now) in &fresh.settings {
            match self.settings.get(name) {
                Some(then) if then == now => {}
                Some(then) => differences.push(format!("{name} was {then} and is now {now}")),
                None => differences.push(format!("{name} was not known and is now {now}")),
            }
        }
        if kind != ScheduleKind::Constant && self.total_steps != fresh.total_steps {
            differences.push(format!(
                "the run was {} steps long and is now {} (epochs, max_steps), which changes the learning rate",
                self.total_steps, fresh.total_steps
            ));
        }
        if self.train_data != fresh.train_data {
            differences.push("the training data is not the same".to_owned());
        }
        if self.heldout_data != fresh.heldout_data {
            differences.push("the held-out data is not the same".to_owned());
        }
        if self.layout != fresh.layout {
            differences.push("the model's trainable parameters are not the same".to_owned());
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::argument(format!(
            "cannot resume: {}; resume with what the run was started with, or start a new run in another folder",
            differences.join("; ")
        )))
    }

    /// Compares the probe with what the model at hand gives under the checkpoint's weights.
    pub fn admit_probe(&self, now: f64) -> Result<()> {
        let then = self.probe;
        // Another number of threads may round differently; another model is far away.
        if (now - then).abs() <= 1e-3 * then.abs().max(1e-3) {
            return Ok(());
        }
        Err(Error::argument(format!(
            "cannot resume: the same text has a loss of {now:.6} where the checkpoint's model had {then:.6}; \
             the base model is not the one the run was started with"
        )))
    }

    /// Reads state.json.
    pub fn from_json(text: &str) -> std::result::Result<Self, String> {
        let state: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if state.version == VERSION {
            Ok(state)
        } else {
            Err(format!(
                "version {} of the checkpoint's format, this build reads {VERSION}",
                state.version
            ))
        }
    }
}

fn layout(parameter: &Parameter) -> Layout {
    Layout {
        name: parameter.name.clone(),
        elements: parameter.var.elem_count(),
        segments: parameter
            .segments
            .iter()
            .map(|segment| {
                let shape = segment.shape.clone();
                (segment.name.clone(), segment.offset, shape)
            })
            .collect(),
    }
}
