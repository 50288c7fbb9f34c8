//! 4-bit weights as f32, in vectors.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::weight::FourBit;
use crate::dtype::DType;

/// [`FourBit::decode_f32`] of one width of vectors: `$steps` decodes 16 elements at a time.
macro_rules! decoder {
    ($name:ident, $features:literal, $steps:ident) => {
        /// # Safety
        /// As [`FourBit::decode_f32`].
        #[target_feature(enable = $features)]
        unsafe fn $name(
            &self,
            start: usize,
            len: usize,
            narrow: bool,
            out: *mut f32,
            group: usize,
        ) {
            let end = start + len;
            let shift = self.blocksize.trailing_zeros();
            let place = |from: usize| (from - start) / 16 * group + (from - start) % 16;
            let mut from = start;
            // SAFETY: elements from..until are in the matrix and in `out`; a step is 16 of them.
            unsafe {
                let lower = _mm256_loadu_ps(self.values.as_ptr());
                let upper = _mm256_loadu_ps(self.values.as_ptr().add(8));
                while from < end {
                    let block = from >> shift;
                    let until = end.min((block + 1) << shift);
                    let scale = _mm256_set1_ps(self.scales.get(block));
                    let tables = [
                        self.scaled(lower, scale, narrow),
                        self.scaled(upper, scale, narrow),
                    ];
                    if from.is_multiple_of(2) {
                        let steps = (until - from) / 16;
                        let source = self.packed.as_ptr().add(from / 2);
                        $steps(source, steps, tables, out.add(place(from)), group);
                        from += 16 * steps;
                    }
                    if from < until {
                        let mut table = [0.0_f32; 16];
                        _mm256_storeu_ps(table.as_mut_ptr(), tables[0]);
                        _mm256_storeu_ps(table.as_mut_ptr().add(8), tables[1]);
                        for element in from..until {
                            let byte = self.packed[element / 2];
                            let code = byte >> (4 * ((element + 1) % 2)) & 15;
                            *out.add(place(element)) = table[usize::from(code)];
                        }
                    }
                    from = until;
                }
            }
        }
    };
}

impl FourBit<'_> {
    /// Elements `start..start + len` in f32, `group` elements from each 16 to the next; with `narrow` as bf16 has them.
    ///
    /// # Safety
    /// The CPU has the features, with `wide` AVX-512's, the matrix the elements, and `out` room for them. Where groups
    /// are not next to each other, `start` and `len` are multiples of 16.
    #[inline]
    pub unsafe fn decode_f32(
        &self,
        start: usize,
        len: usize,
        narrow: bool,
        wide: bool,
        out: *mut f32,
        group: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            if wide {
                self.decode_wide(start, len, narrow, out, group);
            } else {
                self.decode_narrow(start, len, narrow, out, group);
            }
        }
    }

    decoder!(decode_narrow, "avx2,fma,f16c", steps_narrow);
    decoder!(decode_wide, "avx2,fma,f16c,avx512f", steps_wide);

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn scaled(&self, values: __m256, scale: __m256, narrow: bool) -> __m256 {
        let scaled = round(_mm256_mul_ps(values, scale), self.dtype);
        if narrow {
            round(scaled, DType::BF16)
        } else {
            scaled
        }
    }
}

/// Values of 16 codes at a time, `group` elements from each 16 to the next.
///
/// # Safety
/// `source` has 8 bytes a step, `target` room.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn steps_narrow(
    mut source: *const u8,
    steps: usize,
    tables: [__m256; 2],
    mut target: *mut f32,
    group: usize,
) {
    for _ in 0..steps {
        // SAFETY: the caller's; the addresses after the last step are not read.
        unsafe {
            let bytes = _mm_loadl_epi64(source.cast());
            _mm256_storeu_ps(target, look_up(bytes, tables));
            let upper = _mm_srli_si128::<4>(bytes);
            _mm256_storeu_ps(target.add(8), look_up(upper, tables));
        }
        source = source.wrapping_add(8);
        target = target.wrapping_add(group);
    }
}

/// As [`steps_narrow`], a step a vector.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn steps_wide(
    mut source: *const u8,
    steps: usize,
    [lower, upper]: [__m256; 2],
    mut target: *mut f32,
    group: usize,
) {
    let lower = _mm512_castpd256_pd512(_mm256_castps_pd(lower));
    let table = _mm512_castpd_ps(_mm512_insertf64x4::<1>(lower, _mm256_castps_pd(upper)));
    for _ in 0..steps {
        // SAFETY: the caller's.
        unsafe {
            // Byte to two dwords, of each of which the permutation reads the low four bits.
            let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(source.cast()));
            let codes = _mm512_or_si512(
                _mm512_srli_epi64::<4>(bytes),
                _mm512_slli_epi64::<32>(bytes),
            );
            _mm512_storeu_ps(target, _mm512_permutexvar_ps(codes, table));
        }
        source = source.wrapping_add(8);
        target = target.wrapping_add(group);
    }
}

/// The values of 8 codes, in the first 4 bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(bytes: __m128i, [lower, upper]: [__m256; 2]) -> __m256 {
    let bytes = _mm256_cvtepu8_epi64(bytes);
    // Byte to two dwords; the permutations read the low three bits of each, and bit 3 picks the half.
    let codes = _mm256_or_si256(
        _mm256_srli_epi64::<4>(bytes),
        _mm256_slli_epi64::<32>(bytes),
    );
    let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
    _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(lower, codes),
        _mm256_permutevar8x32_ps(upper, codes),
        half,
    )
}

/// `values` as f32 of what `dtype` rounds them to, ties to even.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn round(values: __m256, dtype: DType) -> __m256 {
    match dtype {
        DType::F32 => values,
        DType::F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values)),
        DType::BF16 => {
            let bits = _mm256_castps_si256(values);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_and_si256(
                _mm256_add_epi32(bits, up),
                _mm256_set1_epi32(0xffff_0000_u32.cast_signed()),
            );
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
            _mm256_blendv_ps(_mm256_castsi256_ps(rounded), values, nan)
        }
    }
}
