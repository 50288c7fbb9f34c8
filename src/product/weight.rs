//! 4-bit weights as the product reads them: where they lie, row by row, in parts of bf16.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::parts::{Planes, parts_of, round_16};
use crate::dtype::DType;

/// The blocks' absmax, as [`crate::quant::Absmax`] describes them.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    Plain(&'a [f32]),
    Nested {
        codes: &'a [u8],
        absmax: &'a [f32],
        code: &'a [f32],
        offset: f32,
        /// A power of two.
        blocksize: usize,
    },
}

impl Scales<'_> {
    /// Two roundings, never fused.
    #[inline(always)]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Nested {
                codes,
                absmax,
                code,
                offset,
                blocksize,
            } => {
                code[usize::from(codes[block])] * absmax[block >> blocksize.trailing_zeros()]
                    + offset
            }
        }
    }
}

/// A matrix in bitsandbytes' 4-bit format, flattened row-major.
#[derive(Debug, Clone, Copy)]
pub struct FourBit<'a> {
    pub packed: &'a [u8],
    pub scales: Scales<'a>,
    /// Value of each code before scaling.
    pub values: &'a [f32; 16],
    /// A power of two, at least 32.
    pub blocksize: usize,
    /// What was quantised: values are rounded to it first.
    pub dtype: DType,
}

/// Where decoded values go: vector i of 32, in plane p, to `start + i·vector + p·plane` elements.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub start: *mut u16,
    pub vector: usize,
    pub plane: usize,
}

impl Target {
    fn at(&self, element: usize, plane: usize) -> *mut u16 {
        let place = element / 32 * self.vector + element % 32 + plane * self.plane;
        self.start.wrapping_add(place)
    }
}

