//! The language model's head and its loss, in chunks of tokens: logits are never held whole.

use rayon::prelude::*;

use crate::data::IGNORE;
use crate::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::scratch::Scratch;
use crate::simd::{exp, max, sum, vectorized};

/// Logits held at once, in elements.
const CHUNK: usize = 1 << 20;

/// Gradients of the summed loss that the caller wants.
pub struct Gradients<'a> {
    /// Of the hidden states, `[m, k]`, written.
    pub dx: &'a mut [f32],
    /// Of the head, `[vocabulary, k]`, added to.
    pub dweight: Option<&'a mut [f32]>,
}

/// Sum of `−ln softmax(x·Wᵀ)[target]` over the rows of `x` `[m, k]` whose target is not [`IGNORE`],
/// in nats, with `weight` `[vocabulary, k]`. The gradients are those of this sum.
///
/// Rows without a target cost nothing: they are left out before the product. `tell` is given each
/// target's row and loss.
pub fn linear_cross_entropy(
    x: &[f32],
    weight: &[f32],
    k: usize,
    targets: &[i32],
    mut gradients: Option<Gradients>,
    mut tell: impl FnMut(usize, f32),
) -> f64 {
    let vocabulary = weight.len() / k;
    let trained: Vec<usize> = (0..targets.len())
        .filter(|&row| targets[row] != IGNORE)
        .collect();
    if let Some(gradients) = &mut gradients
        && trained.len() < targets.len()
    {
        gradients.dx.fill(0.0);
    }
    let rows = (CHUNK / vocabulary.max(1)).clamp(16, 4096);
    let weight = Mat::new(weight, vocabulary, k);
    let mut total = 0.0;
    for part in trained.chunks(rows) {
        let m = part.len();
        let mut packed = Scratch::dirty(m * k);
        for (out, &row) in packed.chunks_exact_mut(k).zip(part) {
            out.copy_from_slice(&x[row * k..(row + 1) * k]);
        }
        let mut logits = Scratch::dirty(m * vocabulary);
        matmul(
            MatMut::new(&mut logits, m, vocabulary),
            Into::Overwrite,
            1.0,
            Mat::new(&packed, m, k),
            weight.t(),
            Threads::All,
        );
        let losses: Vec<f32> = logits
            .par_chunks_mut(vocabulary)
            .zip(part)
            .map(|(logits, &row)| vectorized(|| loss_and_gradient(logits, targets[row] as usize)))
            .collect();
        for (&row, &loss) in part.iter().zip(&losses) {
            tell(row, loss);
        }
        total += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        if let Some(gradients) = &mut gradients {
            let d_logits = Mat::new(&logits, m, vocabulary);
            if let Some(dweight) = gradients.dweight.as_deref_mut() {
                matmul(
                    MatMut::new(dweight, vocabulary, k),
                    Into::Accumulate,
                    1.0,
                    d_logits.t(),
                    Mat::new(&packed, m, k),
                    Threads::All,
                );
            }
            let into = MatMut::new(&mut packed, m, k);
            matmul(into, Into::Overwrite, 1.0, d_logits, weight, Threads::All);
            for (from, &row) in packed.chunks_exact(k).zip(part) {
                gradients.dx[row * k..(row + 1) * k].copy_from_slice(from);
            }
        }
    }
    total
}

/// Sum of `−ln softmax(logits)[label]` in nats over the rows of `logits` `[b, classes]` whose label is
/// not [`IGNORE`]; the logits become the gradient of this sum, zero in the other rows.
pub fn softmax_cross_entropy(logits: &mut [f32], classes: usize, labels: &[i32]) -> f64 {
    let rows = logits.chunks_exact_mut(classes).zip(labels);
    let mut total = 0.0;
    for (row, &label) in rows {
        if label == IGNORE {
            row.fill(0.0);
        } else {
            total += f64::from(loss_and_gradient(row, label as usize));
        }
    }
    total
}

/// The loss of one row, whose logits become their gradient `softmax − onehot`.
#[inline(always)]
fn loss_and_gradient(logits: &mut [f32], target: usize) -> f32 {
    let top = max(logits);
    let chosen = logits[target];
    for value in logits.iter_mut() {
        *value = exp(*value - top);
    }
    let total = sum(logits, |v| v);
    let reciprocal = 1.0 / total;
    for value in logits.iter_mut() {
        *value *= reciprocal;
    }
    logits[target] -= 1.0;
    top + total.ln() - chosen
}
