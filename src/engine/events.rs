//! What a run tells the outside, and what the outside may answer.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::metrics::{ClassificationMetrics, ClassificationSummary, GenerationMetrics};
use crate::error::Result;

/// Something that happened, as JSON: an object whose `event` names it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Data(DataEvent),
    Model(ModelEvent),
    /// An optimiser step was taken. Also a line of metrics.jsonl.
    Step(StepEvent),
    /// The held-out part was read. Also a line of metrics.jsonl.
    Eval(EvalEvent),
    Checkpoint {
        step: usize,
        path: PathBuf,
    },
    /// Something the user may not have meant; the run goes on.
    Warning {
        message: String,
    },
    /// The last event of a run that did not fail.
    Stop {
        reason: StopReason,
        step: usize,
        best_step: usize,
    },
}

/// A record that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skip {
    pub file: String,
    pub record: usize,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DataEvent {
    pub records: usize,
    pub train_records: usize,
    pub heldout_records: usize,
    pub test_records: usize,
    pub train_tokens: usize,
    pub heldout_tokens: usize,
    pub truncated: usize,
    /// The first ones; `skipped_total` counts all.
    pub skipped: Vec<Skip>,
    pub skipped_total: usize,
    /// Every file that was read, folders expanded.
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelEvent {
    pub architecture: String,
    pub parameters: usize,
    pub trainable: usize,
    /// Bytes of the frozen 4-bit weights and their absmax; 0 where nothing is quantised.
    pub quantized_bytes: usize,
    /// What else the model has to say.
    #[serde(flatten)]
    pub details: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepEvent {
    pub step: usize,
    pub total_steps: usize,
    /// Mean over the step's trained tokens, nats.
    pub loss: f64,
    pub learning_rate: f64,
    /// L2 norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens read since step 1, trained and context.
    pub tokens: u64,
    /// Over the last steps, evaluations left out.
    pub tokens_per_second: f64,
    /// Since the start, resumed parts included.
    pub elapsed_seconds: f64,
    pub remaining_seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalEvent {
    pub step: usize,
    /// Mean over the tokens predicted, nats.
    pub loss: f64,
    pub perplexity: f64,
    /// Tokens (or labels) predicted.
    pub tokens: usize,
    /// Whether this is the lowest loss so far.
    pub best: bool,
    /// A language model's measures with their intervals.
    #[serde(flatten)]
    pub generation: Option<GenerationMetrics>,
    /// A classifier's other measures.
    #[serde(flatten)]
    pub classification: Option<ClassificationSummary>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    Finished,
    EarlyStopping,
    MaxSeconds,
    Interrupted,
}

/// How a run ended. Losses are mean nats per token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainResult {
    pub steps: usize,
    /// 0 where no evaluation was better than the one before step 1.
    pub best_step: usize,
    pub heldout_loss_before: f64,
    pub heldout_loss_best: f64,
    pub heldout_loss_last: f64,
    /// None where no step was taken.
    pub train_loss_last: Option<f64>,
    /// Tokens read by training, trained and context.
    pub tokens: u64,
    /// Whole run: steps, evaluations, files; resumed parts included.
    pub seconds: f64,
    /// Over the steps alone.
    pub tokens_per_second: f64,
    pub stop_reason: StopReason,
    /// A language model's measures on the held-out part with the best weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation_best: Option<GenerationMetrics>,
    /// A classifier's measures on the held-out part before step 1, and those of the best weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classification_before: Option<ClassificationMetrics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classification_best: Option<ClassificationMetrics>,
}

/// An answer to an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    Continue,
    /// Finish the step, write a checkpoint, stop. `Err(Error::Interrupted)` means the same.
    Stop,
}

/// Listens to a run.
pub trait Hooks {
    /// Any error but `Interrupted` ends the run with it at once.
    fn on_event(&mut self, event: &Event) -> Result<Control>;

    /// Asked between micro-batches, of training and of evaluation: a moment to look for signals.
    fn poll(&mut self) -> Result<Control> {
        Ok(Control::Continue)
    }
}
