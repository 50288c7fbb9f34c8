//! The loss on text that is not trained on, and what a classifier says of it.

use super::metrics::{
    ClassificationMetrics, GenerationMetrics, Predictions, classification, generation,
};
use super::{Judged, Judging};
use crate::data::{Batch, BatchSource, IGNORE};
use crate::error::{Error, Result};

/// What an evaluation found.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Mean over the tokens (or the labels) predicted, nats.
    pub loss: f64,
    /// Tokens (or labels) predicted.
    pub tokens: usize,
    /// A language model's loss and number of tokens in each row.
    pub rows: Vec<(f64, f64)>,
    /// Whether all of the source was read.
    pub whole: bool,
    /// A classifier's; none of a language model.
    pub predictions: Option<Predictions>,
}

/// An evaluation's measures with their intervals: of a language model, or of a classifier.
#[derive(Debug, Clone, PartialEq)]
pub struct Measures {
    pub generation: Option<GenerationMetrics>,
    pub classification: Option<ClassificationMetrics>,
}

impl Evaluation {
    /// `labels` names a classifier's classes; `bytes` is what all tokens of a text spell, where that
    /// is known; `seed` is the bootstrap's.
    pub fn measures(&self, labels: &[String], bytes: Option<usize>, seed: u64) -> Measures {
        let classes = |predictions| classification(predictions, labels, seed);
        let text = || generation(&self.rows, self.loss, bytes.filter(|_| self.whole), seed);
        Measures {
            generation: self.predictions.is_none().then(text),
            classification: self.predictions.as_ref().map(classes),
        }
    }
}

/// Reads `source` from its start until exactly `max_tokens` tokens are predicted, or to its end:
/// the same tokens every time. `proceed` is asked between batches; None is returned where it says no.
///
/// # Errors
/// `Run` if nothing is predicted or the loss is not finite.
pub fn evaluate(
    model: &dyn Judging,
    source: &dyn BatchSource,
    max_tokens: usize,
    mut proceed: impl FnMut() -> Result<bool>,
) -> Result<Option<Evaluation>> {
    let mut sum = 0.0;
    let mut tokens = 0;
    let mut rows = Vec::new();
    let mut predictions: Option<Predictions> = None;
    let mut whole = true;
    for index in 0..source.batches_per_epoch() {
        if tokens == max_tokens {
            whole = false;
            break;
        }
        let batch = source.batch(0, index)?;
        let targets = batch.target_count();
        let batch = leading(batch, max_tokens - tokens);
        whole &= batch.target_count() == targets;
        if batch.rows == 0 {
            continue;
        }
        if !proceed()? {
            return Ok(None);
        }
        match model.judge(&batch)? {
            Judged::Language { loss, rows: found } => {
                sum += loss;
                tokens += found.iter().map(|(_, count)| count).sum::<usize>();
                rows.extend(found.into_iter().map(|(loss, count)| (loss, count as f64)));
            }
            Judged::Classes(logits) => {
                let predictions = predictions.get_or_insert_default();
                let before = predictions.len();
                predictions.extend(&logits, logits.len() / batch.rows, &labels(&batch));
                sum += predictions.loss[before..].iter().sum::<f64>();
                tokens += predictions.len() - before;
            }
        }
    }
    if tokens == 0 {
        return Err(Error::run(
            "the held-out part has no token to predict; hold out more records",
        ));
    }
    let loss = sum / tokens as f64;
    if !loss.is_finite() {
        return Err(Error::run(format!("the held-out loss is {loss}")));
    }
    Ok(Some(Evaluation {
        loss,
        tokens,
        rows,
        whole,
        predictions,
    }))
}

/// The labels of a classifier's batch: each stands at its row's last token, [`IGNORE`] where a row
/// has none.
pub(super) fn labels(batch: &Batch) -> Vec<i32> {
    let rows = batch.targets.chunks_exact(batch.columns.max(1));
    let label = |row: &[i32]| row.iter().rfind(|&&target| target != IGNORE).copied();
    rows.map(|row| label(row).unwrap_or(IGNORE)).collect()
}

/// The rows of `batch` up to its `max_tokens`th target; targets after that one are ignored.
pub(super) fn leading(mut batch: Batch, max_tokens: usize) -> Batch {
    let mut left = max_tokens;
    let mut end = 0;
    for (index, target) in batch.targets.iter_mut().enumerate() {
        if *target == IGNORE {
            continue;
        }
        if left == 0 {
            *target = IGNORE;
            continue;
        }
        left -= 1;
        end = index + 1;
    }
    batch.rows = end.div_ceil(batch.columns.max(1));
    let kept = batch.rows * batch.columns;
    batch.ids.truncate(kept);
    batch.targets.truncate(kept);
    batch.positions.truncate(kept);
    batch
}

/// The value of a loss.
pub(super) fn scalar(loss: &candle_core::Tensor) -> Result<f64> {
    Ok(loss.to_dtype(candle_core::DType::F64)?.to_scalar::<f64>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_keeps_exactly_the_first_targets() {
        let batch = Batch {
            rows: 3,
            columns: 3,
            ids: (0..9).collect(),
            targets: vec![1, IGNORE, 3, 4, 5, IGNORE, 7, 8, 9],
            positions: vec![0, 1, 2, 0, 1, 2, 0, 1, 2],
        };
        for limit in 0..=7 {
            let cut = leading(batch.clone(), limit);
            assert_eq!(cut.target_count(), limit);
            assert_eq!(cut.rows, [0, 1, 1, 2, 2, 3, 3, 3][limit]);
            assert_eq!(cut.ids, batch.ids[..cut.rows * 3]);
        }
        assert_eq!(
            leading(batch.clone(), 3).targets,
            [1, IGNORE, 3, 4, IGNORE, IGNORE]
        );
        assert_eq!(leading(batch.clone(), 100), batch);
    }
}
