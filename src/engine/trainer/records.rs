//! What a run measures on its way, keeps and reports.

use std::time::Instant;

use super::Run;
use crate::data::BatchSource;
use crate::engine::Judging;
use crate::engine::checkpoint::{self, Contents};
use crate::engine::evaluate::{Measures, evaluate};
use crate::engine::events::{Control, EvalEvent, Event, StepEvent, StopReason, TrainResult};
use crate::engine::state::{Measured, State};
use crate::error::{Error, Result};

/// Held-out tokens that recognise the model when a run is resumed.
const PROBE_TOKENS: usize = 64;

impl Run<'_> {
    pub(super) fn report_step(
        &mut self,
        loss: f64,
        learning_rate: f64,
        grad_norm: f64,
    ) -> Result<()> {
        let State {
            step, total_steps, ..
        } = self.state;
        let steps = total_steps - step;
        let evaluations = steps / self.config.eval_every + 1;
        let progress = &self.progress;
        self.record(&Event::Step(StepEvent {
            step,
            total_steps,
            loss,
            learning_rate,
            grad_norm,
            tokens: self.state.tokens,
            tokens_per_second: progress.tokens_per_second(),
            elapsed_seconds: progress.elapsed(),
            remaining_seconds: progress.remaining(steps, evaluations, self.config.max_seconds),
        }))
    }

    /// Measures the held-out loss, unless a hook interrupts it.
    pub(super) fn evaluate(&mut self) -> Result<()> {
        let start = Instant::now();
        let step = self.state.step;
        let (hooks, interrupted) = (&mut *self.hooks, &mut self.interrupted);
        let found = evaluate(
            &*self.learner,
            self.heldout,
            self.config.eval_tokens,
            || {
                heed(hooks.poll(), interrupted)?;
                Ok(!*interrupted)
            },
        )
        .map_err(|error| diverged(error, step))?;
        let Some(found) = found else {
            return Ok(());
        };
        let (loss, tokens) = (found.loss, found.tokens);
        self.progress
            .record_evaluation(start.elapsed().as_secs_f64());
        let measured = Measured { step, loss };
        self.state.heldout_last = Some(measured);
        if step == 0 {
            self.state.heldout_loss_before = Some(loss);
        }
        let (labels, bytes) = (self.learner.labels(), self.heldout.bytes());
        let Measures {
            generation,
            classification,
        } = found.measures(labels, bytes, self.config.seed);
        if step == 0 {
            self.state.classification_before.clone_from(&classification);
        }
        let is_best = self.state.best.is_none_or(|best| loss < best.loss);
        if is_best {
            self.best.take(self.learner, step)?;
            self.state.best = Some(measured);
            self.state.evaluations_since_best = 0;
        } else {
            self.state.evaluations_since_best += 1;
        }
        let summary = classification.as_ref().map(|found| found.summary);
        if is_best {
            self.state.generation_best = generation;
            self.state.classification_best = classification;
        }
        self.record(&Event::Eval(EvalEvent {
            step,
            loss,
            perplexity: loss.exp(),
            tokens,
            best: is_best,
            generation,
            classification: summary,
        }))
    }

    pub(super) fn checkpoint(&mut self) -> Result<()> {
        self.state.metrics_bytes = self.metrics.sync()?;
        self.state.elapsed_seconds = self.progress.elapsed();
        let step = self.state.step;
        let found = probe(&*self.learner, self.heldout);
        self.state.probe = found.map_err(|error| diverged(error, step))?;
        let is_best_older = self.state.best.is_some_and(|best| best.step != step);
        checkpoint::write(
            self.folder.path(),
            &Contents {
                state: &self.state,
                parameters: self.learner.parameters(),
                weights: &self.learner.weights()?,
                moments: &self.learner.moments()?,
                best: is_best_older.then(|| self.best.values()),
            },
        )?;
        let path = checkpoint::path(self.folder.path());
        self.emit(&Event::Checkpoint { step, path })
    }

    pub(super) fn warn(&mut self) -> Result<()> {
        let (warmup, total) = (self.config.warmup_steps, self.state.total_steps);
        if warmup < total {
            return Ok(());
        }
        self.emit(&Event::Warning {
            message: format!(
                "the run is {total} steps long and warmup_steps is {warmup}: the learning rate never reaches learning_rate"
            ),
        })
    }

    pub(super) fn is_evaluated(&self) -> bool {
        let last = self.state.heldout_last;
        last.is_some_and(|last| last.step == self.state.step)
    }

    pub(super) fn is_evaluation_due(&self) -> bool {
        self.state.step.is_multiple_of(self.config.eval_every) && !self.is_evaluated()
    }

    pub(super) fn is_patience_over(&self) -> bool {
        let patience = self.config.patience;
        patience.is_some_and(|patience| self.state.evaluations_since_best >= patience)
    }

    /// Writes a line of metrics.jsonl, then tells the hooks.
    fn record(&mut self, event: &Event) -> Result<()> {
        self.metrics.write(event)?;
        self.emit(event)
    }

    pub(super) fn emit(&mut self, event: &Event) -> Result<()> {
        heed(self.hooks.on_event(event), &mut self.interrupted)
    }

    pub(super) fn poll(&mut self) -> Result<()> {
        heed(self.hooks.poll(), &mut self.interrupted)
    }

    pub(super) fn result(&self, stop_reason: StopReason) -> Result<TrainResult> {
        let State {
            heldout_loss_before: Some(before),
            heldout_last: Some(last),
            best: Some(best),
            ..
        } = self.state
        else {
            // Two interruptions, the second one of the only evaluation.
            return Err(Error::Interrupted);
        };
        let (tokens, step_seconds) = (self.state.tokens, self.state.step_seconds);
        Ok(TrainResult {
            steps: self.state.step,
            best_step: best.step,
            heldout_loss_before: before,
            heldout_loss_best: best.loss,
            heldout_loss_last: last.loss,
            train_loss_last: self.state.train_loss_last,
            tokens,
            seconds: self.progress.elapsed(),
            tokens_per_second: tokens as f64 / step_seconds.max(f64::MIN_POSITIVE),
            stop_reason,
            generation_best: self.state.generation_best,
            classification_before: self.state.classification_before.clone(),
            classification_best: self.state.classification_best.clone(),
        })
    }
}

/// An evaluation's failure, with the step whose weights it found unusable.
fn diverged(error: Error, step: usize) -> Error {
    match error {
        Error::Run(message) if step > 0 => Error::run(format!(
            "step {step}: {message}; a lower learning_rate, more warmup_steps or a smaller max_grad_norm may help"
        )),
        other => other,
    }
}

/// Takes in a hook's answer.
fn heed(answer: Result<Control>, interrupted: &mut bool) -> Result<()> {
    match answer {
        Ok(Control::Continue) => Ok(()),
        Ok(Control::Stop) | Err(Error::Interrupted) => {
            *interrupted = true;
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Loss of the first held-out tokens under the current weights.
pub(super) fn probe(model: &dyn Judging, heldout: &dyn BatchSource) -> Result<f64> {
    let found = evaluate(model, heldout, PROBE_TOKENS, || Ok(true))?;
    Ok(found.map_or(0.0, |found| found.loss))
}
