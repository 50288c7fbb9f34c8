//! Norms, row by row: RMSNorm (Zhang & Sennrich, 2019) `y = x / √(mean(x²) + eps) · weight`, and
//! LayerNorm (Ba, Kiros & Hinton, 2016) `y = (x − mean(x)) / √(var(x) + eps) · weight + bias`.

use rayon::prelude::*;

use crate::simd::{dot, sum, vectorized};

/// Rows a thread takes at a time.
const ROWS: usize = 64;

/// Writes `y` `[m, k]` for `x` `[m, k]` and `weight` `[k]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let k = weight.len();
    y.par_chunks_mut(k * ROWS)
        .zip(x.par_chunks(k * ROWS))
        .for_each(|(y, x)| {
            vectorized(|| {
                for (y, x) in y.chunks_exact_mut(k).zip(x.chunks_exact(k)) {
                    let scale = reciprocal_rms(x, eps);
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                        *y = x * scale * w;
                    }
                }
            });
        });
}

#[inline(always)]
fn reciprocal_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum(x, |v| v * v) / x.len() as f32 + eps).sqrt()
}

/// Turns `dy` `[m, k]` into the gradient of x in place, adding `residual` `[m, k]` (the gradient
/// that reaches x past the norm) where there is one, and adds the weight's gradient to `dweight`
/// `[k]` if given.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &mut [f32],
    residual: Option<&[f32]>,
    dweight: Option<&mut [f32]>,
) {
    let k = weight.len();
    let wanted = dweight.is_some();
    let parts: Vec<Vec<f32>> = dy
        .par_chunks_mut(k * ROWS)
        .zip(x.par_chunks(k * ROWS))
        .enumerate()
        .map(|(chunk, (dy, x))| {
            let mut part = vec![0.0f32; if wanted { k } else { 0 }];
            vectorized(|| {
                let rows = dy.chunks_exact_mut(k).zip(x.chunks_exact(k));
                for (row, (dy, x)) in rows.enumerate() {
                    let scale = reciprocal_rms(x, eps);
                    for ((part, &g), &x) in part.iter_mut().zip(dy.iter()).zip(x) {
                        *part += g * x * scale;
                    }
                    for (g, &w) in dy.iter_mut().zip(weight) {
                        *g *= w;
                    }
                    let along = dot(dy, x) * scale * scale * scale / k as f32;
                    for (g, &x) in dy.iter_mut().zip(x) {
                        *g = *g * scale - x * along;
                    }
                    add_row(dy, residual, chunk * ROWS + row);
                }
            });
            part
        })
        .collect();
    if let Some(dweight) = dweight {
        for part in parts {
            for (out, value) in dweight.iter_mut().zip(part) {
                *out += value;
            }
        }
    }
}

/// Adds row number `row` of `residual` where there is one.
#[inline(always)]
fn add_row(dy: &mut [f32], residual: Option<&[f32]>, row: usize) {
    if let Some(residual) = residual {
        let from = row * dy.len();
        let residual = &residual[from..from + dy.len()];
        for (g, &r) in dy.iter_mut().zip(residual) {
            *g += r;
        }
    }
}

/// Writes `y` `[m, k]` for `x` `[m, k]`, `weight` `[k]` and `bias` `[k]`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let k = weight.len();
    y.par_chunks_mut(k * ROWS)
        .zip(x.par_chunks(k * ROWS))
        .for_each(|(y, x)| {
            vectorized(|| {
                for (y, x) in y.chunks_exact_mut(k).zip(x.chunks_exact(k)) {
                    let (mean, scale) = moments(x, eps);
                    let affine = weight.iter().zip(bias);
                    for ((y, &x), (&w, &b)) in y.iter_mut().zip(x).zip(affine) {
                        *y = (x - mean) * scale * w + b;
                    }
                }
            });
        });
}

/// Mean and `1 / √(var + eps)` of a row; the variance is that of the centred values.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let k = x.len() as f32;
    let mean = sum(x, |v| v) / k;
    let variance = sum(x, |v| (v - mean) * (v - mean)) / k;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Turns `dy` `[m, k]` into the gradient of x in place, adding `residual` `[m, k]` where one is
/// given, and adds the gradients of weight and bias to `affine` (`[k]` each) if given.
///
/// With x̂ = (x − mean)·scale and g = dy·weight: dx = scale·(g − mean(g) − x̂·mean(g·x̂)).
pub fn layer_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &mut [f32],
    residual: Option<&[f32]>,
    affine: Option<(&mut [f32], &mut [f32])>,
) {
    let k = weight.len();
    let width = if affine.is_some() { k } else { 0 };
    let parts: Vec<(Vec<f32>, Vec<f32>)> = dy
        .par_chunks_mut(k * ROWS)
        .zip(x.par_chunks(k * ROWS))
        .enumerate()
        .map(|(chunk, (dy, x))| {
            let (mut dweight, mut dbias) = (vec![0.0f32; width], vec![0.0f32; width]);
            vectorized(|| {
                let rows = dy.chunks_exact_mut(k).zip(x.chunks_exact(k));
                for (row, (dy, x)) in rows.enumerate() {
                    let (mean, scale) = moments(x, eps);
                    let sums = dweight.iter_mut().zip(&mut dbias);
                    for ((&g, &x), (dw, db)) in dy.iter().zip(x).zip(sums) {
                        *dw += g * (x - mean) * scale;
                        *db += g;
                    }
                    for (g, &w) in dy.iter_mut().zip(weight) {
                        *g *= w;
                    }
                    let level = sum(dy, |g| g) / k as f32;
                    let along = (dot(dy, x) - level * k as f32 * mean) * scale / k as f32;
                    for (g, &x) in dy.iter_mut().zip(x) {
                        *g = scale * (*g - level - (x - mean) * scale * along);
                    }
                    add_row(dy, residual, chunk * ROWS + row);
                }
            });
            (dweight, dbias)
        })
        .collect();
    if let Some((dweight, dbias)) = affine {
        for (weights, biases) in parts {
            for (out, value) in dweight.iter_mut().zip(weights) {
                *out += value;
            }
            for (out, value) in dbias.iter_mut().zip(biases) {
                *out += value;
            }
        }
    }
}
