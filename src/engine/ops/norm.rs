//! RMSNorm (Zhang & Sennrich, 2019): `y = x / √(mean(x²) + eps) · weight`, row by row.

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
/// that reaches x past the norm), and adds the weight's gradient to `dweight` `[k]` if given.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &mut [f32],
    residual: &[f32],
    dweight: Option<&mut [f32]>,
) {
    let k = weight.len();
    let wanted = dweight.is_some();
    let parts: Vec<Vec<f32>> = dy
        .par_chunks_mut(k * ROWS)
        .zip(x.par_chunks(k * ROWS))
        .zip(residual.par_chunks(k * ROWS))
        .map(|((dy, x), residual)| {
            let mut part = vec![0.0f32; if wanted { k } else { 0 }];
            vectorized(|| {
                let rows = dy.chunks_exact_mut(k).zip(x.chunks_exact(k));
                for ((dy, x), residual) in rows.zip(residual.chunks_exact(k)) {
                    let scale = reciprocal_rms(x, eps);
                    for ((part, &g), &x) in part.iter_mut().zip(dy.iter()).zip(x) {
                        *part += g * x * scale;
                    }
                    for (g, &w) in dy.iter_mut().zip(weight) {
                        *g *= w;
                    }
                    let along = dot(dy, x) * scale * scale * scale / k as f32;
                    for ((g, &x), &r) in dy.iter_mut().zip(x).zip(residual) {
                        *g = *g * scale - x * along + r;
                    }
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
