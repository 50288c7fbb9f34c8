//! The loops for AVX-512 F and BW: sixteen values a step, codes looked up in a register.

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
    // SAFETY: `Isa::quantize` checked the lengths, and this path is only taken on CPUs with AVX-512 F and BW.
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
    // with AVX-512 F and BW.
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

/// Elements 16·i.. as f32.
///
/// # Safety
/// `from` holds 16·(i + 1) elements of the type `KIND`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load<const KIND: u8>(from: *const u8, i: usize) -> __m512 {
    // SAFETY: the caller's.
    unsafe {
        match KIND {
            F32 => _mm512_loadu_ps(from.add(64 * i).cast()),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.add(32 * i).cast())),
            _ => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.add(32 * i).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }
}

/// # Safety
/// The CPU has the features; `from` holds `absmax.len() * blocksize` elements of the type `KIND`, `packed` half as
/// many bytes; `blocksize` is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw")]
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
        let tree = _mm512_loadu_ps(book.tree.as_ptr());
        let order = _mm256_broadcastsi128_si256(_mm_loadu_si128(book.order.as_ptr().cast()));
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        for max in absmax {
            let mut most = _mm512_setzero_si512();
            for i in 0..blocksize / 16 {
                let bits = _mm512_castps_si512(load::<KIND>(from, i));
                most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
            }
            *max = f32::from_bits(_mm512_reduce_max_epu32(most));
            let inverse = _mm512_set1_ps(1.0 / max.max(MIN_SCALE));
            for i in 0..blocksize / 32 {
                let low = ranks(_mm512_mul_ps(load::<KIND>(from, 2 * i), inverse), tree);
                let high = ranks(_mm512_mul_ps(load::<KIND>(from, 2 * i + 1), inverse), tree);
                let codes = _mm256_shuffle_epi8(order, _mm256_set_m128i(high, low));
                // First of a pair times 16 plus second: pairs of bytes become words, and words bytes.
                let words = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
                let bytes = _mm512_castsi512_si256(_mm512_zextsi256_si512(words));
                let bytes = _mm256_packus_epi16(bytes, bytes);
                let bytes = _mm256_permute4x64_epi64::<0b10_00>(bytes);
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(bytes));
                to = to.add(16);
            }
            from = from.add(blocksize * size);
        }
    }
}

/// 16 + rank of the nearest value of the codebook, a byte each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn ranks(x: __m512, tree: __m512) -> __m128i {
    let one = _mm512_set1_epi32(1);
    let mut i = one;
    for _ in 0..4 {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_permutexvar_ps(i, tree));
        let twice = _mm512_add_epi32(i, i);
        i = _mm512_mask_add_epi32(twice, above, twice, one);
    }
    // 16..32, of which the byte shuffle reads the low four bits: the rank.
    _mm512_cvtepi32_epi8(i)
}

/// # Safety
/// 64 bytes at `to` may be written; with `STREAM` they are aligned.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn store<const STREAM: bool>(to: *mut __m512i, values: __m512i) {
    // SAFETY: the caller's.
    unsafe {
        if STREAM {
            _mm512_stream_si512(to, values);
        } else {
            _mm512_storeu_si512(to, values);
        }
    }
}

/// # Safety
/// The CPU has the features; `packed` holds `absmax.len() * blocksize / 2` bytes and `to` twice as many elements;
/// `blocksize` is a multiple of 32. `STREAM`: `to` starts on 64 bytes, and stores go past the caches.
#[target_feature(enable = "avx512f,avx512bw")]
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
        let lut = _mm512_loadu_ps(lut.as_ptr());
        for scale in absmax {
            let values = _mm512_mul_ps(lut, _mm512_set1_ps(*scale));
            for _ in 0..blocksize / 16 {
                let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(from.cast()));
                // Byte to two dwords; the permutation reads the low four bits of each.
                let codes = _mm512_or_si512(
                    _mm512_srli_epi64::<4>(bytes),
                    _mm512_slli_epi64::<32>(bytes),
                );
                store::<STREAM>(
                    to.cast(),
                    _mm512_castps_si512(_mm512_permutexvar_ps(codes, values)),
                );
                from = from.add(8);
                to = to.add(16);
            }
        }
    }
}

/// # Safety
/// As `dequantize_f32`, with 16-bit elements of the type `KIND`.
#[target_feature(enable = "avx512f,avx512bw")]
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
        let lut = _mm512_loadu_ps(lut.as_ptr());
        for scale in absmax {
            let values = _mm512_mul_ps(lut, _mm512_set1_ps(*scale));
            let values = if KIND == F16 {
                _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(values)
            } else {
                round_bf16(values)
            };
            // The table twice: the permutation reads five bits, of which the fifth is not the code's.
            let values = _mm512_broadcast_i64x4(values);
            for _ in 0..blocksize / 32 {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                let codes = _mm512_or_si512(
                    _mm512_srli_epi32::<4>(bytes),
                    _mm512_slli_epi32::<16>(bytes),
                );
                store::<STREAM>(to.cast(), _mm512_permutexvar_epi16(codes, values));
                from = from.add(16);
                to = to.add(32);
            }
        }
    }
}

/// Nearest even; a NaN keeps its top bits and is made quiet.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn round_bf16(values: __m512) -> __m256i {
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
    let result = _mm512_mask_mov_epi32(rounded, nan, quiet);
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(result))
}
