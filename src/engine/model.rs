//! The seam between a model and whatever trains it.

use std::path::Path;

use candle_core::{Tensor, Var};

use crate::data::Batch;
use crate::error::Result;

/// One named tensor inside a flat [`Parameter`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub name: String,
    /// First element inside the flat parameter.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// Whether weight decay applies; norms and biases are left out.
    pub decay: bool,
}

impl Segment {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Trainable tensors that one operation uses together, laid end to end in one flat f32 variable.
#[derive(Debug, Clone)]
pub struct Parameter {
    pub name: String,
    /// 1-D, f32.
    pub var: Var,
    pub segments: Vec<Segment>,
}

/// How a forward pass is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Dropout masks are drawn from `seed`; each micro-batch has its own.
    Train {
        seed: u64,
    },
    Eval,
}

/// A model's judgement of a batch.
#[derive(Debug, Clone, PartialEq)]
pub enum Judged {
    /// Of a language model: the summed loss in nats, and each row's with its number of targets.
    Language { loss: f64, rows: Vec<(f64, usize)> },
    /// Of a classifier: logits `[rows, labels]`.
    Classes(Vec<f32>),
}

/// A causal language model, or a classifier of texts, that is asked about batches.
pub trait Judging: Send + Sync {
    /// What the model makes of a batch that it is not trained on.
    fn judge(&self, batch: &Batch) -> Result<Judged>;

    /// Names of a classifier's labels, in the order of its logits; none of a language model.
    fn labels(&self) -> &[String] {
        &[]
    }
}

/// A model that can be trained and saved.
pub trait Model: Judging {
    /// The trainable parameters, in a stable order with stable names.
    fn parameters(&self) -> &[Parameter];

    /// Sum of the negative log-likelihoods (nats) over the batch's targets, a scalar on the
    /// graph, and the number of targets.
    fn loss(&self, batch: &Batch, mode: Mode) -> Result<(Tensor, usize)>;

    /// Writes what a user takes away: an adapter in PEFT's format, or a Hugging Face folder when
    /// every weight was trained. Each file is written aside and renamed.
    fn save(&self, folder: &Path) -> Result<()>;
}
