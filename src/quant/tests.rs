use half::{bf16, f16};
use proptest::prelude::*;

use super::blockwise::encode;
use super::dequantize::decode;
use super::kernels::Isa;
use super::*;
use crate::dtype::QuantType;

/// splitmix64: the same values on every machine.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 40
    };
    // The sum of four is near enough to a normal distribution.
    (0..n)
        .map(|_| (0..4).map(|_| next() as f32 / 16_777_216.0 - 0.5).sum())
        .collect()
}

const TYPES: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

#[test]
fn nf4_is_the_papers_table() {
    let paper = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ];
    assert_eq!(
        Codebook::of(QuantType::Nf4).values.map(f64::from),
        paper,
        "every value is an exact f32"
    );
}

#[test]
fn encode_takes_the_nearest_value() {
    for kind in TYPES {
        let book = Codebook::of(kind);
        for i in -2000..=2000 {
            let x = i as f32 / 1990.0;
            let error = (book.values[usize::from(book.encode(x))] - x).abs();
            let least = book
                .values
                .iter()
                .map(|v| (v - x).abs())
                .fold(9.0, f32::min);
            assert!(error <= least + 1e-7, "{kind:?} {x}: {error} > {least}");
        }
    }
    let fp4 = Codebook::of(QuantType::Fp4);
    assert_eq!([-0.001, 0.0, 0.001].map(|x| fp4.encode(x)), [0, 0, 8]);
}

#[test]
fn dynamic_map_is_ascending_and_nearly_odd() {
    let map = dynamic_map();
    assert!(map.is_sorted());
    assert_eq!((map[127], map[255], map[128]), (0.0, 1.0, 5.500_000_4e-7));
    for i in 0..127 {
        assert_eq!(map[i].to_bits(), (-map[254 - i]).to_bits());
    }
}

#[test]
fn even_elements_are_the_high_nibbles() {
    let weight = quantize_4bit(&[1.0_f32, -1.0, 0.0], &[3], QuantType::Nf4, 32, false).unwrap();
    assert_eq!(weight.packed, [0xf0, 0x77]);
    assert_eq!(weight.state.absmax, Absmax::Plain(vec![1.0]));
}

#[test]
fn zero_blocks_are_zero() {
    for (kind, byte) in [(QuantType::Nf4, 0x77), (QuantType::Fp4, 0x00)] {
        for double in [false, true] {
            let weight = quantize_4bit(&[0.0_f32; 96], &[96], kind, 64, double).unwrap();
            assert_eq!(weight.packed, [byte; 48]);
            let mut out = [1.0_f32; 96];
            dequantize_4bit(&weight.packed, &weight.state, &mut out).unwrap();
            assert_eq!(out, [0.0; 96]);
        }
    }
}

#[test]
fn no_values_make_no_blocks() {
    for double in [false, true] {
        let weight = quantize_4bit::<f32>(&[], &[0, 7], QuantType::Nf4, 64, double).unwrap();
        assert!(weight.packed.is_empty() && weight.state.absmax.is_empty());
        dequantize_4bit::<f32>(&weight.packed, &weight.state, &mut []).unwrap();
    }
}

/// Every instruction set this CPU has gives the portable code's bits, for sizes that end inside blocks and chunks.
#[test]
fn all_paths_agree() {
    fn check<T: Element>(values: &[f32]) {
        let values: Vec<T> = values.iter().map(|x| T::from_f32(*x)).collect();
        for kind in TYPES {
            let book = Codebook::of(kind);
            for blocksize in BLOCKSIZES {
                let (packed, absmax) = encode(Isa::Portable, &values, book, blocksize);
                let state = QuantState {
                    quant_type: kind,
                    blocksize,
                    dtype: T::DTYPE,
                    shape: vec![values.len()],
                    absmax: Absmax::Plain(absmax.clone()),
                };
                let mut expected = vec![<T as bytemuck::Zeroable>::zeroed(); values.len()];
                decode(Isa::Portable, &packed, &state, 0, &mut expected);
                for isa in Isa::available() {
                    assert!(
                        encode(isa, &values, book, blocksize) == (packed.clone(), absmax.clone()),
                        "{isa:?} {kind:?} {blocksize}"
                    );
                    let mut out = vec![T::from_f32(f32::NAN); values.len()];
                    decode(isa, &packed, &state, 0, &mut out);
                    assert!(
                        bytemuck::cast_slice::<T, u8>(&out)
                            == bytemuck::cast_slice::<T, u8>(&expected),
                        "{isa:?} {kind:?} {blocksize}"
                    );
                }
            }
        }
    }
    let mut values = random(70_001, 1);
    values[64..192].fill(0.0);
    values[5000] = 1e-39;
    values[200..4500].iter_mut().for_each(|x| *x *= 1e-37);
    check::<f32>(&values);
    check::<f16>(&values);
    check::<bf16>(&values);
}

