//! Both sides of a product in f32 vectors, in the order in which its inner loop reads them.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::micro::{COLUMNS, PITCH};
use super::parts::transpose_words;
use super::tiles::{AHEAD, Dense, Source};

/// The most inner elements, or columns, that [`Right::pack`] takes at a time.
const MOST: usize = 256;

/// From one line of rows to be transposed to the next: no multiple of what the cache takes for the same place.
const LINE: usize = MOST + 8;

/// From one [`COLUMNS`] of a packed panel to the next, as those are.
pub const STRIDE: usize = MOST * COLUMNS + 16;

/// The activations: `[m, inner]`.
pub struct Left<'a> {
    pub values: Dense<'a>,
    pub inner: usize,
}

impl Left<'_> {
    /// Inner elements `from..from + len` of `rows`, [`PITCH`] apart.
    ///
    /// # Safety
    /// The CPU has the features; `out` has the rows' words.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn pack(
        &self,
        rows: std::ops::Range<usize>,
        from: usize,
        len: usize,
        out: *mut f32,
    ) {
        for (i, row) in rows.enumerate() {
            let values = row * self.inner + from..row * self.inner + from + len;
            // SAFETY: the caller's.
            unsafe {
                let out = out.add(i * PITCH);
                match self.values {
                    Dense::F32(all) => out.copy_from_nonoverlapping(all[values].as_ptr(), len),
                    Dense::Bf16(all) => widen(&all[values], out),
                }
            }
        }
    }

    /// As [`Self::pack`], of bf16, as pairs along the inner dimension, zeros up to whole steps of 32 elements.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn pack_pairs(
        &self,
        rows: std::ops::Range<usize>,
        from: usize,
        len: usize,
        out: *mut f32,
    ) {
        let Dense::Bf16(values) = self.values else {
            unreachable!("pairs are bf16");
        };
        for (i, row) in rows.enumerate() {
            let row = &values[row * self.inner + from..][..len];
            // SAFETY: the caller's.
            unsafe {
                let out = out.add(i * PITCH).cast::<u16>();
                out.copy_from_nonoverlapping(row.as_ptr(), len);
                out.add(len).write_bytes(0, len.next_multiple_of(32) - len);
            }
        }
    }
}

/// The weight, or the matrix of a LoRA term, `[inner, columns]` or the transpose of what lies in memory.
pub struct Right<'a> {
    pub source: Source<'a>,
    /// `[columns, inner]` lies in memory.
    pub transposed: bool,
    pub inner: usize,
    pub columns: usize,
    /// A weight's values are rounded to bf16 as activations are.
    pub narrow: bool,
    /// The CPU has vectors of 512 bits.
    pub wide: bool,
}

impl Right<'_> {
    /// Elements that [`Self::pack`] needs for lines.
    pub const LINES: usize = COLUMNS * LINE;

    /// Inner elements `from..from + len` of the columns `panel`, [`COLUMNS`] of them as `[len][COLUMNS]`, behind each
    /// other; columns that are missing are zeros.
    ///
    /// # Safety
    /// The CPU has the features; `len` and the panel's width are at most `MOST`; `out` has their elements, the width
    /// rounded up, and `lines` has [`Self::LINES`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn pack(
        &self,
        from: usize,
        len: usize,
        panel: std::ops::Range<usize>,
        out: *mut f32,
        lines: *mut f32,
    ) {
        debug_assert!(len <= MOST && panel.len() <= MOST);
        if self.transposed {
            let start = |row: usize| (panel.start + row) * self.inner + from;
            (0..AHEAD).for_each(|row| self.source.fetch(start(row), len));
        } else {
            let start = |row: usize| (from + row) * self.columns + panel.start;
            (0..AHEAD).for_each(|row| self.source.fetch(start(row), panel.len()));
        }
        // SAFETY: the caller's.
        unsafe {
            if self.transposed {
                for column in panel.clone().step_by(COLUMNS) {
                    let out = out.add((column - panel.start) / COLUMNS * STRIDE);
                    for i in 0..COLUMNS {
                        let line = lines.add(i * LINE);
                        self.source
                            .fetch((column + i + AHEAD) * self.inner + from, len);
                        if column + i < panel.end {
                            self.row((column + i) * self.inner + from, len, line, COLUMNS);
                        } else {
                            std::slice::from_raw_parts_mut(line, len).fill(0.0);
                        }
                    }
                    if self.wide {
                        transpose_wide(lines, len, out);
                    } else {
                        transpose(lines, len, out);
                    }
                }
                return;
            }
            let whole = panel.len().is_multiple_of(COLUMNS)
                && (self.columns | panel.start).is_multiple_of(COLUMNS);
            for l in 0..len {
                let start = (from + l) * self.columns + panel.start;
                let out = out.add(l * COLUMNS);
                self.source.fetch(start + AHEAD * self.columns, panel.len());
                if whole {
                    self.row(start, panel.len(), out, STRIDE);
                    continue;
                }
                self.row(start, panel.len(), lines, COLUMNS);
                for at in (0..panel.len()).step_by(COLUMNS) {
                    let out =
                        std::slice::from_raw_parts_mut(out.add(at / COLUMNS * STRIDE), COLUMNS);
                    let size = COLUMNS.min(panel.len() - at);
                    out[size..].fill(0.0);
                    let line = std::slice::from_raw_parts(lines.add(at), size);
                    out[..size].copy_from_slice(line);
                }
            }
        }
    }

    /// Elements `start..start + len` of the flattened matrix, `group` elements from each 16 to the next.
    ///
    /// # Safety
    /// As `pack`. Where groups are not next to each other, `start` and `len` are multiples of 16.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn row(&self, start: usize, len: usize, out: *mut f32, group: usize) {
        // SAFETY: the caller's.
        unsafe {
            match self.source {
                Source::FourBit(weight) => {
                    weight.decode_f32(start, len, self.narrow, self.wide, out, group);
                }
                Source::Dense(dense) => {
                    let step = if group == COLUMNS {
                        len.max(1)
                    } else {
                        COLUMNS
                    };
                    for at in (0..len).step_by(step) {
                        let size = step.min(len - at);
                        let out = out.add(at / COLUMNS * group);
                        match dense {
                            Dense::F32(values) => {
                                let values = &values[start + at..][..size];
                                out.copy_from_nonoverlapping(values.as_ptr(), size);
                            }
                            Dense::Bf16(values) => widen(&values[start + at..][..size], out),
                        }
                    }
                }
            }
        }
    }
}

