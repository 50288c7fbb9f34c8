//! How fast a run is and how long it still takes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::data::{Batch, IGNORE};

/// Steps that the speed is averaged over.
const WINDOW: usize = 20;

/// The clock of a run, which goes on where an interrupted one stopped.
pub struct Progress {
    started: Instant,
    before: Duration,
    steps: VecDeque<(u64, f64)>,
    /// Seconds the last evaluation took.
    evaluation: f64,
}

impl Progress {
    pub fn new(elapsed_before: f64) -> Self {
        Self {
            started: Instant::now(),
            before: Duration::from_secs_f64(elapsed_before.max(0.0)),
            steps: VecDeque::with_capacity(WINDOW),
            evaluation: 0.0,
        }
    }

    /// Seconds since the start, resumed parts included.
    pub fn elapsed(&self) -> f64 {
        (self.before + self.started.elapsed()).as_secs_f64()
    }

    pub fn record_step(&mut self, tokens: u64, seconds: f64) {
        if self.steps.len() == WINDOW {
            self.steps.pop_front();
        }
        self.steps.push_back((tokens, seconds));
    }

    pub fn record_evaluation(&mut self, seconds: f64) {
        self.evaluation = seconds;
    }

    /// Over the last steps; 0 before the first.
    pub fn tokens_per_second(&self) -> f64 {
        let tokens: u64 = self.steps.iter().map(|step| step.0).sum();
        let seconds: f64 = self.steps.iter().map(|step| step.1).sum();
        if seconds > 0.0 {
            tokens as f64 / seconds
        } else {
            0.0
        }
    }

    fn step_seconds(&self) -> f64 {
        let seconds: f64 = self.steps.iter().map(|step| step.1).sum();
        seconds / self.steps.len().max(1) as f64
    }

    /// Whether one more step and the evaluation at the end still fit into `max_seconds`.
    pub fn fits(&self, max_seconds: f64) -> bool {
        self.elapsed() + self.step_seconds() + self.evaluation <= max_seconds
    }

    /// Seconds that the remaining steps and evaluations take, or that the budget leaves where that is less.
    pub fn remaining(&self, steps: usize, evaluations: usize, max_seconds: Option<f64>) -> f64 {
        let work = steps as f64 * self.step_seconds() + evaluations as f64 * self.evaluation;
        match max_seconds {
            Some(budget) => work.min((budget - self.elapsed()).max(0.0)),
            None => work,
        }
    }
}

/// Tokens of `batch` that are trained or stand before one that is, in the same row: padding is left out.
pub fn tokens_read(batch: &Batch) -> u64 {
    let read = batch.targets.chunks(batch.columns.max(1)).map(|row| {
        row.iter()
            .rposition(|&target| target != IGNORE)
            .map_or(0, |last| last as u64 + 1)
    });
    read.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_and_time_left_come_from_the_last_steps() {
        let mut progress = Progress::new(100.0);
        assert!(progress.elapsed() >= 100.0);
        progress.record_step(1_000_000, 1e6);
        for _ in 0..WINDOW {
            progress.record_step(512, 0.25);
        }
        progress.record_evaluation(2.0);
        assert!((progress.tokens_per_second() - 2048.0).abs() < 1e-9);
        assert!((progress.remaining(8, 3, None) - 8.0).abs() < 1e-9);
        assert!(progress.remaining(8, 3, Some(101.0)) < 1.0);
        assert!(progress.fits(104.0));
        assert!(!progress.fits(102.0));
    }

    #[test]
    fn padding_is_not_read() {
        let batch = Batch {
            rows: 3,
            columns: 4,
            ids: vec![0; 12],
            targets: [[IGNORE, 7, 8, IGNORE], [IGNORE; 4], [1, 2, 3, 4]].concat(),
            positions: vec![0; 12],
        };
        assert_eq!(tokens_read(&batch), 3 + 4);
    }
}
