//! The loops in plain Rust: the definition that the others are tested against.

use super::MIN_SCALE;
use crate::quant::codebook::Codebook;
use crate::quant::element::Element;

pub(in crate::quant) fn quantize<T: Element>(
    values: &[T],
    book: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    maxima: &mut [f32],
) {
    for ((values, packed), max) in values
        .chunks_exact(blocksize)
        .zip(packed.chunks_exact_mut(blocksize / 2))
        .zip(maxima)
    {
        *max = absmax(values);
        let inverse = 1.0 / max.max(MIN_SCALE);
        for (byte, pair) in packed.iter_mut().zip(values.chunks_exact(2)) {
            let high = book.encode(pair[0].to_f32() * inverse);
            let low = book.encode(pair[1].to_f32() * inverse);
            *byte = high << 4 | low;
        }
    }
}

/// Largest magnitude. Magnitudes are compared as bits, where infinity and then NaN come last, so a value that is not
/// finite shows.
pub(in crate::quant) fn absmax<T: Element>(values: &[T]) -> f32 {
    let bits = values
        .iter()
        .fold(0, |max, x| (x.to_f32().to_bits() & 0x7fff_ffff).max(max));
    f32::from_bits(bits)
}

pub(in crate::quant) fn dequantize<T: Element>(
    lut: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    blocksize: usize,
    out: &mut [T],
) {
    for ((packed, scale), out) in packed
        .chunks_exact(blocksize / 2)
        .zip(absmax)
        .zip(out.chunks_exact_mut(blocksize))
    {
        let values = lut.map(|value| T::from_f32(value * scale));
        for (byte, pair) in packed.iter().zip(out.chunks_exact_mut(2)) {
            pair[0] = values[usize::from(byte >> 4)];
            pair[1] = values[usize::from(byte & 15)];
        }
    }
}

/// Elements of one block: those from element `start` of the tensor `packed` on.
pub(in crate::quant) fn dequantize_part<T: Element>(
    lut: &[f32; 16],
    packed: &[u8],
    absmax: f32,
    start: usize,
    out: &mut [T],
) {
    for (i, value) in out.iter_mut().enumerate() {
        let element = start + i;
        let code = packed[element / 2] >> (4 * ((element + 1) % 2)) & 15;
        *value = T::from_f32(lut[usize::from(code)] * absmax);
    }
}
