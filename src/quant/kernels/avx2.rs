//! The loops for AVX2 with F16C: eight values a step; 16-bit results are looked up as two bytes each.

#[allow(clippy::wildcard_imports)] // half a hundred intrinsics
use std::arch::x86_64::*;

use super::MIN_SCALE;
use crate::dtype::DType;
use crate::quant::codebook::Codebook;
use crate::quant::element::Element;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

pub(super) fn quantize<T: Element>(
    values: &[T],
    book: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let from = values.as_ptr().cast();
    // SAFETY: `Isa::quantize` checked the lengths, and this path is only taken on CPUs with AVX2 and F16C.
    unsafe {
        match T::DTYPE {
            DType::F32 => quantize_blocks::<F32>(from, book, blocksize, packed, absmax),
            DType::F16 => quantize_blocks::<F16>(from, book, blocksize, packed, absmax),
            DType::BF16 => quantize_blocks::<BF16>(from, book, blocksize, packed, absmax),
        }
    }
}

pub(super) fn dequantize<T: Element>(
    lut: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    blocksize: usize,
    out: &mut [T],
    stream: bool,
) {
    let to = out.as_mut_ptr().cast();
    // SAFETY: `Isa::dequantize` checked the lengths and, for `stream`, the alignment; this path is only taken on CPUs
    // with AVX2 and F16C.
    unsafe {
        if stream {
            dequantize_blocks::<true>(T::DTYPE, lut, packed, absmax, blocksize, to);
            _mm_sfence(); // before other threads read
        } else {
            dequantize_blocks::<false>(T::DTYPE, lut, packed, absmax, blocksize, to);
        }
    }
}

/// # Safety
/// As `dequantize_f32`, with elements of `dtype`.
unsafe fn dequantize_blocks<const STREAM: bool>(
    dtype: DType,
    lut: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    blocksize: usize,
    to: *mut u8,
) {
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            DType::F32 => dequantize_f32::<STREAM>(lut, packed, absmax, blocksize, to.cast()),
            DType::F16 => dequantize_16::<F16, STREAM>(lut, packed, absmax, blocksize, to.cast()),
            DType::BF16 => dequantize_16::<BF16, STREAM>(lut, packed, absmax, blocksize, to.cast()),
        }
    }
}

/// Elements 8·i.. as f32.
///
/// # Safety
/// `from` holds 8·(i + 1) elements of the type `KIND`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load<const KIND: u8>(from: *const u8, i: usize) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        match KIND {
            F32 => _mm256_loadu_ps(from.add(32 * i).cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.add(16 * i).cast())),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(16 * i).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}

/// # Safety
/// The CPU has the features; `from` holds `absmax.len() * blocksize` elements of the type `KIND`, `packed` half as
/// many bytes; `blocksize` is a multiple of 32.
#[target_feature(enable = "avx2,f16c")]
unsafe fn quantize_blocks<const KIND: u8>(
    mut from: *const u8,
    book: &Codebook,
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let size = if KIND == F32 { 4 } else { 2 };
    let mut to = packed.as_mut_ptr();
    // SAFETY: the tables have 16 entries; every load and store below is inside the caller's slices.
    unsafe {
        let upper = _mm256_loadu_ps(book.tree.as_ptr());
        let leaves = _mm256_loadu_ps(book.tree.as_ptr().add(8));
        let order = _mm_loadu_si128(book.order.as_ptr().cast());
        let magnitude = _mm256_set1_epi32(0x7fff_ffff);
        for max in absmax {
            let mut most = _mm256_setzero_si256();
            for i in 0..blocksize / 8 {
                let bits = _mm256_castps_si256(load::<KIND>(from, i));
                most = _mm256_max_epu32(most, _mm256_and_si256(bits, magnitude));
            }
            let mut lanes = [0_u32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), most);
            *max = f32::from_bits(lanes.into_iter().fold(0, u32::max));
            let inverse = _mm256_set1_ps(1.0 / max.max(MIN_SCALE));
            for i in 0..blocksize / 16 {
                let low = _mm256_mul_ps(load::<KIND>(from, 2 * i), inverse);
                let high = _mm256_mul_ps(load::<KIND>(from, 2 * i + 1), inverse);
                let words =
                    _mm256_packs_epi32(ranks(low, upper, leaves), ranks(high, upper, leaves));
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                let ranks = _mm_packus_epi16(
                    _mm256_castsi256_si128(words),
                    _mm256_extracti128_si256::<1>(words),
                );
                let codes = _mm_shuffle_epi8(order, ranks);
                // First of a pair times 16 plus second: pairs of bytes become words, and words bytes.
                let words = _mm_maddubs_epi16(codes, _mm_set1_epi16(0x0110));
                _mm_storel_epi64(to.cast(), _mm_packus_epi16(words, words));
                to = to.add(8);
            }
            from = from.add(blocksize * size);
        }
    }
}

