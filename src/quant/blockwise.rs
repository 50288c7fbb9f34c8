//! Quantisation: values to codes and absmax.

use super::codebook::Codebook;
use super::element::Element;
use super::kernels::{Isa, MIN_SCALE};
use super::nested;
use super::state::{Absmax, QuantState, Quantized4bit, check_blocksize, checked_elements};
use crate::dtype::QuantType;
use crate::error::{Error, Result};
use crate::parallel;

/// Elements a task takes: a multiple of every block size, and small enough for its values to stay in cache.
pub(super) const CHUNK: usize = 32_768;

/// Quantises `values`, a tensor of `shape` flattened row-major, to 4 bits an element.
///
/// `blocksize` is the elements that share an absmax, one of 32, 64, …, 4096. With `double_quant` the absmax are
/// quantised in turn, in 8 bits; the offset is then their mean summed in torch's order, whose last bit depends on the
/// number of threads from 32,768 blocks on (see [`torch_mean`](super::torch_mean)).
///
/// A block of zeros gets the code of zero (byte 0x77 in NF4, 0x00 in FP4). No values give no blocks.
///
/// # Errors
/// `Argument` for a block size not in the list, a shape that is not that of `values`, and a NaN or an infinity in
/// `values`, which no code can stand for (bitsandbytes lets it spoil its block, or with double quantisation all).
pub fn quantize_4bit<T: Element>(
    values: &[T],
    shape: &[usize],
    quant_type: QuantType,
    blocksize: usize,
    double_quant: bool,
) -> Result<Quantized4bit> {
    check_blocksize(blocksize)?;
    if checked_elements(shape)? != values.len() {
        return Err(Error::argument(format!(
            "{} values were given for shape {shape:?}",
            values.len()
        )));
    }
    let (packed, absmax) = encode(Isa::best(), values, Codebook::of(quant_type), blocksize);
    if let Some(block) = absmax.iter().position(|absmax| !absmax.is_finite()) {
        let start = block * blocksize;
        let inside = values[start..].iter().position(|x| !x.to_f32().is_finite());
        let at = start + inside.unwrap_or(0);
        return Err(Error::argument(format!(
            "element {at} of the flattened tensor is {}; 4-bit codes hold finite values only",
            values[at].to_f32()
        )));
    }
    let absmax = if double_quant {
        nested::compress(&absmax)
    } else {
        Absmax::Plain(absmax)
    };
    if let Absmax::Nested { offset, .. } = absmax
        && !offset.is_finite()
    {
        return Err(Error::argument(
            "the values are too large for double quantisation: the sum of their blocks' absmax overflows float32",
        ));
    }
    Ok(Quantized4bit {
        packed,
        state: QuantState {
            quant_type,
            blocksize,
            dtype: T::DTYPE,
            shape: shape.to_vec(),
            absmax,
        },
    })
}

/// Packed codes and absmax; the absmax of a block that holds a NaN or an infinity is not finite.
pub(super) fn encode<T: Element>(
    isa: Isa,
    values: &[T],
    book: &Codebook,
    blocksize: usize,
) -> (Vec<u8>, Vec<f32>) {
    let mut packed = vec![0_u8; values.len().div_ceil(2)];
    let mut absmax = vec![0.0_f32; values.len().div_ceil(blocksize)];
    let tasks = values
        .chunks(CHUNK)
        .zip(packed.chunks_mut(CHUNK / 2))
        .zip(absmax.chunks_mut(CHUNK / blocksize));
    parallel::for_each(tasks, |((values, packed), absmax)| {
        let full = values.len() / blocksize;
        let (values, rest) = values.split_at(full * blocksize);
        let (packed, packed_rest) = packed.split_at_mut(full * blocksize / 2);
        let (absmax, absmax_rest) = absmax.split_at_mut(full);
        isa.quantize(values, book, blocksize, packed, absmax);
        if let Some(absmax) = absmax_rest.first_mut() {
            *absmax = encode_rest(rest, book, packed_rest);
        }
    });
    (packed, absmax)
}

/// The short last block. Unlike a full one it is divided by its absmax, which is at least 1e-38, and stored so: that
/// is bitsandbytes' arithmetic. An odd element is paired with the code of zero.
fn encode_rest<T: Element>(values: &[T], book: &Codebook, packed: &mut [u8]) -> f32 {
    let absmax = super::kernels::portable::absmax(values);
    if !absmax.is_finite() {
        return absmax;
    }
    let absmax = absmax.max(MIN_SCALE);
    for (byte, pair) in packed.iter_mut().zip(values.chunks(2)) {
        let low = pair.get(1).map_or(0.0, |x| x.to_f32());
        *byte = book.encode(pair[0].to_f32() / absmax) << 4 | book.encode(low / absmax);
    }
    absmax
}
