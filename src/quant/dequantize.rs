//! Dequantisation: codes and absmax to values, into the caller's memory.

use super::blockwise::CHUNK;
use super::element::Element;
use super::kernels::{Isa, portable};
use super::nested;
use super::state::QuantState;
use crate::error::{Error, Result};
use crate::parallel;

/// Bytes of a result from which on stores go past the caches: it would not stay in them for its reader.
const PAST_CACHES: usize = 32 << 20;

/// Dequantises a whole tensor into `out`, which has its elements, row-major.
///
/// An element is `codebook[code] * absmax` in f32, then rounded to nearest even to `T`; `T` need not be the type that
/// was quantised.
///
/// # Errors
/// `Argument` if `out` has not the tensor's size or the parts of the state do not fit together.
pub fn dequantize_4bit<T: Element>(packed: &[u8], state: &QuantState, out: &mut [T]) -> Result<()> {
    if out.len() != state.elements() {
        return Err(Error::argument(format!(
            "out has {} elements, but shape {:?} has {}",
            out.len(),
            state.shape,
            state.elements()
        )));
    }
    dequantize_4bit_range(packed, state, 0, out)
}

/// Dequantises the `out.len()` elements of the flattened tensor from `start` on: for rows i..j of an [n, k] weight,
/// `start` is i·k and `out` has (j - i)·k elements. Any start will do; multiples of the block size are fastest.
///
/// # Errors
/// As [`dequantize_4bit`]; the range must lie inside the tensor.
pub fn dequantize_4bit_range<T: Element>(
    packed: &[u8],
    state: &QuantState,
    start: usize,
    out: &mut [T],
) -> Result<()> {
    state.check(packed.len())?;
    let elements = state.elements();
    if start > elements || out.len() > elements - start {
        return Err(Error::argument(format!(
            "elements {start}..{} were asked for, but shape {:?} has {elements}",
            start.saturating_add(out.len()),
            state.shape
        )));
    }
    decode(Isa::best(), packed, state, start, out);
    Ok(())
}

pub(super) fn decode<T: Element>(
    isa: Isa,
    packed: &[u8],
    state: &QuantState,
    start: usize,
    out: &mut [T],
) {
    let lut = state.lut();
    let past_caches = size_of_val(out) >= PAST_CACHES;
    // Cut at multiples of CHUNK in the tensor, so that only the first and last task can meet a split block.
    let head = (CHUNK - start % CHUNK).min(out.len());
    let (first, rest) = out.split_at_mut(head);
    let after = start + head;
    let task = |start: usize, out: &mut [T]| {
        decode_chunk(isa, &lut, packed, state, start, out, past_caches);
    };
    if rest.is_empty() {
        task(start, first);
        return;
    }
    let starts = (after..).step_by(CHUNK);
    let tasks = std::iter::once((start, first)).chain(starts.zip(rest.chunks_mut(CHUNK)));
    parallel::for_each(tasks, |(start, out)| task(start, out));
}

/// At most CHUNK elements; both ends may lie inside a block, and the end on an odd element.
fn decode_chunk<T: Element>(
    isa: Isa,
    lut: &[f32; 16],
    packed: &[u8],
    state: &QuantState,
    start: usize,
    out: &mut [T],
    past_caches: bool,
) {
    let blocksize = state.blocksize;
    let end = start + out.len();
    let blocks = start / blocksize..end.div_ceil(blocksize);
    let mut absmax = Vec::with_capacity(blocks.len());
    nested::expand(&state.absmax, blocks, &mut absmax);

    let into = start % blocksize;
    let head = if into == 0 {
        0
    } else {
        (blocksize - into).min(out.len())
    };
    let full = (out.len() - head) / blocksize;
    let (first, rest) = out.split_at_mut(head);
    let (middle, last) = rest.split_at_mut(full * blocksize);
    let mut scales = absmax.as_slice();
    if let (false, [scale, others @ ..]) = (first.is_empty(), scales) {
        portable::dequantize_part(lut, packed, *scale, start, first);
        scales = others;
    }
    let (scales, last_scale) = scales.split_at(full);
    let from = start + head;
    let packed_middle = &packed[from / 2..][..middle.len() / 2];
    isa.dequantize(lut, packed_middle, scales, blocksize, middle, past_caches);
    if let (false, [scale]) = (last.is_empty(), last_scale) {
        portable::dequantize_part(lut, packed, *scale, from + full * blocksize, last);
    }
}
