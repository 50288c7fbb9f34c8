//! 4-bit weights as f32, in vectors (AVX2).

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::weight::FourBit;
use crate::dtype::DType;

impl FourBit<'_> {
    /// Elements `start..start + len` in f32, `group` elements from each 16 to the next; with `narrow` as bf16 has them.
    ///
    /// # Safety
    /// The CPU has the features, the matrix the elements, and `out` room for them. Where groups are not next to each
    /// other, `start` and `len` are multiples of 16.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn decode_f32(
        &self,
        start: usize,
        len: usize,
        narrow: bool,
        out: *mut f32,
        group: usize,
    ) {
        let end = start + len;
        let shift = self.blocksize.trailing_zeros();
        let mut from = start;
        // SAFETY: elements from..until are in the matrix and in `out`; a step is 16 of them.
        unsafe {
            let lower = _mm256_loadu_ps(self.values.as_ptr());
            let upper = _mm256_loadu_ps(self.values.as_ptr().add(8));
            while from < end {
                let block = from >> shift;
                let until = end.min((block + 1) << shift);
                let scale = _mm256_set1_ps(self.scales.get(block));
                let tables = [lower, upper].map(|values| {
                    let scaled = round(_mm256_mul_ps(values, scale), self.dtype);
                    if narrow {
                        round(scaled, DType::BF16)
                    } else {
                        scaled
                    }
                });
                if from.is_multiple_of(2) {
                    let steps = (until - from) / 16;
                    let mut source = self.packed.as_ptr().add(from / 2);
                    let mut target = out.add((from - start) / 16 * group + (from - start) % 16);
                    for _ in 0..steps {
                        let bytes = _mm_loadl_epi64(source.cast());
                        _mm256_storeu_ps(target, look_up(bytes, tables));
                        _mm256_storeu_ps(
                            target.add(8),
                            look_up(_mm_srli_si128::<4>(bytes), tables),
                        );
                        source = source.add(8);
                        target = target.add(group);
                    }
                    from += 16 * steps;
                }
                if from < until {
                    let mut table = [0.0_f32; 16];
                    _mm256_storeu_ps(table.as_mut_ptr(), tables[0]);
                    _mm256_storeu_ps(table.as_mut_ptr().add(8), tables[1]);
                    for element in from..until {
                        let byte = self.packed[element / 2];
                        let code = byte >> (4 * ((element + 1) % 2)) & 15;
                        *out.add((element - start) / 16 * group + (element - start) % 16) =
                            table[usize::from(code)];
                    }
                }
                from = until;
            }
        }
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
