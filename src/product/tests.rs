//! Products beside float64, over sizes that are no multiples of tiles and blocks that straddle rows.

mod adapter;

use half::{bf16, f16};

use super::*;
use crate::dtype::{DType, QuantType};
use crate::quant::{Absmax, Codebook, Element, Quantized4bit, dequantize_4bit, quantize_4bit};

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32)
        .map(|i| {
            let mixed = (i.wrapping_mul(2_654_435_761) ^ seed).wrapping_mul(2_246_822_519);
            let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x2c1b_3c6d);
            (mixed >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

fn narrow(values: &[f32]) -> Vec<u16> {
    values
        .iter()
        .map(|value| bf16::from_f32(*value).to_bits())
        .collect()
}

fn wide(bits: &[u16]) -> Vec<f32> {
    bits.iter().map(|b| bf16::from_bits(*b).to_f32()).collect()
}

fn view(weight: &Quantized4bit) -> FourBit<'_> {
    let state = &weight.state;
    FourBit {
        packed: &weight.packed,
        scales: match &state.absmax {
            Absmax::Plain(absmax) => Scales::Plain(absmax),
            Absmax::Nested {
                codes,
                absmax,
                code,
                offset,
                blocksize,
            } => Scales::Nested {
                codes,
                absmax,
                code,
                offset: *offset,
                blocksize: *blocksize,
            },
        },
        values: &Codebook::of(state.quant_type).values,
        blocksize: state.blocksize,
        dtype: state.dtype,
    }
}

fn values(weight: &Quantized4bit) -> Vec<f32> {
    fn of<T: Element>(weight: &Quantized4bit) -> Vec<f32> {
        let mut out = vec![T::from_f32(0.0); weight.state.elements()];
        dequantize_4bit(&weight.packed, &weight.state, &mut out).unwrap();
        out.into_iter().map(Element::to_f32).collect()
    }
    match weight.state.dtype {
        DType::F32 => of::<f32>(weight),
        DType::F16 => of::<f16>(weight),
        DType::BF16 => of::<bf16>(weight),
    }
}

/// Sums in f64, and those of a chain of f32 fused multiply-adds.
struct Sums {
    exact: Vec<f64>,
    chain: Vec<f64>,
    /// Of the squares of the terms of all sums.
    squares: f64,
}

impl Sums {
    fn new(start: impl Fn(usize) -> f32, len: usize) -> Self {
        let exact: Vec<_> = (0..len).map(|i| f64::from(start(i))).collect();
        Self {
            chain: exact.clone(),
            squares: exact.iter().map(|x| x * x).sum(),
            exact,
        }
    }

    /// Adds `left` `[m, inner]` times `right`, element (l, j) being at `at(l, j)`.
    fn add(
        &mut self,
        left: &[f32],
        right: &[f32],
        inner: usize,
        columns: usize,
        at: impl Fn(usize, usize) -> usize,
    ) {
        for (place, (exact, chain)) in self.exact.iter_mut().zip(&mut self.chain).enumerate() {
            let (i, j) = (place / columns, place % columns);
            let mut sum = *chain as f32;
            for l in 0..inner {
                let (x, y) = (left[i * inner + l], right[at(l, j)]);
                let term = f64::from(x) * f64::from(y);
                *exact += term;
                self.squares += term * term;
                sum = x.mul_add(y, sum);
            }
            *chain = f64::from(sum);
        }
    }

    /// How much larger than what is left of them terms are that cancel.
    fn cancelled(&self) -> f64 {
        let norm: f64 = self.exact.iter().map(|x| x * x).sum();
        (self.squares / norm).sqrt().max(1.0)
    }

    fn error(&self, found: impl Iterator<Item = f64>) -> f64 {
        let norm: f64 = self.exact.iter().map(|x| x * x).sum();
        let off: f64 = self
            .exact
            .iter()
            .zip(found)
            .map(|(x, y)| (x - y).powi(2))
            .sum();
        (off / norm).sqrt()
    }
}

struct Case {
    unit: Unit,
    sizes: (usize, usize, usize),
    r: usize,
    direction: Direction,
    /// Of the input; of the term where it is not `wide_term`.
    dtype: DType,
    wide_term: bool,
    quant: (QuantType, usize, bool, DType),
    accumulate: bool,
}

impl Case {
    #[expect(
        clippy::too_many_lines,
        reason = "one case from its inputs to its limit"
    )]
    fn check(&self) {
        let (m, n, k) = self.sizes;
        let forward = self.direction == Direction::Forward;
        let (inner, columns) = if forward { (k, n) } else { (n, k) };
        let (quant_type, blocksize, double, quantized) = self.quant;
        let dense = numbers(n * k, 1);
        let weight = match quantized {
            DType::F32 => quantize_4bit(&dense, &[n, k], quant_type, blocksize, double),
            DType::F16 => {
                let dense: Vec<_> = dense.into_iter().map(f16::from_f32).collect();
                quantize_4bit(&dense, &[n, k], quant_type, blocksize, double)
            }
            DType::BF16 => {
                let dense: Vec<_> = dense.into_iter().map(bf16::from_f32).collect();
                quantize_4bit(&dense, &[n, k], quant_type, blocksize, double)
            }
        }
        .unwrap();
        let mut w = values(&weight);
        let small = self.dtype == DType::BF16;
        let (mut x, mut left, mut right) = (
            numbers(m * inner, 2),
            numbers(m * self.r, 3),
            numbers(columns * self.r, 4),
        );
        let x16 = narrow(&x);
        let (left16, right16) = (narrow(&left), narrow(&right));
        if small {
            (x, w) = (wide(&x16), wide(&narrow(&w)));
        }
        let narrow_term = small && !self.wide_term;
        if narrow_term {
            (left, right) = (wide(&left16), wide(&right16));
        }
        let bias = forward.then(|| numbers(columns, 5));
        let old = wide(&narrow(&numbers(m * columns, 6)));

        let at = |l: usize, j: usize| if forward { j * k + l } else { l * k + j };
        let start = |i: usize| {
            let bias = bias.as_ref().map_or(0.0, |bias| bias[i % columns]);
            bias + if self.accumulate { old[i] } else { 0.0 }
        };
        let mut sums = Sums::new(start, m * columns);
        sums.add(&x, &w, inner, columns, at);
        let at = |l: usize, j: usize| {
            if forward {
                j * self.r + l
            } else {
                l * columns + j
            }
        };
        sums.add(&left, &right, self.r, columns, at);

        let term = (self.r > 0).then(|| Term {
            r: self.r,
            left: if narrow_term {
                Dense::Bf16(&left16)
            } else {
                Dense::F32(&left)
            },
            right: if narrow_term {
                Dense::Bf16(&right16)
            } else {
                Dense::F32(&right)
            },
        });
        let product = Product {
            direction: self.direction,
            m,
            n,
            k,
            input: if small {
                Dense::Bf16(&x16)
            } else {
                Dense::F32(&x)
            },
            weight: view(&weight),
            term,
            bias: bias.as_deref(),
            accumulate: self.accumulate,
        };
        let poison = if self.accumulate {
            old
        } else {
            vec![f32::NAN; m * columns]
        };
        let (error, limit) = if small {
            let mut out = narrow(&poison);
            // SAFETY: the CPU has the unit; `out` has m·columns elements.
            assert!(unsafe { product.run(self.unit, Output::Bf16(out.as_mut_ptr())) });
            let rounded = sums.exact.iter().map(|x| bf16::from_f64(*x).to_f64());
            let once = sums.error(rounded.collect::<Vec<_>>().into_iter());
            (
                sums.error(wide(&out).into_iter().map(f64::from)),
                1.001 * once + 1e-6,
            )
        } else {
            let mut out = poison;
            // SAFETY: as above.
            assert!(unsafe { product.run(self.unit, Output::F32(out.as_mut_ptr())) });
            let chain = sums.error(sums.chain.iter().copied());
            let error = sums.error(out.into_iter().map(f64::from));
            let least = 1.2 * f64::from(f32::EPSILON) * sums.cancelled();
            (error, chain.max(least))
        };
        assert!(
            error <= limit,
            "{:?} {:?} {:?} r={} {:?} {:?}: {error:e}, limit {limit:e}",
            self.unit,
            self.sizes,
            self.direction,
            self.r,
            self.dtype,
            self.quant
        );
    }
}

