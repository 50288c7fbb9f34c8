//! The group against a float64 reference written from the formula, forward and backward.

use super::*;
use crate::dtype::QuantType;
use crate::quant::{dequantize_4bit, quantize_4bit};

struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 2.0
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// `left` [m, k] times `right` [n, k] transposed, in float64.
fn product(left: &[f64], right: &[f64], m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            out[i * n + j] = (0..k).map(|l| left[i * k + l] * right[j * k + l]).sum();
        }
    }
    out
}

fn transpose(values: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; values.len()];
    for i in 0..rows {
        for j in 0..columns {
            out[j * rows + i] = values[i * columns + j];
        }
    }
    out
}

fn error(got: &[f32], truth: &[f64]) -> f64 {
    assert_eq!(got.len(), truth.len());
    let difference: f64 = got
        .iter()
        .zip(truth)
        .map(|(&g, &t)| (f64::from(g) - t).powi(2))
        .sum();
    let norm: f64 = truth.iter().map(|t| t * t).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// What the members' base weights and biases are, in float64.
fn dense(group: &Group, theta: &[f32]) -> (Vec<Vec<f64>>, Vec<Option<Vec<f64>>>) {
    let mut weights = Vec::new();
    let mut biases = Vec::new();
    match &group.base {
        Base::Frozen {
            weights: stored,
            biases: own,
        } => {
            for (weight, bias) in stored.iter().zip(own) {
                let mut out = vec![f32::NAN; weight.len()];
                weight.widen_into(&mut out).unwrap();
                weights.push(wide(&out));
                biases.push(bias.as_deref().map(wide));
            }
        }
        Base::Trained { .. } => {
            let tensors = group.tensors();
            for member in &group.members {
                let find = |suffix: &str| {
                    let name = format!("{}.{suffix}", member.name);
                    tensors.iter().find(|t| t.name == name).map(|t| {
                        let len: usize = t.shape.iter().product();
                        wide(&theta[t.offset..t.offset + len])
                    })
                };
                weights.push(find("weight").unwrap());
                biases.push(find("bias"));
            }
        }
    }
    (weights, biases)
}

/// Runs forward and backward and compares everything with the formula in float64.
#[expect(clippy::too_many_lines, reason = "one formula, forward and backward")]
fn check(group: &Group, m: usize, dropout: Option<Dropout>, seed: u64) {
    let mut random = Random(seed);
    let (k, width) = (group.k, group.width());
    let x = random.vec(m * k);
    let dy = random.vec(m * width);
    let theta = random.vec(group.theta_len());
    let (weights, biases) = dense(group, &theta);

    let (y, h) = group.forward(&x, &theta, dropout).unwrap();
    let mut dx = vec![f32::NAN; m * k];
    let mut dtheta = vec![f32::NAN; theta.len()];
    group
        .backward(&x, &theta, &h, &dy, dropout, Some(&mut dx), &mut dtheta)
        .unwrap();

    let x64 = wide(&x);
    let mut true_y = vec![0.0; m * width];
    let mut true_dx = vec![0.0; m * k];
    let mut true_dtheta = vec![0.0; theta.len()];
    let tensors = group.tensors();
    let place = |name: &str| {
        let t = tensors.iter().find(|t| t.name == name).unwrap();
        t.offset..t.offset + t.shape.iter().product::<usize>()
    };
    let mut column = 0;
    for (at, member) in group.members.iter().enumerate() {
        let n = member.n;
        let mut y_i = product(&x64, &weights[at], m, n, k);
        let mut dy_i = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                dy_i[i * n + j] = f64::from(dy[i * width + column + j]);
                if let Some(bias) = &biases[at] {
                    y_i[i * n + j] += bias[j];
                }
            }
        }
        let mut dx_i = product(&dy_i, &transpose(&weights[at], n, k), m, k, n);
        if let Base::Trained { biases: has } = &group.base {
            let dw = product(&transpose(&dy_i, m, n), &transpose(&x64, m, k), n, k, m);
            true_dtheta[place(&format!("{}.weight", member.name))].copy_from_slice(&dw);
            if has[at] {
                let range = place(&format!("{}.bias", member.name));
                for j in 0..n {
                    true_dtheta[range.start + j] = (0..m).map(|i| dy_i[i * n + j]).sum();
                }
            }
        }
        if let Some(Adapter { r, scaling }) = member.adapter {
            let s = f64::from(scaling);
            let (ra, rb) = (
                place(&format!("{}.lora_A.weight", member.name)),
                place(&format!("{}.lora_B.weight", member.name)),
            );
            let (a, b) = (wide(&theta[ra.clone()]), wide(&theta[rb.clone()]));
            let mut mask = vec![1.0f32; m * k];
            if let Some(dropout) = dropout {
                let ones = mask.clone();
                dropout
                    .stream(dropout.stream + at as u64)
                    .apply(&ones, &mut mask);
            }
            let dropped: Vec<f64> = x64
                .iter()
                .zip(&mask)
                .map(|(v, &k)| v * f64::from(k))
                .collect();
            let xa = product(&dropped, &a, m, r, k);
            let delta = product(&xa, &b, m, n, r);
            for (y, d) in y_i.iter_mut().zip(&delta) {
                *y += s * d;
            }
            let g: Vec<f64> = product(&dy_i, &transpose(&b, n, r), m, r, n)
                .iter()
                .map(|v| v * s)
                .collect();
            let db = product(&transpose(&dy_i, m, n), &transpose(&xa, m, r), n, r, m);
            let da = product(&transpose(&g, m, r), &transpose(&dropped, m, k), r, k, m);
            for (out, v) in true_dtheta[rb].iter_mut().zip(&db) {
                *out = v * s;
            }
            true_dtheta[ra].copy_from_slice(&da);
            let through = product(&g, &transpose(&a, r, k), m, k, r);
            for ((out, v), &keep) in dx_i.iter_mut().zip(&through).zip(&mask) {
                *out += v * f64::from(keep);
            }
        }
        for i in 0..m {
            for j in 0..n {
                true_y[i * width + column + j] = y_i[i * n + j];
            }
        }
        for (out, v) in true_dx.iter_mut().zip(&dx_i) {
            *out += v;
        }
        column += n;
    }
    for (what, got, truth) in [
        ("y", &y[..], &true_y),
        ("dx", &dx[..], &true_dx),
        ("dtheta", &dtheta[..], &true_dtheta),
    ] {
        let error = error(got, truth);
        assert!(
            error < 2e-6,
            "{what}: relative error {error:e} (m {m}, k {k})"
        );
    }
}

