//! Dropout whose mask is a pure function of a seed, a stream and the element's index.

use crate::parallel;
use crate::simd::vectorized;

/// Elements one Philox call serves: four 32-bit words are eight 16-bit uniforms.
const LANES: usize = 8;

/// Elements a thread masks at a time; a multiple of [`LANES`].
const CHUNK: usize = 1 << 14;

/// A dropout layer's mask: which elements are kept depends on nothing but `seed`, `stream` and the
/// element's index, so recomputation, tiling and threads give the same mask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, 0 ≤ p < 1, realised to within 2⁻¹⁷.
    pub p: f32,
    pub seed: u64,
    /// Independent masks under one seed: one stream for each projection.
    pub stream: u64,
}

/// Philox4x32-7 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3": the fewest rounds that pass BigCrush).
#[inline(always)]
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..7 {
        let low = u64::from(counter[0]) * 0xD251_1F53;
        let high = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}

impl Dropout {
    /// The same mask layer with another stream.
    pub fn stream(self, stream: u64) -> Self {
        Self { stream, ..self }
    }

    /// `out = keep(i) · values / (1 − p)`; forward on inputs and backward on gradients alike.
    pub fn apply(&self, values: &[f32], out: &mut [f32]) {
        self.visit(values, out, |value, _| value);
    }

    /// `out += keep(i) · values / (1 − p)`.
    pub fn apply_add(&self, values: &[f32], out: &mut [f32]) {
        self.visit(values, out, |value, old| old + value);
    }

    fn visit(&self, values: &[f32], out: &mut [f32], store: impl Fn(f32, f32) -> f32 + Sync) {
        assert_eq!(values.len(), out.len(), "sizes of a dropout");
        let threshold = (f64::from(self.p) * 65_536.0).round() as u32;
        let scale = 1.0 / (1.0 - self.p);
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let stream = [self.stream as u32, (self.stream >> 32) as u32];
        let chunks = out.chunks_mut(CHUNK).zip(values.chunks(CHUNK)).enumerate();
        parallel::for_each(chunks, |(chunk, (out, values))| {
            vectorized(|| {
                let first = (chunk * (CHUNK / LANES)) as u64;
                let groups = out.chunks_mut(LANES).zip(values.chunks(LANES));
                for (group, (out, values)) in groups.enumerate() {
                    let index = first + group as u64;
                    let words = philox(
                        [index as u32, (index >> 32) as u32, stream[0], stream[1]],
                        key,
                    );
                    for (lane, (out, &value)) in out.iter_mut().zip(values).enumerate() {
                        let uniform = words[lane / 2] >> (16 * (lane % 2)) & 0xFFFF;
                        let kept = if uniform >= threshold {
                            value * scale
                        } else {
                            0.0
                        };
                        *out = store(kept, *out);
                    }
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers() {
        // The vectors published with the Random123 library.
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]
        );
    }

    fn mask(p: f32, seed: u64, stream: u64, len: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; len];
        Dropout { p, seed, stream }.apply(&vec![1.0; len], &mut out);
        out
    }

    #[test]
    fn keep_rate_and_scale() {
        for p in [0.05, 0.1, 0.5, 0.9] {
            let out = mask(p, 7, 0, 1 << 18);
            let kept = out.iter().filter(|&&v| v != 0.0).count() as f64 / out.len() as f64;
            let sigma = (f64::from(p) * (1.0 - f64::from(p)) / out.len() as f64).sqrt();
            assert!(
                (kept - (1.0 - f64::from(p))).abs() < 4.0 * sigma + 1e-5,
                "{p}: {kept}"
            );
            assert!(out.iter().all(|&v| v == 0.0 || v == 1.0 / (1.0 - p)));
        }
    }

    #[test]
    fn masks_depend_on_the_index_alone() {
        let long = mask(0.3, 11, 2, CHUNK * 3 + 5);
        assert_eq!(long[..CHUNK + 3], mask(0.3, 11, 2, CHUNK + 3)[..]);
        assert_ne!(long[..64], mask(0.3, 12, 2, 64)[..]);
        assert_ne!(long[..64], mask(0.3, 11, 3, 64)[..]);
    }

    #[test]
    fn streams_are_independent() {
        let (a, b) = (mask(0.5, 3, 0, 1 << 16), mask(0.5, 3, 1, 1 << 16));
        let both = a
            .iter()
            .zip(&b)
            .filter(|(x, y)| **x != 0.0 && **y != 0.0)
            .count();
        let share = both as f64 / a.len() as f64;
        assert!((share - 0.25).abs() < 0.01, "{share}");
    }
}
