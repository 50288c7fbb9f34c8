//! f32 values as bf16: rounded, or exactly as sums of three.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use crate::dtype::DType;

/// How many bf16 stand for a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planes {
    /// The nearest one.
    One,
    /// Three whose sum is the f32, of which each is the bf16 nearest to what the ones before leave: 24 bits.
    Three,
}

impl Planes {
    pub const fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Three => 3,
        }
    }
}

/// The nearest bf16, ties to even; subnormal ones become zeros, as which the tile unit takes them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn narrow(values: __m512) -> __m256i {
    // SAFETY: both are 256 bits of any content.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(values)) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub fn widen(values: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values)))
}

/// `values` as f32 of what `dtype` rounds them to.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn round_16(values: __m512, dtype: DType) -> __m512 {
    match dtype {
        DType::F32 => values,
        DType::BF16 => widen(narrow(values)),
        DType::F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<
            { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
        >(values)),
    }
}

/// The parts of 16 values, largest first; those beyond `planes` are zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn parts_of(values: __m512, planes: Planes) -> [__m256i; 3] {
    let first = narrow(values);
    if planes == Planes::One {
        let none = _mm256_setzero_si256();
        return [first, none, none];
    }
    // Both differences are exact.
    let rest = _mm512_sub_ps(values, widen(first));
    let second = narrow(rest);
    let rest = _mm512_sub_ps(rest, widen(second));
    [first, second, narrow(rest)]
}

/// The transpose of 16 by 16 words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub fn transpose(rows: &[__m512i; 16]) -> [__m512i; 16] {
    let mut a = *rows;
    let mut b = *rows;
    // Within 128 bits: words of pairs of rows, then of quadruples.
    for i in 0..8 {
        let i = 2 * i;
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for i in 0..4 {
        let i = 4 * i;
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4q + c] has in lane l the words (4q..4q + 4, column 4l + c): now the lanes.
    for c in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(a[c], a[4 + c]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(a[c], a[4 + c]);
        let even2 = _mm512_shuffle_i32x4::<0x88>(a[8 + c], a[12 + c]);
        let odd2 = _mm512_shuffle_i32x4::<0xdd>(a[8 + c], a[12 + c]);
        b[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        b[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        b[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        b[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
    b
}

/// The transpose of 16 words of each of 16 rows, `stride` words apart, to 16 vectors behind each other, which may be
/// where the rows are.
///
/// # Safety
/// The CPU has the features; both are readable or writable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn transpose_words(from: *const u32, stride: usize, to: *mut u32) {
    let mut rows = [_mm512_setzero_si512(); 16];
    // SAFETY: the caller's.
    unsafe {
        for (i, row) in rows.iter_mut().enumerate() {
            *row = _mm512_loadu_si512(from.add(i * stride).cast());
        }
        let rows = transpose(&rows);
        for (i, row) in rows.iter().enumerate() {
            _mm512_storeu_si512(to.add(16 * i).cast(), *row);
        }
    }
}