fn member(name: &str, n: usize, adapter: Option<(usize, f32)>) -> Member {
    Member {
        name: name.into(),
        n,
        adapter: adapter.map(|(r, scaling)| Adapter { r, scaling }),
        scaled: None,
    }
}

fn frozen(members: Vec<Member>, k: usize, bias: bool, seed: u64) -> Group {
    let mut random = Random(seed);
    let weights = members
        .iter()
        .map(|m| FrozenWeight::F32(random.vec(m.n * k)))
        .collect();
    let biases = members
        .iter()
        .map(|m| bias.then(|| random.vec(m.n)))
        .collect();
    Group {
        k,
        members,
        base: Base::Frozen { weights, biases },
    }
}

const DROPOUT: Dropout = Dropout {
    p: 0.2,
    seed: 99,
    stream: 40,
};

#[test]
fn dense_groups_of_every_kind() {
    for (m, k, r) in [(1, 1, 1), (5, 7, 3), (64, 48, 16), (33, 130, 200)] {
        for dropout in [None, Some(DROPOUT)] {
            for bias in [false, true] {
                let members = vec![
                    member("q", 11, Some((r, 0.5))),
                    member("k", 3, None),
                    member("v", 6, Some((r + 1, 2.0))),
                ];
                check(&frozen(members, k, bias, 1), m, dropout, 2);
            }
        }
    }
}

#[test]
fn no_adapter_at_all() {
    check(&frozen(vec![member("o", 9, None)], 12, true, 3), 8, None, 4);
}

#[test]
fn half_precision_and_four_bit_weights() {
    let (n, k) = (24, 65);
    let values = Random(5).vec(n * k);
    let quantised = |quant_type, double| {
        FrozenWeight::FourBit(quantize_4bit(&values, &[n, k], quant_type, 64, double).unwrap())
    };
    let stored = [
        FrozenWeight::F16(values.iter().map(|&v| half::f16::from_f32(v)).collect()),
        FrozenWeight::BF16(values.iter().map(|&v| half::bf16::from_f32(v)).collect()),
        quantised(QuantType::Nf4, true),
        quantised(QuantType::Fp4, false),
    ];
    for weight in stored {
        assert_eq!(weight.len(), n * k);
        let group = Group {
            k,
            members: vec![member("w", n, Some((4, 1.5)))],
            base: Base::Frozen {
                weights: vec![weight],
                biases: vec![None],
            },
        };
        check(&group, 17, Some(DROPOUT), 6);
    }
}

#[test]
fn trained_weights_and_biases() {
    let group = Group {
        k: 13,
        members: vec![member("gate", 8, None), member("up", 5, None)],
        base: Base::Trained {
            biases: vec![false, true],
        },
    };
    check(&group, 21, None, 7);
}

#[test]
fn four_bit_weights_are_what_dequantisation_says() {
    let values = Random(8).vec(6 * 50);
    let packed = quantize_4bit(&values, &[6, 50], QuantType::Nf4, 64, true).unwrap();
    let mut expected = vec![0.0f32; 300];
    dequantize_4bit(&packed.packed, &packed.state, &mut expected).unwrap();
    let mut got = vec![f32::NAN; 300];
    FrozenWeight::FourBit(packed).widen_into(&mut got).unwrap();
    assert_eq!(got, expected);
}

#[test]
fn no_tokens() {
    let group = frozen(vec![member("q", 4, Some((2, 1.0)))], 3, true, 9);
    let theta = vec![1.0; group.theta_len()];
    let (y, h) = group.forward(&[], &theta, None).unwrap();
    assert!(y.is_empty() && h.is_empty());
    let mut dtheta = vec![f32::NAN; theta.len()];
    group
        .backward(&[], &theta, &h, &[], None, Some(&mut []), &mut dtheta)
        .unwrap();
    assert!(dtheta.iter().all(|&v| v == 0.0));
}