#[test]
fn sums_of_all_forms_agree_with_float64() {
    let shapes = [
        (1, 1, 1),
        (3, 33, 31),
        (17, 40, 65),
        (33, 64, 96),
        (40, 17, 2049),
        (530, 31, 70),
        (9, 320, 288),
    ];
    let ranks = [0, 1, 16, 33, 256];
    let dtypes = [DType::F32, DType::BF16];
    let mut at = 0;
    for sizes in shapes {
        for dtype in dtypes {
            for direction in [Direction::Forward, Direction::Backward] {
                for blocksize in [32, 64, 4096] {
                    at += 1;
                    let case = |unit| Case {
                        unit,
                        sizes,
                        r: ranks[at % 5],
                        direction,
                        dtype,
                        wide_term: at % 3 == 0,
                        quant: (
                            if at % 2 == 0 {
                                QuantType::Nf4
                            } else {
                                QuantType::Fp4
                            },
                            blocksize,
                            at % 4 < 2,
                            if at % 7 == 0 { DType::F16 } else { dtype },
                        ),
                        accumulate: at % 5 == 0,
                    };
                    // Without units, the callers' fallback is tested elsewhere.
                    Unit::available().for_each(|unit| case(unit).check());
                }
            }
        }
    }
}

#[test]
fn values_that_tiles_are_not_exact_for_are_refused() {
    if !Unit::available().any(|unit| unit == Unit::Tiles) {
        return;
    }
    let (m, n, k) = (4, 8, 64);
    let weight = |scale: f32| {
        let dense: Vec<_> = numbers(n * k, 1).iter().map(|x| x * scale).collect();
        quantize_4bit(&dense, &[n, k], QuantType::Nf4, 64, false).unwrap()
    };
    let run = |x: &[f32], weight: &Quantized4bit| {
        let mut out = vec![0.0; m * n];
        let product = Product {
            direction: Direction::Forward,
            m,
            n,
            k,
            input: Dense::F32(x),
            weight: view(weight),
            term: None,
            bias: None,
            accumulate: false,
        };
        // SAFETY: as above.
        unsafe { product.run(Unit::Tiles, Output::F32(out.as_mut_ptr())) }
    };
    let good = numbers(m * k, 2);
    assert!(run(&good, &weight(1.0)));
    assert!(run(&vec![0.0; m * k], &weight(1.0)));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
        let mut x = good.clone();
        x[m * k - 1] = bad;
        assert!(!run(&x, &weight(1.0)), "{bad}");
    }
    let tiny: Vec<_> = good.iter().map(|x| x * 1e-30).collect();
    assert!(!run(&tiny, &weight(1.0)));
    assert!(!run(&good, &weight(1e-25)));
    assert!(!run(&good, &weight(1e25)));
}