/// 16 lines of `len` elements, [`LINE`] apart, to `[len][16]`.
///
/// # Safety
/// The CPU has AVX2; both have the elements.
#[target_feature(enable = "avx2")]
unsafe fn transpose(lines: *const f32, len: usize, out: *mut f32) {
    // SAFETY: the caller's.
    unsafe {
        for at in (0..len / 8 * 8).step_by(8) {
            for half in [0, 8] {
                let mut rows = [_mm256_setzero_ps(); 8];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = _mm256_loadu_ps(lines.add((half + i) * LINE + at));
                }
                let found = transpose_8(&rows);
                for (i, found) in found.iter().enumerate() {
                    _mm256_storeu_ps(out.add((at + i) * COLUMNS + half), *found);
                }
            }
        }
        for at in len / 8 * 8..len {
            for i in 0..COLUMNS {
                *out.add(at * COLUMNS + i) = *lines.add(i * LINE + at);
            }
        }
    }
}

/// As [`transpose`], in vectors of 512 bits.
///
/// # Safety
/// As there, of a CPU with AVX-512; `out` has `MOST` times 16 elements.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn transpose_wide(lines: *const f32, len: usize, out: *mut f32) {
    for at in (0..len).step_by(16) {
        // SAFETY: the caller's; lines have `MOST` elements, a multiple of 16.
        unsafe { transpose_words(lines.add(at).cast(), LINE, out.add(at * COLUMNS).cast()) };
    }
}

/// The transpose of 8 by 8.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_8(rows: &[__m256; 8]) -> [__m256; 8] {
    let mut pairs = *rows;
    for i in 0..4 {
        let i = 2 * i;
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    let mut fours = pairs;
    for i in [0, 4] {
        for high in 0..2 {
            let (a, b) = (pairs[i + high], pairs[i + 2 + high]);
            fours[i + 2 * high] = _mm256_shuffle_ps::<0x44>(a, b);
            fours[i + 2 * high + 1] = _mm256_shuffle_ps::<0xee>(a, b);
        }
    }
    let mut found = fours;
    for i in 0..4 {
        found[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        found[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
    }
    found
}

#[inline(always)]
fn wide(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// bf16 as f32.
///
/// # Safety
/// The CPU has AVX2; `out` has as many elements.
#[inline]
#[target_feature(enable = "avx2")]
pub unsafe fn widen(bits: &[u16], out: *mut f32) {
    let (eights, rest) = bits.as_chunks::<8>();
    // SAFETY: the caller's.
    unsafe {
        for (i, eight) in eights.iter().enumerate() {
            let eight = _mm256_cvtepu16_epi32(_mm_loadu_si128(eight.as_ptr().cast()));
            let eight = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(eight));
            _mm256_storeu_ps(out.add(8 * i), eight);
        }
        for (i, bits) in rest.iter().enumerate() {
            *out.add(8 * eights.len() + i) = wide(*bits);
        }
    }
}

/// f32 to bf16, rounded to nearest, ties to even.
///
/// # Safety
/// The CPU has AVX2; `out` has as many elements.
#[target_feature(enable = "avx2")]
pub unsafe fn narrow(values: &[f32], out: *mut u16) {
    // SAFETY: the caller's.
    let out = unsafe { std::slice::from_raw_parts_mut(out, values.len()) };
    for (out, value) in out.iter_mut().zip(values) {
        *out = half::bf16::from_f32(*value).to_bits();
    }
}

/// As [`narrow`].
///
/// # Safety
/// As there, of a CPU with AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn narrow_wide(values: &[f32], out: *mut u16) {
    let (vectors, rest) = values.as_chunks::<16>();
    // SAFETY: the caller's.
    unsafe {
        for (i, values) in vectors.iter().enumerate() {
            let values = _mm512_loadu_ps(values.as_ptr());
            let bits = _mm512_castps_si512(values);
            let half = _mm512_set1_epi32(0x7fff);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, half));
            // A NaN stays one, quiet.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
            let quiet = _mm512_set1_epi32(0x0040_0000);
            let rounded = _mm512_mask_or_epi32(rounded, nan, bits, quiet);
            let found = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
            _mm256_storeu_si256(out.add(16 * i).cast(), found);
        }
        narrow(rest, out.add(16 * vectors.len()));
    }
}
