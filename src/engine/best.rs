//! The best weights so far, in memory and as what the user takes away.

use std::path::PathBuf;
use std::time::Instant;

use super::Learner;
use crate::error::Result;

/// Saving takes at most about this part of a run's time; the end of a run saves in any case.
const SHARE: f64 = 0.05;

/// A copy of the best weights, and the folder where they are saved.
pub struct Best {
    folder: PathBuf,
    values: Vec<Vec<f32>>,
    /// Step of `values`; None before the first evaluation.
    step: Option<usize>,
    saved: bool,
    /// When the last saving ended, and the seconds it took.
    last: Option<(Instant, f64)>,
}

impl Best {
    pub fn new(learner: &dyn Learner, folder: PathBuf) -> Result<Self> {
        Ok(Self {
            folder,
            values: learner.weights()?,
            step: None,
            saved: false,
            last: None,
        })
    }

    /// The learner's current weights are the best.
    pub fn take(&mut self, learner: &dyn Learner, step: usize) -> Result<()> {
        learner.weights_into(&mut self.values)?;
        self.step = Some(step);
        self.saved = false;
        Ok(())
    }

    /// `values` from a checkpoint are the best.
    pub fn resume(&mut self, values: Vec<Vec<f32>>, step: usize) {
        self.values = values;
        self.step = Some(step);
        self.saved = false;
    }

    pub fn values(&self) -> &[Vec<f32>] {
        &self.values
    }

    /// Saves what is not saved yet, unless that was done a short while ago. The weights before
    /// step 1 wait for the end: they are the base model's.
    pub fn save_when_due(&mut self, learner: &mut dyn Learner, now: usize) -> Result<()> {
        let rested = self
            .last
            .is_none_or(|(end, seconds)| end.elapsed().as_secs_f64() * SHARE >= seconds);
        if rested && self.step.is_some_and(|step| step > 0) {
            self.save(learner, now)?;
        }
        Ok(())
    }

    /// Saves what is not saved yet. `now` is the step of the learner's weights, which stay as they are.
    pub fn save(&mut self, learner: &mut dyn Learner, now: usize) -> Result<()> {
        let Some(step) = self.step.filter(|_| !self.saved) else {
            return Ok(());
        };
        let start = Instant::now();
        let others = (step != now).then_some(self.values.as_mut_slice());
        learner.save(&self.folder, others)?;
        self.saved = true;
        self.last = Some((Instant::now(), start.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Gives the learner the best weights.
    pub fn restore(&self, learner: &mut dyn Learner) -> Result<()> {
        learner.set_weights(&self.values)
    }
}
