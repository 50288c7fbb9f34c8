//! A product with what is made of the same matrices beside it.

use super::*;

/// `left` `[inner, rows]` or, `across`, `[rows, inner]`, times `right` `[inner, columns]` or `[columns, inner]`.
fn exact(
    at: impl Fn(usize, usize) -> f64,
    right: impl Fn(usize, usize) -> f64,
    (rows, inner, columns): (usize, usize, usize),
) -> Vec<f64> {
    let sum = |i: usize, j: usize| (0..inner).map(|l| at(i, l) * right(l, j)).sum();
    (0..rows * columns)
        .map(|place| sum(place / columns, place % columns))
        .collect()
}

fn off(found: &[f32], exact: &[f64]) -> f64 {
    let norm: f64 = exact.iter().map(|x| x * x).sum();
    let off: f64 = found
        .iter()
        .zip(exact)
        .map(|(x, y)| (f64::from(*x) - y).powi(2))
        .sum();
    (off / norm).sqrt()
}

#[expect(
    clippy::too_many_lines,
    reason = "one case from its inputs to its limits"
)]
fn check(
    unit: Unit,
    (m, n, k): (usize, usize, usize),
    r: usize,
    direction: Direction,
    small: bool,
    asked: bool,
) {
    let forward = direction == Direction::Forward;
    let (inner, columns) = if forward { (k, n) } else { (n, k) };
    let rounded = |values: Vec<f32>| {
        if small {
            wide(&narrow(&values))
        } else {
            values
        }
    };
    let weight = quantize_4bit(&numbers(n * k, 1), &[n, k], QuantType::Nf4, 64, true).unwrap();
    let w = rounded(values(&weight));
    let input = rounded(numbers(m * inner, 2));
    let other = rounded(numbers(m * columns, 3));
    let (by, right) = (numbers(inner * r, 4), numbers(columns * r, 5));
    let (input16, other16) = (narrow(&input), narrow(&other));
    let view_of = |wide, bits| {
        if small {
            Dense::Bf16(bits)
        } else {
            Dense::F32(wide)
        }
    };
    let product = Product {
        direction,
        m,
        n,
        k,
        input: view_of(input.as_slice(), input16.as_slice()),
        weight: view(&weight),
        term: Some(Term {
            r,
            left: Dense::F32(&[]),
            right: Dense::F32(&right),
        }),
        bias: None,
        accumulate: false,
    };
    let poison = |len: usize| vec![f32::NAN; len];
    let (mut thin, mut tall, mut flat) = (poison(m * r), poison(inner * r), poison(r * columns));
    let left = numbers(m * r, 6);
    let adapter = Adapter {
        by: &by,
        scaling: 0.5,
        narrow: thin.as_mut_ptr(),
        outer: vec![
            Outer {
                left: left.as_ptr(),
                right: product.input,
                columns: inner,
                out: tall.as_mut_ptr(),
                across: true,
            },
            Outer {
                left: thin.as_ptr(),
                right: view_of(other.as_slice(), other16.as_slice()),
                columns,
                out: flat.as_mut_ptr(),
                across: false,
            },
        ],
    };
    let mut out = poison(m * columns);
    let mut out16 = vec![0_u16; m * columns];
    let to = if small {
        Output::Bf16(out16.as_mut_ptr())
    } else {
        Output::F32(out.as_mut_ptr())
    };
    // SAFETY: the CPU has the unit; all outputs have their elements.
    assert!(unsafe { product.run_with(unit, &adapter, asked.then_some(to)) });
    if small {
        out = wide(&out16);
    }

    let wide64 = |values: &[f32], at: usize| f64::from(values[at]);
    let made = exact(
        |i, l| 0.5 * wide64(&input, i * inner + l),
        |l, j| wide64(&by, if forward { j * inner + l } else { l * r + j }),
        (m, inner, r),
    );
    let limit = 4.0 * f64::from(f32::EPSILON);
    let error = off(&thin, &made);
    assert!(error < limit, "thin {unit:?} {m} {n} {k} {r}: {error:e}");
    let sums = exact(
        |i, l| wide64(&input, l * inner + i),
        |l, j| wide64(&left, l * r + j),
        (inner, m, r),
    );
    let error = off(&tall, &sums);
    assert!(error < limit, "tall {unit:?} {m} {n} {k} {r}: {error:e}");
    let sums = exact(
        |i, l| made[l * r + i],
        |l, j| wide64(&other, l * columns + j),
        (r, m, columns),
    );
    let error = off(&flat, &sums);
    assert!(error < limit, "flat {unit:?} {m} {n} {k} {r}: {error:e}");
    if !asked {
        return;
    }
    let base = exact(
        |i, l| wide64(&input, i * inner + l),
        |l, j| wide64(&w, if forward { j * k + l } else { l * k + j }),
        (m, inner, columns),
    );
    let term = exact(
        |i, l| made[i * r + l],
        |l, j| wide64(&right, if forward { j * r + l } else { l * columns + j }),
        (m, r, columns),
    );
    let whole: Vec<_> = base.iter().zip(&term).map(|(x, y)| x + y).collect();
    let limit = if small { 2e-3 } else { limit };
    let error = off(&out, &whole);
    assert!(error < limit, "out {unit:?} {m} {n} {k} {r}: {error:e}");
}

#[test]
fn what_an_adapter_asks_for_agrees_with_float64() {
    let mut at = 0;
    for sizes in [
        (1, 9, 5),
        (7, 33, 31),
        (6, 64, 128),
        (40, 17, 400),
        (530, 31, 70),
    ] {
        for r in [1, 6, 16, 40, 300] {
            for direction in [Direction::Forward, Direction::Backward] {
                at += 1;
                for unit in Unit::available() {
                    check(unit, sizes, r, direction, at % 3 == 0, at % 7 > 0);
                }
            }
        }
    }
}
