//! The optimiser against torch's values and against float64.

use candle_core::{Device, Var};
use ferrotune::engine::{AdamW, AdamWSettings, Parameter, Segment, clip_factor};

use crate::support::Random;

fn parameter(values: Vec<f32>, segments: &[(usize, usize, bool)]) -> Parameter {
    let count = values.len();
    let segment = |&(offset, length, decay)| Segment {
        name: format!("at {offset}"),
        offset,
        shape: vec![length],
        decay,
    };
    Parameter {
        name: "flat".to_owned(),
        var: Var::from_vec(values, count, &Device::Cpu).unwrap(),
        segments: segments.iter().map(segment).collect(),
    }
}

/// torch 2.15: AdamW(lr=0.01, betas=(0.9, 0.99), eps=1e-8), `weight_decay` 0.1 on the first four
/// values and 0 on the others, gradients clipped to a norm of 0.75.
#[test]
fn six_clipped_steps_give_torchs_values() {
    let parameters = [parameter(
        vec![0.5, -1.25, 2.0, 0.03125, 1.5, -0.75],
        &[(0, 4, true), (4, 2, false)],
    )];
    let settings = AdamWSettings {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let mut optimizer = AdamW::new(settings, &parameters).unwrap();
    for step in 1..=6 {
        let gradient: Vec<f32> = (0..6)
            .map(|i| (((step * 7 + i * 5) % 11) as f32 - 5.0) / 8.0)
            .collect();
        let norm = gradient
            .iter()
            .map(|&g| f64::from(g).powi(2))
            .sum::<f64>()
            .sqrt();
        let scale = clip_factor(norm, 0.75);
        optimizer
            .step(&parameters, &[gradient], scale, 0.01, step)
            .unwrap();
    }
    let found = parameters[0].var.to_vec1::<f32>().unwrap();
    let expected = [
        0.4750150442123413,
        -1.2223562002182007,
        1.9826598167419434,
        0.045222580432891846,
        1.5191810131072998,
        -0.7794836163520813,
    ];
    for (a, b) in found.iter().zip(expected) {
        assert!((f64::from(*a) - b).abs() < 1e-6, "{found:?}");
    }
}

#[test]
fn random_steps_follow_float64_on_every_segment() {
    const COUNT: usize = 40_000;
    let mut random = Random(5);
    // A gap without a segment lies between 30000 and 30010.
    let segments = [
        (0, 10, false),
        (10, 20_000, true),
        (20_010, 9_990, false),
        (30_010, 5_000, true),
        (35_010, 4_990, true),
    ];
    let start = random.values(COUNT, 1.0);
    let decays: Vec<bool> = (0..COUNT)
        .map(|i| {
            segments
                .iter()
                .any(|&(offset, length, decay)| decay && (offset..offset + length).contains(&i))
        })
        .collect();
    assert_eq!(decays.iter().filter(|&&decay| decay).count(), 29_990);
    let parameters = [parameter(start.clone(), &segments)];
    let settings = AdamWSettings {
        beta1: 0.8,
        beta2: 0.95,
        eps: 1e-6,
        weight_decay: 0.3,
    };
    let mut optimizer = AdamW::new(settings, &parameters).unwrap();
    let mut theta: Vec<f64> = start.iter().map(|&v| f64::from(v)).collect();
    let (mut m, mut v) = (vec![0.0; COUNT], vec![0.0; COUNT]);
    for step in 1..=12 {
        let gradient = random.values(COUNT, 100.0);
        let (scale, rate) = (0.01 / step as f64, 0.02 * f64::from(step as u32 % 4));
        for i in 0..COUNT {
            let g = f64::from(gradient[i]) * scale;
            m[i] = 0.8 * m[i] + 0.2 * g;
            v[i] = 0.95 * v[i] + 0.05 * g * g;
            let m_hat = m[i] / (1.0 - 0.8f64.powi(step));
            let v_hat: f64 = v[i] / (1.0 - 0.95f64.powi(step));
            let decay = if decays[i] {
                rate * 0.3 * theta[i]
            } else {
                0.0
            };
            theta[i] = theta[i] - decay - rate * m_hat / (v_hat.sqrt() + 1e-6);
        }
        optimizer
            .step(&parameters, &[gradient], scale, rate, step as usize)
            .unwrap();
    }
    let found = parameters[0].var.to_vec1::<f32>().unwrap();
    for i in 0..COUNT {
        assert!(
            (f64::from(found[i]) - theta[i]).abs() < 2e-6,
            "{i}: {} {}",
            found[i],
            theta[i]
        );
    }
    let moved = found
        .iter()
        .zip(&start)
        .filter(|(a, b)| (*a - *b).abs() > 1e-3)
        .count();
    assert!(moved > COUNT * 9 / 10, "only {moved} values moved");
}

#[test]
fn clipping_scales_down_only() {
    assert!((clip_factor(10.0, 2.5) - 0.25).abs() < 1e-7);
    assert!((clip_factor(2.0, 2.5) - 1.0).abs() < f64::EPSILON);
    assert!((clip_factor(1e9, 0.0) - 1.0).abs() < f64::EPSILON);
}

#[test]
fn overlapping_segments_are_refused() {
    let settings = AdamWSettings {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    for segments in [[(0, 5, true), (4, 2, true)], [(0, 5, true), (5, 6, true)]] {
        let parameters = [parameter(vec![0.0; 10], &segments)];
        let error = AdamW::new(settings, &parameters).err().unwrap().to_string();
        assert!(error.contains("flat") && error.contains("at "), "{error}");
    }
}
