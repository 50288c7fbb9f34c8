//! The seam between the training loop and what computes for it: a model with its gradients and its
//! optimiser.

use std::borrow::Cow;
use std::path::Path;

use super::evaluate::scalar;
use super::optimizer::{AdamW, Moments};
use super::{Gradients, Judged, Judging, Mode, Model, ModelEvent, Parameter, TrainConfig, weights};
use crate::data::Batch;
use crate::error::Result;

/// What is trained, and how: the loop decides when and on what.
///
/// Weights and moments are flat f32, in the order and of the lengths of [`Self::parameters`].
pub trait Learner: Judging {
    /// The trained parameters. Names, lengths and places inside them count; the values are the
    /// learner's own matter.
    fn parameters(&self) -> &[Parameter];

    /// Forgets the gradients of the step before.
    fn clear(&mut self) -> Result<()>;

    /// Sum of the negative log-likelihoods (nats) over the batch's targets, and their number; the
    /// sum's gradient is added where the sum is finite. Dropout masks are drawn from `seed`.
    fn add(&mut self, batch: &Batch, seed: u64) -> Result<(f64, usize)>;

    /// # Errors
    /// `Run` naming the first parameter that got no gradient in this step.
    fn check_complete(&self) -> Result<()>;

    /// L2 norm of the gradients' sums, in f64.
    ///
    /// # Errors
    /// `Run` naming the first parameter whose gradient is not finite.
    fn norm(&mut self) -> Result<f64>;

    /// Step number `step` (from 1) of `AdamW` with the gradient `scale` · sums.
    fn update(&mut self, step: usize, scale: f64, learning_rate: f64) -> Result<()>;

    /// A copy of the weights.
    fn weights(&self) -> Result<Vec<Vec<f32>>>;

    /// Overwrites `copy` with the weights.
    fn weights_into(&self, copy: &mut Vec<Vec<f32>>) -> Result<()> {
        *copy = self.weights()?;
        Ok(())
    }

    /// Overwrites the weights.
    fn set_weights(&mut self, weights: &[Vec<f32>]) -> Result<()>;

    /// The optimiser's running averages.
    fn moments(&self) -> Result<Cow<'_, [Moments]>>;

    /// Overwrites the optimiser's running averages.
    fn set_moments(&mut self, moments: Vec<Moments>) -> Result<()>;

    /// Writes what a user takes away (see [`Model::save`]): of the weights as they are, or of
    /// `others`. The learner keeps its own weights, and `others` its values.
    fn save(&mut self, folder: &Path, others: Option<&mut [Vec<f32>]>) -> Result<()>;

    /// Adds to a run's account of its model what only the learner knows.
    fn describe(&self, _event: &mut ModelEvent) -> Result<()> {
        Ok(())
    }
}

/// The engine's own: a [`Model`] on candle, on the CPU.
pub struct Local<'a> {
    model: &'a dyn Model,
    gradients: Gradients,
    optimizer: AdamW,
}

impl<'a> Local<'a> {
    /// # Errors
    /// `Run` where the model has no trainable parameter, or a malformed one.
    pub fn new(config: &TrainConfig, model: &'a dyn Model) -> Result<Self> {
        let parameters = model.parameters();
        Ok(Self {
            optimizer: AdamW::new(config.into(), parameters)?,
            gradients: Gradients::new(parameters),
            model,
        })
    }
}

impl Judging for Local<'_> {
    fn judge(&self, batch: &Batch) -> Result<Judged> {
        self.model.judge(batch)
    }

    fn labels(&self) -> &[String] {
        self.model.labels()
    }
}

impl Learner for Local<'_> {
    fn parameters(&self) -> &[Parameter] {
        self.model.parameters()
    }

    fn clear(&mut self) -> Result<()> {
        self.gradients.clear();
        Ok(())
    }

    fn add(&mut self, batch: &Batch, seed: u64) -> Result<(f64, usize)> {
        let (loss, count) = self.model.loss(batch, Mode::Train { seed })?;
        let value = scalar(&loss)?;
        if value.is_finite() {
            let parameters = self.model.parameters();
            self.gradients.add(parameters, &mut loss.backward()?)?;
        }
        Ok((value, count))
    }

    fn check_complete(&self) -> Result<()> {
        self.gradients.check_complete()
    }

    fn norm(&mut self) -> Result<f64> {
        self.gradients.norm()
    }

    fn update(&mut self, step: usize, scale: f64, learning_rate: f64) -> Result<()> {
        let (parameters, gradients) = (self.model.parameters(), self.gradients.sums());
        self.optimizer
            .step(parameters, gradients, scale, learning_rate, step)
    }

    fn weights(&self) -> Result<Vec<Vec<f32>>> {
        weights::snapshot(self.model.parameters())
    }

    fn weights_into(&self, copy: &mut Vec<Vec<f32>>) -> Result<()> {
        weights::snapshot_into(self.model.parameters(), copy)
    }

    fn set_weights(&mut self, weights: &[Vec<f32>]) -> Result<()> {
        weights::restore(self.model.parameters(), weights)
    }

    fn moments(&self) -> Result<Cow<'_, [Moments]>> {
        Ok(Cow::Borrowed(self.optimizer.moments()))
    }

    fn set_moments(&mut self, moments: Vec<Moments>) -> Result<()> {
        self.optimizer.set_moments(moments);
        Ok(())
    }

    fn save(&mut self, folder: &Path, others: Option<&mut [Vec<f32>]>) -> Result<()> {
        let Some(others) = others else {
            return self.model.save(folder);
        };
        let parameters = self.model.parameters();
        weights::swap(parameters, others)?;
        let saved = self.model.save(folder);
        weights::swap(parameters, others)?;
        saved
    }
}
