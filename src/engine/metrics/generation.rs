//! Loss, perplexity and bits per byte of a language model.

use serde::{Deserialize, Serialize};

use super::bootstrap::{Interval, ratio_interval};

/// A language model's quality on a text, with 95 % bootstrap intervals over the rows that were read:
/// a row is a record, or what was packed together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GenerationMetrics {
    /// Mean over the tokens, nats.
    pub loss_interval: Interval,
    pub perplexity_interval: Interval,
    /// Mean bits for each UTF-8 byte; none where a part was read, or the bytes are not known.
    pub bits_per_byte: Option<Interval>,
}

/// `rows` are each row's summed loss and number of tokens, `loss` the mean over all tokens; `bytes`
/// is what all tokens together spell, where that is known and all were read.
pub fn generation(
    rows: &[(f64, f64)],
    loss: f64,
    bytes: Option<usize>,
    seed: u64,
) -> GenerationMetrics {
    let rows: Vec<_> = rows.iter().copied().filter(|row| row.1 > 0.0).collect();
    let loss_interval = Interval {
        value: loss,
        ..ratio_interval(&rows, seed)
    };
    let tokens: f64 = rows.iter().map(|row| row.1).sum();
    let bits = |bytes: usize| {
        let factor = tokens / bytes.max(1) as f64 / std::f64::consts::LN_2;
        loss_interval.map(|loss| loss * factor)
    };
    GenerationMetrics {
        loss_interval,
        perplexity_interval: loss_interval.map(f64::exp),
        bits_per_byte: bytes.map(bits),
    }
}