/// 16 + rank of the nearest value of the codebook, a dword each. The permutation reads the low three bits of an index:
/// slots 1..8 of the tree are in `upper`, 8..16 in `leaves`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn ranks(x: __m256, upper: __m256, leaves: __m256) -> __m256i {
    let mut i = _mm256_set1_epi32(1);
    for table in [upper, upper, upper, leaves] {
        let above = _mm256_cmp_ps::<_CMP_GT_OQ>(x, _mm256_permutevar8x32_ps(table, i));
        i = _mm256_sub_epi32(_mm256_add_epi32(i, i), _mm256_castps_si256(above));
    }
    i
}

/// # Safety
/// 32 bytes at `to` may be written; with `STREAM` they are aligned.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<const STREAM: bool>(to: *mut __m256i, values: __m256i) {
    // SAFETY: the caller's.
    unsafe {
        if STREAM {
            _mm256_stream_si256(to, values);
        } else {
            _mm256_storeu_si256(to, values);
        }
    }
}

/// # Safety
/// The CPU has the features; `packed` holds `absmax.len() * blocksize / 2` bytes and `to` twice as many elements;
/// `blocksize` is a multiple of 32. `STREAM`: `to` starts on 32 bytes, and stores go past the caches.
#[target_feature(enable = "avx2,f16c")]
unsafe fn dequantize_f32<const STREAM: bool>(
    lut: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    blocksize: usize,
    mut to: *mut f32,
) {
    let mut from = packed.as_ptr();
    // SAFETY: the table has 16 entries; every load and store below is inside the caller's slices.
    unsafe {
        let lower = _mm256_loadu_ps(lut.as_ptr());
        let upper = _mm256_loadu_ps(lut.as_ptr().add(8));
        for scale in absmax {
            let scale = _mm256_set1_ps(*scale);
            let lower = _mm256_mul_ps(lower, scale);
            let upper = _mm256_mul_ps(upper, scale);
            for _ in 0..blocksize / 8 {
                let bytes = _mm_cvtsi32_si128(from.cast::<i32>().read_unaligned());
                let bytes = _mm256_cvtepu8_epi64(bytes);
                // Byte to two dwords; the permutations read the low three bits of each, and bit 3 picks the half.
                let codes = _mm256_or_si256(
                    _mm256_srli_epi64::<4>(bytes),
                    _mm256_slli_epi64::<32>(bytes),
                );
                let half = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                let values = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(lower, codes),
                    _mm256_permutevar8x32_ps(upper, codes),
                    half,
                );
                store::<STREAM>(to.cast(), _mm256_castps_si256(values));
                from = from.add(4);
                to = to.add(8);
            }
        }
    }
}

/// # Safety
/// As `dequantize_f32`, with 16-bit elements of the type `KIND`.
#[target_feature(enable = "avx2,f16c")]
unsafe fn dequantize_16<const KIND: u8, const STREAM: bool>(
    lut: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    blocksize: usize,
    mut to: *mut u16,
) {
    let mut from = packed.as_ptr();
    // SAFETY: the table has 16 entries; every load and store below is inside the caller's slices.
    unsafe {
        let lower = _mm256_loadu_ps(lut.as_ptr());
        let upper = _mm256_loadu_ps(lut.as_ptr().add(8));
        let nibble = _mm_set1_epi8(15);
        let byte = _mm_set1_epi16(255);
        for scale in absmax {
            let scale = _mm256_set1_ps(*scale);
            let a = round::<KIND>(_mm256_mul_ps(lower, scale));
            let b = round::<KIND>(_mm256_mul_ps(upper, scale));
            let low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
            let high = _mm_packus_epi16(_mm_srli_epi16::<8>(a), _mm_srli_epi16::<8>(b));
            for _ in 0..blocksize / 32 {
                let bytes = _mm_loadu_si128(from.cast());
                let first = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
                let second = _mm_and_si128(bytes, nibble);
                for (half, codes) in [
                    _mm_unpacklo_epi8(first, second),
                    _mm_unpackhi_epi8(first, second),
                ]
                .into_iter()
                .enumerate()
                {
                    let l = _mm_shuffle_epi8(low, codes);
                    let h = _mm_shuffle_epi8(high, codes);
                    let to = to.add(16 * half);
                    let values = _mm256_set_m128i(_mm_unpackhi_epi8(l, h), _mm_unpacklo_epi8(l, h));
                    store::<STREAM>(to.cast(), values);
                }
                from = from.add(16);
                to = to.add(32);
            }
        }
    }
}

/// Nearest even; a NaN keeps its top bits and is made quiet.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn round<const KIND: u8>(values: __m256) -> __m128i {
    if KIND == F16 {
        return _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
    }
    let bits = _mm256_castps_si256(values);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
    let result = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    let result = _mm256_srli_epi32::<16>(result);
    _mm_packus_epi32(
        _mm256_castsi256_si128(result),
        _mm256_extracti128_si256::<1>(result),
    )
}
