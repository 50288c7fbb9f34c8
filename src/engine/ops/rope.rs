//! Rotary position embedding (Su et al., 2021) in Llama's half-split layout, with its scalings,
//! and the move between token-major rows and head-major blocks that attention works on.

use rayon::prelude::*;

use crate::simd::vectorized;

/// How the rotation frequencies were stretched for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    Default,
    /// Position interpolation: every frequency divided by `factor`.
    Linear {
        factor: f32,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a blend between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position_embeddings: f32,
    },
}

/// Cosines and sines `[positions, d / 2]` of every angle a position can have.
#[derive(Debug, Clone)]
pub struct Rotations {
    d: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotations {
    /// For head size `d`, base `theta` and positions `0..positions`.
    pub fn new(d: usize, theta: f64, scaling: Scaling, positions: usize) -> Self {
        // f32 as transformers computes them, so that long positions get the same angles.
        let frequencies: Vec<f32> = (0..d / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / d as f32;
                scaling.apply(1.0 / (theta as f32).powf(exponent))
            })
            .collect();
        let angles = || {
            (0..positions)
                .flat_map(|position| frequencies.iter().map(move |&f| position as f32 * f))
        };
        Self {
            d,
            cos: angles().map(f32::cos).collect(),
            sin: angles().map(f32::sin).collect(),
        }
    }

    /// Positions the table holds.
    pub fn positions(&self) -> usize {
        self.cos.len() / (self.d / 2).max(1)
    }

    /// Rotates `head` `[d]` in place by the angle of `position`, backwards if `inverse`.
    #[inline(always)]
    pub fn rotate(&self, head: &mut [f32], position: usize, inverse: bool) {
        let half = self.d / 2;
        let row = position * half..(position + 1) * half;
        let (cos, sin) = (&self.cos[row.clone()], &self.sin[row]);
        let sign = if inverse { -1.0 } else { 1.0 };
        let (first, second) = head.split_at_mut(half);
        for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let (x, y) = (*a, *b);
            *a = x * c - y * s * sign;
            *b = y * c + x * s * sign;
        }
    }
}

impl Scaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                if wavelength < original / high_freq_factor {
                    frequency
                } else if wavelength > original / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Sizes of an attention layer: batch rows, tokens a row, query heads, key/value heads, head size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    pub b: usize,
    pub t: usize,
    pub h: usize,
    pub hkv: usize,
    pub d: usize,
}

impl Heads {
    /// Width of a token's `[q | k | v]` row.
    pub fn width(&self) -> usize {
        (self.h + 2 * self.hkv) * self.d
    }

    /// Query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.h / self.hkv
    }

    /// Which head of the `[q | k | v]` row stands in `slot` of key/value group `kv`: the group's
    /// query heads, then its key, then its value.
    fn column(&self, kv: usize, slot: usize) -> usize {
        let group = self.group();
        match slot.checked_sub(group) {
            None => kv * group + slot,
            Some(0) => self.h + kv,
            Some(_) => self.h + self.hkv + kv,
        }
    }
}

/// `qkv` `[b·t, width]` with its queries and keys rotated where `rotations` are given, head-major and by key/value group:
/// `out` `[b, hkv, group + 2, t, d]`.
pub fn rope_to_heads(
    qkv: &[f32],
    heads: Heads,
    rotations: Option<&Rotations>,
    positions: &[u32],
    out: &mut [f32],
) {
    let Heads { t, d, hkv, .. } = heads;
    let (width, slots) = (heads.width(), heads.group() + 2);
    out.par_chunks_mut(t * d)
        .enumerate()
        .for_each(|(block, out)| {
            let (row, kv, slot) = (block / (hkv * slots), block / slots % hkv, block % slots);
            let column = heads.column(kv, slot) * d;
            vectorized(|| {
                for (at, out) in out.chunks_exact_mut(d).enumerate() {
                    let token = row * t + at;
                    let from = token * width + column;
                    out.copy_from_slice(&qkv[from..from + d]);
                    if let Some(rotations) = rotations.filter(|_| slot < slots - 1) {
                        rotations.rotate(out, positions[token] as usize, false);
                    }
                }
            });
        });
}

/// The backward of [`rope_to_heads`]: `d_heads` `[b, hkv, group + 2, t, d]` to `dqkv` `[b·t, width]`.
pub fn rope_to_heads_backward(
    d_heads: &[f32],
    heads: Heads,
    rotations: Option<&Rotations>,
    positions: &[u32],
    dqkv: &mut [f32],
) {
    let Heads { t, d, hkv, .. } = heads;
    let slots = heads.group() + 2;
    dqkv.par_chunks_mut(heads.width())
        .enumerate()
        .for_each(|(token, out)| {
            let (row, at) = (token / t, token % t);
            vectorized(|| {
                for kv in 0..hkv {
                    for slot in 0..slots {
                        let from = (((row * hkv + kv) * slots + slot) * t + at) * d;
                        let column = heads.column(kv, slot) * d;
                        let out = &mut out[column..column + d];
                        out.copy_from_slice(&d_heads[from..from + d]);
                        if let Some(rotations) = rotations.filter(|_| slot < slots - 1) {
                            rotations.rotate(out, positions[token] as usize, true);
                        }
                    }
                }
            });
        });
}

/// Head-major `[b, h, t, d]` to token-major `[b·t, h·d]`, or back.
pub fn merge_heads(from: &[f32], heads: Heads, out: &mut [f32]) {
    let Heads { t, d, h, .. } = heads;
    out.par_chunks_mut(h * d)
        .enumerate()
        .for_each(|(token, out)| {
            let (row, at) = (token / t, token % t);
            for (head, out) in out.chunks_exact_mut(d).enumerate() {
                let start = ((row * h + head) * t + at) * d;
                out.copy_from_slice(&from[start..start + d]);
            }
        });
}

/// The inverse of [`merge_heads`].
pub fn split_heads(from: &[f32], heads: Heads, out: &mut [f32]) {
    let Heads { t, d, h, .. } = heads;
    out.par_chunks_mut(t * d)
        .enumerate()
        .for_each(|(block, out)| {
            let (row, head) = (block / h, block % h);
            for (at, out) in out.chunks_exact_mut(d).enumerate() {
                let start = (row * t + at) * h * d + head * d;
                out.copy_from_slice(&from[start..start + d]);
            }
        });
}
