//! Random first values, which depend on the seed and the tensor's name alone.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    // FNV-1a: stable across versions and machines, unlike std's hasher.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    ChaCha8Rng::seed_from_u64(seed ^ hash)
}

/// In [0, 1), in steps of 2⁻²⁴.
fn unit(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() >> 8) as f32 / (1u32 << 24) as f32
}

/// Uniform numbers in ±bound.
pub fn uniform(seed: u64, name: &str, bound: f32, out: &mut [f32]) {
    let mut random = generator(seed, name);
    for value in out {
        *value = (2.0 * unit(&mut random) - 1.0) * bound;
    }
}

/// Normal numbers of mean 0 and the given standard deviation (Box and Muller, 1958).
pub fn normal(seed: u64, name: &str, deviation: f32, out: &mut [f32]) {
    let mut random = generator(seed, name);
    for pair in out.chunks_mut(2) {
        let radius = (-2.0 * (1.0 - unit(&mut random)).ln()).sqrt() * deviation;
        let (sine, cosine) = (std::f32::consts::TAU * unit(&mut random)).sin_cos();
        for (value, part) in pair.iter_mut().zip([cosine, sine]) {
            *value = radius * part;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_their_moments() {
        let mut values = vec![0.0; 100_001];
        normal(3, "classifier.weight", 0.02, &mut values);
        let count = values.len() as f64;
        let moment = |power: i32| {
            let powers = values
                .iter()
                .map(|&value| (f64::from(value) / 0.02).powi(power));
            powers.sum::<f64>() / count
        };
        assert!(moment(1).abs() < 0.015);
        assert!((moment(2) - 1.0).abs() < 0.02);
        assert!((moment(4) - 3.0).abs() < 0.15);
        let mut other = vec![0.0; 4];
        normal(4, "classifier.weight", 0.02, &mut other);
        assert_ne!(values[..4], other[..]);
    }
}
