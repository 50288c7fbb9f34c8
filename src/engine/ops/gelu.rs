//! GELU (Hendrycks & Gimpel, 2016): `x·Φ(x)` with the exact Φ, and its approximation by tanh
//! (transformers' `gelu_new`), `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`.

use rayon::prelude::*;

use crate::simd::{sigmoid, vectorized};

/// Elements a thread takes at a time.
const CHUNK: usize = 1 << 13;
const CUBIC: f32 = 0.044_715;
/// 2·√(2/π): `(1 + tanh(u)) / 2` is the logistic function of 2u.
const TWICE: f32 = 1.595_769;

/// Which of the two functions a model was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    Exact,
    Tanh,
}

/// Writes `y` for `x`, element by element.
pub fn gelu(kind: Gelu, x: &[f32], y: &mut [f32]) {
    y.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .for_each(|(y, x)| match kind {
            Gelu::Exact => {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = x * normal(x);
                }
            }
            Gelu::Tanh => vectorized(|| {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = x * sigmoid(TWICE * (x + CUBIC * x * x * x));
                }
            }),
        });
}

/// Turns `x` into its gradient in place, for `dy`.
pub fn gelu_backward(kind: Gelu, x: &mut [f32], dy: &[f32]) {
    x.par_chunks_mut(CHUNK)
        .zip(dy.par_chunks(CHUNK))
        .for_each(|(x, dy)| match kind {
            Gelu::Exact => {
                for (x, &dy) in x.iter_mut().zip(dy) {
                    *x = dy * (normal(*x) + *x * density(*x));
                }
            }
            Gelu::Tanh => vectorized(|| {
                for (x, &dy) in x.iter_mut().zip(dy) {
                    let s = sigmoid(TWICE * (*x + CUBIC * *x * *x * *x));
                    let slope = TWICE * (1.0 + 3.0 * CUBIC * *x * *x);
                    *x = dy * (s + *x * s * (1.0 - s) * slope);
                }
            }),
        });
}

/// Φ, the standard normal distribution.
fn normal(x: f32) -> f32 {
    0.5 * libm::erfcf(-x * std::f32::consts::FRAC_1_SQRT_2)
}

/// φ, its density.
fn density(x: f32) -> f32 {
    const FACTOR: f32 = 0.398_942_3;
    FACTOR * (-0.5 * x * x).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(kind: Gelu, x: f64) -> f64 {
        match kind {
            Gelu::Exact => x * 0.5 * libm::erfc(-x / 2f64.sqrt()),
            Gelu::Tanh => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + u.tanh())
            }
        }
    }

    #[test]
    fn values_and_slopes_agree_with_float64() {
        for kind in [Gelu::Exact, Gelu::Tanh] {
            let x: Vec<f32> = (-800..=800).map(|i| i as f32 / 100.0).collect();
            let mut y = vec![f32::NAN; x.len()];
            gelu(kind, &x, &mut y);
            let mut slope = x.clone();
            gelu_backward(kind, &mut slope, &vec![1.0; x.len()]);
            for ((&x, &y), &slope) in x.iter().zip(&y).zip(&slope) {
                let at = f64::from(x);
                assert!(
                    (f64::from(y) - truth(kind, at)).abs() < 1e-6,
                    "{kind:?} {x}"
                );
                let step = 1e-5;
                let rise = truth(kind, at + step) - truth(kind, at - step);
                assert!(
                    (f64::from(slope) - rise / (2.0 * step)).abs() < 2e-6,
                    "{kind:?} {x}"
                );
            }
        }
    }
}
