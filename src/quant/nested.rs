//! Double quantisation: the blocks' absmax as bytes of the dynamic 8-bit type.

use std::sync::LazyLock;

use rayon::prelude::*;

use super::codebook::dynamic_map;
use super::mean::torch_mean;
use super::state::{Absmax, NESTED_BLOCKSIZE};

/// Last index of the table that turns a value of [-1, 1], in equal steps, into a code.
const LAST: u16 = u16::MAX;

/// Quantises the blocks' absmax as bitsandbytes' CPU code does: the mean is taken off, and each run of
/// [`NESTED_BLOCKSIZE`] values scaled by its own absmax and looked up on a grid of 65,536 steps, so that a value
/// near the middle of two codes may take the farther one.
pub(super) fn compress(absmax: &[f32]) -> Absmax {
    let offset = torch_mean(absmax, rayon::current_num_threads());
    let mut codes = vec![0_u8; absmax.len()];
    let mut nested = vec![0.0_f32; absmax.len().div_ceil(NESTED_BLOCKSIZE)];
    codes
        .par_chunks_mut(NESTED_BLOCKSIZE)
        .zip(absmax.par_chunks(NESTED_BLOCKSIZE))
        .zip(&mut nested)
        .with_min_len(16)
        .for_each(|((codes, absmax), nested)| *nested = compress_block(absmax, offset, codes));
    Absmax::Nested {
        codes,
        absmax: nested,
        code: dynamic_map().to_vec(),
        offset,
        blocksize: NESTED_BLOCKSIZE,
    }
}

fn compress_block(values: &[f32], offset: f32, codes: &mut [u8]) -> f32 {
    let absmax = values
        .iter()
        .fold(0.0_f32, |max, value| max.max((value - offset).abs()));
    if absmax > 0.0 {
        let inverse = 1.0 / absmax;
        let table = &*TABLE;
        for (code, value) in codes.iter_mut().zip(values) {
            *code = table[usize::from(grid_index((value - offset) * inverse))];
        }
    }
    absmax
}

/// Nearest grid step. One rounding after the product and the sum, as the fused multiply-add that bitsandbytes' build
/// has here gives; both are exact in f64.
fn grid_index(x: f32) -> u16 {
    let half = f64::from(0.5 * (x.clamp(-1.0, 1.0) + 1.0));
    (half * f64::from(LAST) + 0.5) as f32 as u16
}

static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let map = dynamic_map();
    let mut code = 0;
    (0..=LAST)
        .map(|i| {
            let x = -1.0 + 2.0 * f32::from(i) / f32::from(LAST);
            while code < 255 && 0.5 * (map[code] + map[code + 1]) < x {
                code += 1;
            }
            code as u8
        })
        .collect()
});

/// Appends the absmax of `blocks` to `out`; two roundings each, never fused.
pub(super) fn expand(absmax: &Absmax, blocks: std::ops::Range<usize>, out: &mut Vec<f32>) {
    match absmax {
        Absmax::Plain(absmax) => out.extend_from_slice(&absmax[blocks]),
        Absmax::Nested {
            codes,
            absmax,
            code,
            offset,
            blocksize,
        } => {
            let mut from = blocks.start;
            while from < blocks.end {
                let group = from / blocksize;
                let to = blocks.end.min((group + 1) * blocksize);
                let scale = absmax[group];
                let values = codes[from..to].iter();
                out.extend(values.map(|q| code[usize::from(*q)] * scale + offset));
                from = to;
            }
        }
    }
}
