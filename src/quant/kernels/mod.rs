//! The inner loops, over whole blocks, once for each instruction set. All are bit-equal to [`portable`].

pub(super) mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::codebook::Codebook;
use super::element::Element;

/// The smallest divisor: absmax below it (a block of zeros) are scaled as if they were this.
pub(super) const MIN_SCALE: f32 = 1e-38;

/// Instruction set a loop is written for. Only [`Isa::available`] ones are ever constructed outside tests of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The fastest one this CPU has.
    pub(super) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Self::Avx512;
            }
            if has_avx2() {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Every one this CPU has.
    #[cfg(test)]
    pub(super) fn available() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(has_avx2().then_some(Self::Avx2));
            all.extend(has_avx512().then_some(Self::Avx512));
        }
        all
    }

    /// Codes and absmax of whole blocks. A block with a NaN or an infinity gets an absmax that is not finite, and
    /// unspecified codes. Slices are of b·blocksize, b·blocksize / 2 and b elements.
    pub(super) fn quantize<T: Element>(
        self,
        values: &[T],
        book: &Codebook,
        blocksize: usize,
        packed: &mut [u8],
        absmax: &mut [f32],
    ) {
        assert!(
            values.len() == absmax.len() * blocksize && packed.len() * 2 == values.len(),
            "whole blocks"
        );
        match self {
            Self::Portable => portable::quantize(values, book, blocksize, packed, absmax),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::quantize(values, book, blocksize, packed, absmax),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::quantize(values, book, blocksize, packed, absmax),
        }
    }

    /// Values of whole blocks: `round(lut[code] * absmax)`. Slices are of b·blocksize / 2, b and b·blocksize elements.
    /// `past_caches`: stores go to memory without a read of what they overwrite, where `out` starts on 64 bytes.
    pub(super) fn dequantize<T: Element>(
        self,
        lut: &[f32; 16],
        packed: &[u8],
        absmax: &[f32],
        blocksize: usize,
        out: &mut [T],
        past_caches: bool,
    ) {
        assert!(
            out.len() == absmax.len() * blocksize && packed.len() * 2 == out.len(),
            "whole blocks"
        );
        #[cfg(target_arch = "x86_64")]
        let stream = past_caches && out.as_ptr().addr().is_multiple_of(64);
        #[cfg(not(target_arch = "x86_64"))]
        let _ = past_caches;
        match self {
            Self::Portable => portable::dequantize(lut, packed, absmax, blocksize, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::dequantize(lut, packed, absmax, blocksize, out, stream),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::dequantize(lut, packed, absmax, blocksize, out, stream),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}
