//! The training loop.

mod records;

use std::fmt::Display;
use std::time::Instant;

use super::best::Best;
use super::checkpoint;
use super::config::TrainConfig;
use super::events::{Event, Hooks, StopReason, TrainResult};
use super::optimizer::clip_factor;
use super::plan::{Plan, dropout_seed};
use super::progress::{Progress, tokens_read};
use super::run_folder::{Metrics, RunFolder};
use super::state::State;
use super::{Learner, Local, Model, Schedule};
use crate::data::BatchSource;
use crate::error::{Error, Result};

/// Trains `model` in the folder `config.output`, and leaves the best weights in its variables.
///
/// A run that a hook stops returns `Ok` with [`StopReason::Interrupted`]; `config.resume`
/// continues it to the numbers of an unbroken run, bit for bit with the same number of threads.
///
/// # Errors
/// `Argument` for a setting out of range, a folder in use or not empty, or a checkpoint that does
/// not fit; `Run` where loss or gradient is not finite, before anything is overwritten; `Io`.
pub fn train(
    config: &TrainConfig,
    model: &dyn Model,
    train: &dyn BatchSource,
    heldout: &dyn BatchSource,
    hooks: &mut dyn Hooks,
) -> Result<TrainResult> {
    config.validate()?;
    let folder = RunFolder::open(&config.output, config.resume)?;
    let mut learner = Local::new(config, model)?;
    train_in(&folder, config, &mut learner, train, heldout, hooks)
}

/// [`train`] in a folder that was taken before: early, while a mistake has cost nothing.
pub fn train_in(
    folder: &RunFolder,
    config: &TrainConfig,
    learner: &mut dyn Learner,
    train: &dyn BatchSource,
    heldout: &dyn BatchSource,
    hooks: &mut dyn Hooks,
) -> Result<TrainResult> {
    config.validate()?;
    let mut run = Run::start(folder, config, learner, train, heldout, hooks)?;
    match run.finish() {
        Ok(reason) => run.result(reason),
        Err(error) => {
            // The first error is the one to tell.
            let _ = run.best.save(run.learner, run.state.step);
            Err(error)
        }
    }
}

struct Run<'a> {
    folder: &'a RunFolder,
    config: &'a TrainConfig,
    learner: &'a mut dyn Learner,
    train: &'a dyn BatchSource,
    heldout: &'a dyn BatchSource,
    hooks: &'a mut dyn Hooks,
    plan: Plan,
    schedule: Schedule,
    metrics: Metrics,
    progress: Progress,
    best: Best,
    state: State,
    interrupted: bool,
}

impl<'a> Run<'a> {
    fn start(
        folder: &'a RunFolder,
        config: &'a TrainConfig,
        learner: &'a mut dyn Learner,
        train: &'a dyn BatchSource,
        heldout: &'a dyn BatchSource,
        hooks: &'a mut dyn Hooks,
    ) -> Result<Self> {
        let plan = Plan::new(config, train)?;
        let schedule = Schedule::new(config, plan.total_steps);
        let mut state = State::new(config, &schedule, learner.parameters(), train, heldout)?;
        let takeaway = if config.method.is_adapter() {
            "adapter"
        } else {
            "model"
        };
        let mut best = Best::new(learner, folder.path().join(takeaway))?;
        if folder.resumes() {
            let found = checkpoint::load_state(folder.path())?;
            found.admit(&state, config.schedule)?;
            let loaded = checkpoint::load(folder.path(), found, learner.parameters())?;
            state = State {
                total_steps: plan.total_steps,
                ..loaded.state
            };
            learner.set_weights(&loaded.weights)?;
            state.admit_probe(records::probe(&*learner, heldout)?)?;
            learner.set_moments(loaded.moments)?;
            if let Some(measured) = state.best {
                best.resume(loaded.best.unwrap_or(loaded.weights), measured.step);
            }
        }
        Ok(Self {
            metrics: Metrics::open(folder, state.metrics_bytes)?,
            progress: Progress::new(state.elapsed_seconds),
            folder,
            config,
            learner,
            train,
            heldout,
            hooks,
            plan,
            schedule,
            best,
            state,
            interrupted: false,
        })
    }

    fn finish(&mut self) -> Result<StopReason> {
        self.warn()?;
        let reason = self.steps()?;
        self.checkpoint()?;
        // Not part of the checkpoint: a longer run, resumed from it, would not have evaluated here.
        self.interrupted = false;
        if !self.is_evaluated() {
            self.evaluate()?;
        }
        self.best.save(self.learner, self.state.step)?;
        self.best.restore(self.learner)?;
        let step = self.state.step;
        let best_step = self.state.best.map_or(0, |best| best.step);
        self.emit(&Event::Stop {
            reason,
            step,
            best_step,
        })?;
        Ok(reason)
    }

    /// Steps and evaluates until there is a reason to stop.
    fn steps(&mut self) -> Result<StopReason> {
        loop {
            if self.is_evaluation_due() && !self.interrupted {
                self.evaluate()?;
            }
            let step = self.state.step;
            if self.interrupted {
                return Ok(StopReason::Interrupted);
            }
            if self.is_patience_over() {
                return Ok(StopReason::EarlyStopping);
            }
            if step >= self.state.total_steps {
                return Ok(StopReason::Finished);
            }
            let budget = self.config.max_seconds;
            if step > 0 && budget.is_some_and(|seconds| !self.progress.fits(seconds)) {
                return Ok(StopReason::MaxSeconds);
            }
            if step > 0 && step.is_multiple_of(self.config.checkpoint_every) {
                self.checkpoint()?;
            }
            self.best.save_when_due(self.learner, step)?;
            self.step()?;
        }
    }

    /// One optimiser step. On an error weights, moments and state are those of the step before.
    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let step = self.state.step + 1;
        let fail = |what: &dyn Display| Error::run(format!("step {step}: {what}"));
        let diverged = |what: &dyn Display| {
            fail(&format!(
                "{what}; the weights stay as step {} left them. A lower learning_rate, more warmup_steps or a smaller max_grad_norm may help",
                step - 1
            ))
        };
        let (mut sum, mut targets, mut read) = (0.0, 0, 0);
        self.learner.clear()?;
        for (micro, (epoch, index)) in self.plan.micro_batches(step).enumerate() {
            let batch = self.train.batch(epoch, index)?;
            if batch.target_count() == 0 {
                continue;
            }
            let seed = dropout_seed(self.config.seed, step, micro);
            let (value, count) = self.learner.add(&batch, seed)?;
            if !value.is_finite() {
                return Err(diverged(&format!("the loss is {value}")));
            }
            sum += value;
            targets += count;
            read += tokens_read(&batch);
            self.poll()?;
        }
        if targets == 0 {
            self.state.step = step;
            return Ok(());
        }
        self.learner
            .check_complete()
            .map_err(|error| fail(&error))?;
        let per_token = 1.0 / targets as f64;
        let norm = self.learner.norm().map_err(|error| diverged(&error))? * per_token;
        let scale = clip_factor(norm, self.config.max_grad_norm) * per_token;
        let learning_rate = self.config.learning_rate * self.schedule.factor(step - 1);
        self.learner.update(step, scale, learning_rate)?;
        let seconds = start.elapsed().as_secs_f64();
        self.progress.record_step(read, seconds);
        self.state.step = step;
        self.state.tokens += read;
        self.state.step_seconds += seconds;
        self.state.train_loss_last = Some(sum * per_token);
        self.report_step(sum * per_token, learning_rate, norm)
    }
}
