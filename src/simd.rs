//! Elementwise loops compiled for every vector width of the machine, and the functions they need.

/// Runs `loops` compiled for the widest vector instructions the processor has.
///
/// Only what is inlined into the closure is widened: mark helpers `#[inline(always)]`.
#[inline(always)]
pub fn vectorized<R>(loops: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(loops)
}

/// `exp(x)` in f32 without branches, so that loops over it vectorise; within 2 ulp of the true
/// value for results that are normal numbers, 0 below −87.3 and infinity above 88.7.
///
/// Cody and Waite's reduction `x = n ln 2 + r` and a degree-6 polynomial on `|r| ≤ ln 2 / 2`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// 1.5 · 2²³: adding it rounds to the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-88.0, 89.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.388_888_9e-3;
    let p = p * r + 8.333_334e-3;
    let p = p * r + 4.166_666_8e-2;
    let p = p * r + 1.666_666_7e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // 2ⁿ in two factors, because 2¹²⁸ alone is not a number while p·2¹²⁷·2 may be one.
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = exponent >> 1;
    let scale = f32::from_bits(((half + 127) << 23) as u32);
    let rest = f32::from_bits(((exponent - half + 127) << 23) as u32);
    let value = p * scale * rest;
    let value = if x < -87.3 { 0.0 } else { value };
    // A comparison that NaN fails keeps NaN.
    if x.is_nan() { x } else { value }
}

/// The logistic function `1 / (1 + exp(−x))`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Eight independent partial sums: vectorises, and the order never depends on threads.
#[inline(always)]
pub fn sum(terms: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let chunks = terms.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += term(value);
        }
    }
    let mut total = 0.0;
    for &value in rest {
        total += term(value);
    }
    total + lanes.iter().sum::<f32>()
}

/// Σ aᵢ·bᵢ with the same fixed order.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (left, right) = (a.chunks_exact(16), b.chunks_exact(16));
    let mut total = 0.0;
    for (&x, &y) in left.remainder().iter().zip(right.remainder()) {
        total += x * y;
    }
    for (x, y) in left.zip(right) {
        for ((lane, &p), &q) in lanes.iter_mut().zip(x).zip(y) {
            *lane += p * q;
        }
    }
    total + lanes.iter().sum::<f32>()
}

/// The largest element, or −∞ of none; NaN is passed over.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(16);
    let mut top = chunks
        .remainder()
        .iter()
        .fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    for lane in lanes {
        top = if lane > top { lane } else { top };
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            let got = f64::from(vectorized(|| exp(x)));
            worst = worst.max(((got - truth) / truth).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.5), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_agree_with_float64_at_odd_lengths() {
        for length in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f32> = (0..length).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..length).map(|i| (i as f32 * 0.73).cos()).collect();
            let true_dot: f64 = a
                .iter()
                .zip(&b)
                .map(|(&x, &y)| f64::from(x) * f64::from(y))
                .sum();
            let true_sum: f64 = a.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from(dot(&a, &b)) - true_dot).abs() < 1e-5);
            assert!((f64::from(sum(&a, |x| x * x)) - true_sum).abs() < 1e-5);
            let top = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&a), top);
        }
    }
}