/// An absmax from a checkpoint may be anything, and conversions must not differ by path even there.
#[test]
fn all_paths_agree_on_extreme_scales() {
    fn check<T: Element>() {
        let scales = [
            f32::NAN,
            f32::from_bits(0xffa0_1234),
            f32::INFINITY,
            -1.0,
            3e38,
            65_520.0,
            1e-40,
            6e-8,
        ];
        let lut = Codebook::of(QuantType::Nf4).values;
        let packed: Vec<u8> = (0..128).map(|i| (i * 37) as u8).collect();
        let mut expected = vec![<T as bytemuck::Zeroable>::zeroed(); 256];
        Isa::Portable.dequantize(&lut, &packed, &scales, 32, &mut expected, false);
        for isa in Isa::available() {
            for (past_caches, misplaced) in [(false, 0), (true, 0), (true, 1)] {
                let mut memory = [<T as bytemuck::Zeroable>::zeroed(); 256 + 64];
                let start = memory.as_ptr().align_offset(64) + misplaced;
                let out = &mut memory[start..start + 256];
                isa.dequantize(&lut, &packed, &scales, 32, out, past_caches);
                let (out, expected): (&[u8], &[u8]) =
                    (bytemuck::cast_slice(out), bytemuck::cast_slice(&expected));
                assert_eq!(out, expected, "{isa:?} {:?} {past_caches}", T::DTYPE);
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn a_range_is_that_part_of_the_whole() {
    let values = random(100_000, 2);
    for double in [false, true] {
        let weight = quantize_4bit(&values, &[1000, 100], QuantType::Fp4, 128, double).unwrap();
        let mut whole = vec![0.0_f32; values.len()];
        dequantize_4bit(&weight.packed, &weight.state, &mut whole).unwrap();
        for (start, len) in [
            (0, 1),
            (1, 1),
            (127, 2),
            (130, 40),
            (99_999, 1),
            (100_000, 0),
            (32_767, 32_770),
            (5, 99_990),
        ] {
            let mut part = vec![f32::NAN; len];
            dequantize_4bit_range(&weight.packed, &weight.state, start, &mut part).unwrap();
            assert_eq!(part, whole[start..start + len], "{start} {len}");
        }
    }
}

#[test]
fn bad_arguments_say_what_is_wrong() {
    let message = |result: crate::error::Result<Quantized4bit>| result.unwrap_err().to_string();
    let nf4 = QuantType::Nf4;
    let text = message(quantize_4bit(&[0.0_f32; 4], &[4], nf4, 48, false));
    assert!(text.contains("not 48"), "{text}");
    let text = message(quantize_4bit(&[0.0_f32; 4], &[2, 3], nf4, 64, false));
    assert!(
        text.contains("4 values were given for shape [2, 3]"),
        "{text}"
    );
    let text = message(quantize_4bit(
        &[0.0_f32; 4],
        &[usize::MAX, 2],
        nf4,
        64,
        false,
    ));
    assert!(text.contains("memory"), "{text}");
    for (bad, name) in [(f32::NAN, "NaN"), (f32::NEG_INFINITY, "-inf")] {
        for at in [70, 129] {
            let mut values = [1.0_f32; 130];
            values[at] = bad;
            let text = message(quantize_4bit(&values, &[130], nf4, 64, true));
            assert!(
                text.contains(&format!("element {at}")) && text.contains(name),
                "{text}"
            );
        }
    }
    let text = message(quantize_4bit(&[3e38_f32; 256], &[256], nf4, 64, true));
    assert!(text.contains("overflows"), "{text}");
}

#[test]
fn bad_states_are_refused() {
    let good = quantize_4bit(&random(1000, 3), &[1000], QuantType::Nf4, 64, true).unwrap();
    let mut out = vec![0.0_f32; 1000];
    let mut text = |change: fn(&mut Quantized4bit)| {
        let mut weight = good.clone();
        change(&mut weight);
        dequantize_4bit(&weight.packed, &weight.state, &mut out)
            .unwrap_err()
            .to_string()
    };
    assert!(text(|w| w.packed.truncate(499)).contains("499 bytes"));
    assert!(text(|w| w.state.blocksize = 128).contains("16 values"));
    assert!(text(|w| w.state.shape = vec![999]).contains("out has 1000"));
    assert!(
        text(
            |w| if let Absmax::Nested { absmax, .. } = &mut w.state.absmax {
                absmax.push(1.0);
            }
        )
        .contains("nested_absmax has 2")
    );
    assert!(
        text(
            |w| if let Absmax::Nested { code, .. } = &mut w.state.absmax {
                code.truncate(255);
            }
        )
        .contains("255 values")
    );
}

proptest! {
    /// An element is off by at most half the widest gap of the codebook times its block's absmax; double quantisation
    /// moves the absmax itself by at most 1/64 of the spread of the absmax (the widest half-gap of the 8-bit map, and
    /// the grid it is looked up on).
    #[test]
    fn round_trips_are_close(
        values in prop::collection::vec(-1e3_f32..1e3, 0..700),
        fp4: bool,
        double: bool,
        blocksize in prop::sample::select(BLOCKSIZES.to_vec()),
    ) {
        let kind = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        let weight = quantize_4bit(&values, &[values.len()], kind, blocksize, double).unwrap();
        let mut out = vec![f32::NAN; values.len()];
        dequantize_4bit(&weight.packed, &weight.state, &mut out).unwrap();
        let half_gap = if fp4 { 1.0 / 6.0 } else { 0.152 };
        let largest = |x: &[f32]| x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        let slack = if double { largest(&values) / 64.0 } else { 0.0 };
        for (block, out) in values.chunks(blocksize).zip(out.chunks(blocksize)) {
            let bound = largest(block) * half_gap * 1.00001 + slack;
            for (x, y) in block.iter().zip(out) {
                prop_assert!((x - y).abs() <= bound, "{x} {y} {bound}");
            }
        }
    }

    #[test]
    fn checkpoint_tensors_read_back(n in 1_usize..3000, fp4: bool, double: bool) {
        let kind = if fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        let weight = quantize_4bit(&random(n, n as u64), &[n], kind, 32, double).unwrap();
        let tensors = to_tensors("a.weight", &weight).unwrap();
        let read = from_tensors("x".as_ref(), "a.weight", |name| {
            let tensor = tensors.iter().find(|tensor| tensor.name == name)?;
            Some(TensorBytes { dtype: tensor.dtype, shape: &tensor.shape, bytes: &tensor.bytes })
        });
        prop_assert_eq!(read.unwrap(), Some(weight));
    }
}