#[test]
fn three_parts_of_a_weight_add_up_to_it() {
    use super::parts::Planes;
    use super::weight::Target;
    let vectors = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vbmi");
    if !(vectors && is_x86_feature_detected!("avx512bf16")) {
        return;
    }
    let (n, k) = (6, 160);
    for (blocksize, double) in [(32, false), (64, true), (512, true)] {
        let weight = quantize_4bit(
            &numbers(n * k, 1),
            &[n, k],
            QuantType::Nf4,
            blocksize,
            double,
        )
        .unwrap();
        let (view, exact) = (view(&weight), values(&weight));
        for (start, len) in [(0_usize, 160_usize), (3, 157), (65, 31), (160, 640)] {
            let width = len.next_multiple_of(32);
            let mut out = vec![0_u16; 3 * width];
            let to = Target {
                start: out.as_mut_ptr(),
                vector: 32,
                plane: width,
            };
            // SAFETY: the CPU has the features; the matrix and `out` have the elements.
            unsafe { view.decode(start, len, Planes::Three, to) };
            let out = wide(&out);
            for at in 0..len {
                let found: f32 = (0..3).map(|p| out[p * width + at]).sum();
                assert_eq!(found, exact[start + at], "{blocksize} {start} {at}");
            }
        }
        let mut out = vec![0_u16; 3 * 2 * 64];
        let to = Target {
            start: out.as_mut_ptr(),
            vector: 32,
            plane: 128,
        };
        let starts = [32, 32 + k];
        // SAFETY: as above.
        unsafe { view.decode_pair(starts, 64, Planes::Three, to) };
        let out = wide(&out);
        for at in 0..128 {
            let found: f32 = (0..3).map(|p| out[p * 128 + at]).sum();
            assert_eq!(found, exact[starts[at % 2] + at / 2], "{blocksize} {at}");
        }
    }
}

#[test]
fn infinities_and_nan_of_bf16_spread_as_in_any_product() {
    let (m, n, k) = (3, 8, 40);
    let dense: Vec<_> = numbers(n * k, 1).into_iter().map(bf16::from_f32).collect();
    let weight = quantize_4bit(&dense, &[n, k], QuantType::Nf4, 64, true).unwrap();
    let mut x = narrow(&numbers(m * k, 2));
    x[k] = bf16::INFINITY.to_bits();
    x[2 * k] = bf16::NAN.to_bits();
    let product = Product {
        direction: Direction::Forward,
        m,
        n,
        k,
        input: Dense::Bf16(&x),
        weight: view(&weight),
        term: None,
        bias: None,
        accumulate: false,
    };
    for unit in Unit::available() {
        let mut out = vec![0_u16; m * n];
        // SAFETY: as above.
        assert!(unsafe { product.run(unit, Output::Bf16(out.as_mut_ptr())) });
        let out = wide(&out);
        assert!(out[..n].iter().all(|y| y.is_finite()));
        assert!(out[n..2 * n].iter().all(|y| !y.is_finite()));
        assert!(out[2 * n..].iter().all(|y| y.is_nan()));
    }
}
