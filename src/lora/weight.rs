//! Frozen weights in the form they are stored in.

use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::Result;
use crate::quant::{Quantized4bit, dequantize_4bit};

/// Elements a thread converts at a time.
const CHUNK: usize = 1 << 15;

/// A frozen weight `[n, k]`, row-major, kept as narrow as it was stored and widened only for the
/// layer at work.
#[derive(Debug, Clone)]
pub enum FrozenWeight {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    FourBit(Quantized4bit),
}

impl FrozenWeight {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::BF16(values) => values.len(),
            Self::FourBit(weight) => weight.state.elements(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes the stored form takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => values.len() * 4,
            Self::F16(values) => values.len() * 2,
            Self::BF16(values) => values.len() * 2,
            Self::FourBit(weight) => weight.state.bytes(),
        }
    }

    /// Writes the weight as f32 into `out` of [`Self::len`] elements; exact for the dense forms,
    /// bitsandbytes' dequantised value (in f32) for the 4-bit one.
    pub fn widen_into(&self, out: &mut [f32]) -> Result<()> {
        match self {
            Self::F32(values) => convert(values, out, |value| value),
            Self::F16(values) => convert(values, out, f16::to_f32),
            Self::BF16(values) => convert(values, out, bf16::to_f32),
            Self::FourBit(weight) => dequantize_4bit(&weight.packed, &weight.state, out)?,
        }
        Ok(())
    }
}

fn convert<T: Copy + Sync>(values: &[T], out: &mut [f32], widen: impl Fn(T) -> f32 + Sync) {
    out.par_chunks_mut(CHUNK)
        .zip(values.par_chunks(CHUNK))
        .for_each(|(out, values)| {
            crate::simd::vectorized(|| {
                for (out, &value) in out.iter_mut().zip(values) {
                    *out = widen(value);
                }
            });
        });
}
