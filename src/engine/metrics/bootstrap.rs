//! Percentile intervals by the bootstrap (Efron, 1979): the examples are drawn again with
//! replacement, and the middle 95 % of what a measure becomes is its interval.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Times the examples are drawn again.
pub const RESAMPLES: usize = 1000;
/// Part of the resamples that lies below an interval, and above it.
const TAIL: f64 = 0.025;

/// A measured value with its 95 % bootstrap interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Interval {
    /// The same under a rising function, such as a loss's perplexity.
    pub fn map(self, rising: impl Fn(f64) -> f64) -> Self {
        Self {
            value: rising(self.value),
            low: rising(self.low),
            high: rising(self.high),
        }
    }
}

/// Intervals of several measures of `count` examples. `measure` is given the examples' indices, first
/// each once and then drawn with replacement, and gives as many values each time.
///
/// The draws depend on `seed` alone, not on the number of threads.
pub fn intervals(
    count: usize,
    seed: u64,
    measure: impl Fn(&[u32]) -> Vec<f64> + Sync,
) -> Vec<Interval> {
    let every: Vec<u32> = (0..count as u32).collect();
    let values = measure(&every);
    let resampled: Vec<Vec<f64>> = (0..RESAMPLES as u64)
        .into_par_iter()
        .map(|stream| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream);
            let drawn: Vec<u32> = every.iter().map(|_| draw(&mut random, count)).collect();
            measure(&drawn)
        })
        .collect();
    let intervals = values.into_iter().enumerate().map(|(at, value)| {
        let mut sorted: Vec<f64> = resampled.iter().map(|values| values[at]).collect();
        sorted.sort_by(f64::total_cmp);
        Interval {
            value,
            low: quantile(&sorted, TAIL),
            high: quantile(&sorted, 1.0 - TAIL),
        }
    });
    intervals.collect()
}

/// The interval of Σ numerator / Σ denominator over examples, such as a loss a token.
pub fn ratio_interval(parts: &[(f64, f64)], seed: u64) -> Interval {
    let ratio = |indices: &[u32]| {
        let drawn = indices.iter().map(|&at| parts[at as usize]);
        let (above, below) = drawn.fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
        vec![above / below]
    };
    intervals(parts.len(), seed, ratio)[0]
}

/// A whole number below `count`, equally likely to within 2⁻³².
fn draw(random: &mut ChaCha8Rng, count: usize) -> u32 {
    ((u64::from(random.next_u32()) * count as u64) >> 32) as u32
}

/// numpy's default: linear between the two nearest values.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let below = place.floor();
    let (low, high) = (sorted[below as usize], sorted[place.ceil() as usize]);
    low + (high - low) * (place - below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_mean_is_the_textbooks() {
        // 1.96 standard errors on either side: 0.5 ± 1.96 · 0.5 / √2500.
        let parts: Vec<(f64, f64)> = (0..2500).map(|i| (f64::from(i % 2), 1.0)).collect();
        let found = ratio_interval(&parts, 7);
        assert!((found.value - 0.5).abs() < 1e-12);
        assert!((found.low - 0.4804).abs() < 2.5e-3, "{found:?}");
        assert!((found.high - 0.5196).abs() < 2.5e-3, "{found:?}");
        assert_eq!(ratio_interval(&parts, 7), found);
        assert_ne!(ratio_interval(&parts, 8), found);
    }

    #[test]
    fn quantiles_are_numpys() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert!((quantile(&sorted, 0.025) - 1.075).abs() < 1e-12);
        assert!((quantile(&sorted, 0.5) - 3.0).abs() < 1e-12);
        assert!((quantile(&sorted, 1.0) - 8.0).abs() < 1e-12);
    }
}