impl FourBit<'_> {
    /// Elements `start..start + len` in parts of bf16. Returns the bits of the largest magnitude of their blocks.
    ///
    /// Where vectors are not next to each other, `start` and `len` are multiples of 32.
    ///
    /// # Safety
    /// The CPU has the features, the matrix the elements, and `to` room for them.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
    pub unsafe fn decode(&self, start: usize, len: usize, planes: Planes, to: Target) -> u32 {
        // SAFETY: the caller's.
        unsafe {
            match planes {
                Planes::One => self.decode_in::<1>(start, len, planes, to),
                Planes::Three => self.decode_in::<3>(start, len, planes, to),
            }
        }
    }

    /// # Safety
    /// As `decode`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
    unsafe fn decode_in<const PLANES: usize>(
        &self,
        start: usize,
        len: usize,
        planes: Planes,
        to: Target,
    ) -> u32 {
        let end = start + len;
        let shift = self.blocksize.trailing_zeros();
        let mut from = start;
        let mut most = 0;
        // SAFETY: elements from..to are in the matrix and in `to`; a vector is 32 of them, or masked.
        unsafe {
            let values = _mm512_loadu_ps(self.values.as_ptr());
            // Of a byte in a double word: its high half to the first word, all of it to the second.
            let nibbles = _mm512_set1_epi64(0x3020_3824_1000_1804);
            while from < end {
                let block = from >> shift;
                let until = end.min((block + 1) << shift);
                let scale = self.scales.get(block);
                most = most.max(scale.to_bits() & 0x7fff_ffff);
                let tables = self.tables(values, scale, planes);
                if from.is_multiple_of(2) {
                    let vectors = (until - from) / 32;
                    let mut source = self.packed.as_ptr().add(from / 2);
                    let mut target = to.at(from - start, 0);
                    // The table twice: the permutation reads five bits, of which the fifth is not the code's.
                    let mut twice = [_mm512_setzero_si512(); PLANES];
                    for (twice, table) in twice.iter_mut().zip(tables) {
                        *twice = _mm512_broadcast_i64x4(table);
                    }
                    for _ in 0..vectors {
                        let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(source.cast()));
                        let codes = _mm512_multishift_epi64_epi8(nibbles, bytes);
                        for (p, table) in twice.iter().enumerate() {
                            let found = _mm512_permutexvar_epi16(codes, *table);
                            _mm512_storeu_si512(target.add(p * to.plane).cast(), found);
                        }
                        source = source.add(16);
                        target = target.add(to.vector);
                    }
                    from += 32 * vectors;
                }
                if from < until {
                    let mut small = [[0_u16; 16]; PLANES];
                    for (small, table) in small.iter_mut().zip(tables) {
                        _mm256_storeu_si256(small.as_mut_ptr().cast(), table);
                    }
                    for element in from..until {
                        let byte = self.packed[element / 2];
                        let code = byte >> (4 * ((element + 1) % 2)) & 15;
                        for (p, small) in small.iter().enumerate() {
                            *to.at(element - start, p) = small[usize::from(code)];
                        }
                    }
                }
                from = until;
            }
        }
        most
    }

    /// `len` elements from each of two places on, side by side: vector i, of the 16 pairs from 16·i on, goes where
    /// `to` says. Starts and `len` are multiples of 32. Returns the bits of the largest magnitude of their blocks.
    ///
    /// # Safety
    /// As `decode`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
    pub unsafe fn decode_pair(
        &self,
        starts: [usize; 2],
        len: usize,
        planes: Planes,
        to: Target,
    ) -> u32 {
        // SAFETY: the caller's.
        unsafe {
            match planes {
                Planes::One => self.decode_pair_in::<1>(starts, len, planes, to),
                Planes::Three => self.decode_pair_in::<3>(starts, len, planes, to),
            }
        }
    }

    /// # Safety
    /// As `decode_pair`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
    unsafe fn decode_pair_in<const PLANES: usize>(
        &self,
        starts: [usize; 2],
        len: usize,
        planes: Planes,
        to: Target,
    ) -> u32 {
        let shift = self.blocksize.trailing_zeros();
        let mut blocks = [usize::MAX; 2];
        let mut tables = [_mm512_setzero_si512(); PLANES];
        let mut most = 0;
        // SAFETY: as in `decode`.
        unsafe {
            let values = _mm512_loadu_ps(self.values.as_ptr());
            // Of a byte of each place in a quadruple word: the high halves to its first words, the low ones to the others.
            let nibbles = _mm512_set1_epi64(0x1808_1800_180c_1804);
            let low = _mm512_set1_epi16(15);
            let second = _mm512_set1_epi32(16 << 16);
            for at in (0..len).step_by(32) {
                for half in 0..2 {
                    let block = (starts[half] + at) >> shift;
                    if block != blocks[half] {
                        blocks[half] = block;
                        let scale = self.scales.get(block);
                        most = most.max(scale.to_bits() & 0x7fff_ffff);
                        let found = self.tables(values, scale, planes);
                        for (table, found) in tables.iter_mut().zip(found) {
                            *table = if half == 0 {
                                _mm512_inserti64x4::<0>(*table, found)
                            } else {
                                _mm512_inserti64x4::<1>(*table, found)
                            };
                        }
                    }
                }
                let source = self.packed.as_ptr();
                let even = _mm_loadu_si128(source.add(starts[0] / 2 + at / 2).cast());
                let odd = _mm_loadu_si128(source.add(starts[1] / 2 + at / 2).cast());
                let pairs = [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)];
                for (i, pairs) in pairs.iter().enumerate() {
                    let pairs = _mm512_cvtepu16_epi64(*pairs);
                    let codes = _mm512_multishift_epi64_epi8(nibbles, pairs);
                    // (codes & low) | second
                    let codes = _mm512_ternarylogic_epi32::<0xea>(codes, low, second);
                    let target = to.start.wrapping_add((at / 16 + i) * to.vector);
                    for (p, table) in tables.iter().enumerate() {
                        let found = _mm512_permutexvar_epi16(codes, *table);
                        _mm512_storeu_si512(target.wrapping_add(p * to.plane).cast(), found);
                    }
                }
            }
        }
        most
    }

    /// What the codes of a block stand for, in parts.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn tables(&self, values: __m512, scale: f32, planes: Planes) -> [__m256i; 3] {
        let mut scaled = _mm512_mul_ps(values, _mm512_set1_ps(scale));
        if planes == Planes::Three || self.dtype == DType::F16 {
            scaled = round_16(scaled, self.dtype); // else the part is rounded so
        }
        parts_of(scaled, planes)
    }
}
