//! The learning rate over a run.

use std::f64::consts::PI;

use super::config::{ScheduleKind, TrainConfig};

/// Linear warm-up from 0 over `warmup_steps`, then the kind's way down to `min_ratio`.
///
/// The values are those of transformers' `get_{cosine,linear,constant}_schedule_with_warmup`, and
/// with a minimum those of `get_cosine_with_min_lr_schedule_with_warmup`: step 1 of a run with
/// warm-up has a learning rate of 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub kind: ScheduleKind,
    pub warmup_steps: usize,
    pub total_steps: usize,
    /// The factor at the end, in [0, 1].
    pub min_ratio: f64,
}

impl Schedule {
    pub fn new(config: &TrainConfig, total_steps: usize) -> Self {
        Self {
            kind: config.schedule,
            warmup_steps: config.warmup_steps,
            total_steps,
            min_ratio: config.min_learning_rate_ratio,
        }
    }

    /// The factor on the peak learning rate for the step after `completed` steps.
    pub fn factor(&self, completed: usize) -> f64 {
        if completed < self.warmup_steps {
            return completed as f64 / self.warmup_steps as f64;
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((completed - self.warmup_steps) as f64 / span as f64).min(1.0);
        let remaining = match self.kind {
            ScheduleKind::Constant => return 1.0,
            ScheduleKind::Linear => 1.0 - progress,
            ScheduleKind::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        };
        self.min_ratio + (1.0 - self.min_ratio) * remaining
    }
}

#[cfg(test)]
#[allow(clippy::unreadable_literal)] // values as transformers prints them
mod tests {
    use super::*;

    fn factors(kind: ScheduleKind, min_ratio: f64) -> Vec<f64> {
        let schedule = Schedule {
            kind,
            warmup_steps: 4,
            total_steps: 20,
            min_ratio,
        };
        (0..=20).map(|step| schedule.factor(step)).collect()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        for (index, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() < 1e-12, "step {index}: {a} is not {b}");
        }
        assert_eq!(found.len(), expected.len());
    }

    const WARMUP: [f64; 4] = [0.0, 0.25, 0.5, 0.75];

    // Printed by transformers 5.23 for 4 warm-up steps of 20.
    #[test]
    fn cosine_has_transformers_values() {
        let expected = [
            1.0,
            0.9903926402016152,
            0.9619397662556434,
            0.9157348061512727,
            0.8535533905932737,
            0.7777851165098011,
            0.6913417161825449,
            0.5975451610080642,
            0.5,
            0.4024548389919359,
            0.30865828381745514,
            0.22221488349019902,
            0.14644660940672627,
            0.08426519384872733,
            0.03806023374435663,
            0.009607359798384785,
            0.0,
        ];
        let expected = [&WARMUP[..], &expected].concat();
        assert_close(&factors(ScheduleKind::Cosine, 0.0), &expected);
    }

    #[test]
    fn cosine_with_a_minimum_has_transformers_values() {
        let expected = [
            1.0,
            0.9913533761814537,
            0.9657457896300791,
            0.9241613255361454,
            0.8681980515339464,
            0.800006604858821,
            0.7222075445642904,
            0.6377906449072578,
            0.55,
            0.4622093550927423,
            0.3777924554357096,
            0.2999933951411791,
            0.23180194846605365,
            0.1758386744638546,
            0.13425421036992097,
            0.10864662381854631,
            0.1,
        ];
        let expected = [&WARMUP[..], &expected].concat();
        assert_close(&factors(ScheduleKind::Cosine, 0.1), &expected);
    }

    #[test]
    fn linear_and_constant_have_transformers_values() {
        let down: Vec<f64> = (0..=16).map(|step| 1.0 - f64::from(step) / 16.0).collect();
        let expected = [&WARMUP[..], &down].concat();
        assert_close(&factors(ScheduleKind::Linear, 0.0), &expected);
        let expected = [&WARMUP[..], &[1.0; 17]].concat();
        assert_close(&factors(ScheduleKind::Constant, 0.0), &expected);
    }

    #[test]
    fn stays_at_the_minimum_after_the_end_and_survives_a_warmup_longer_than_the_run() {
        let mut schedule = Schedule {
            kind: ScheduleKind::Cosine,
            warmup_steps: 0,
            total_steps: 10,
            min_ratio: 0.25,
        };
        assert!((schedule.factor(0) - 1.0).abs() < 1e-12);
        assert!((schedule.factor(15) - 0.25).abs() < 1e-12);
        schedule.warmup_steps = 50;
        assert!((schedule.factor(5) - 0.1).abs() < 1e-12);
    }
}
