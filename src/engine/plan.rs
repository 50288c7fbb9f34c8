//! Which micro-batches make which step.

use super::TrainConfig;
use crate::data::BatchSource;
use crate::error::{Error, Result};

/// Micro-batches in a row, epoch after epoch, `gradient_accumulation` to a step; the last step of
/// a run that `epochs` limits may have fewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub total_steps: usize,
    micro_batches: usize,
    accumulation: usize,
    per_epoch: usize,
}

impl Plan {
    pub fn new(config: &TrainConfig, train: &dyn BatchSource) -> Result<Self> {
        let per_epoch = train.batches_per_epoch();
        if per_epoch == 0 {
            return Err(Error::argument("data holds nothing to train on"));
        }
        let accumulation = config.gradient_accumulation;
        let micro_batches = match config.max_steps {
            Some(steps) => steps.saturating_mul(accumulation),
            // A product such as 0.1 · 30 may lie a rounding above its whole number.
            None => (config.epochs * per_epoch as f64 - 1e-9).ceil().max(1.0) as usize,
        };
        Ok(Self {
            total_steps: micro_batches.div_ceil(accumulation),
            micro_batches,
            accumulation,
            per_epoch,
        })
    }

    /// The micro-batches of `step` (from 1), each as (epoch, index).
    pub fn micro_batches(&self, step: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let per_epoch = self.per_epoch;
        let start = (step - 1).saturating_mul(self.accumulation);
        let end = start
            .saturating_add(self.accumulation)
            .min(self.micro_batches);
        (start..end).map(move |position| (position / per_epoch, position % per_epoch))
    }
}

/// The seed of dropout in one micro-batch: `SplitMix64`'s finaliser over seed, step and micro-batch in turn.
pub fn dropout_seed(seed: u64, step: usize, micro: usize) -> u64 {
    [seed, step as u64, micro as u64]
        .into_iter()
        .fold(0, |state, part| {
            let mut z = (state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn steps(plan: Plan) -> Vec<Vec<(usize, usize)>> {
        let all = 1..=plan.total_steps;
        all.map(|step| plan.micro_batches(step).collect()).collect()
    }

    #[test]
    fn steps_follow_each_other_across_epochs() {
        let plan = Plan {
            total_steps: 3,
            micro_batches: 5,
            accumulation: 2,
            per_epoch: 3,
        };
        let expected = [vec![(0, 0), (0, 1)], vec![(0, 2), (1, 0)], vec![(1, 1)]];
        assert_eq!(steps(plan), expected);
    }

    #[test]
    fn dropout_seeds_do_not_repeat() {
        let mut seen = HashSet::new();
        for seed in 0..4 {
            for step in 1..50 {
                seen.extend((0..8).map(|micro| dropout_seed(seed, step, micro)));
            }
        }
        assert_eq!(seen.len(), 4 * 49 * 8);
    }
}
