//! Both sides of a product in f32 vectors, in the order in which its inner loop reads them.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::micro::{COLUMNS, HEIGHT};
use super::tiles::{Dense, Source};

/// The most inner elements, or columns, that [`Right::pack`] takes at a time.
const MOST: usize = 256;

/// From one line of rows to be transposed to the next: no multiple of what the cache takes for the same place.
const LINE: usize = MOST + 8;

/// Rows of a 4-bit weight that are on their way from memory while one is decoded: pieces of rows are too short for the
/// processor to see where the next one lies.
const AHEAD: usize = 8;

/// From one [`COLUMNS`] of a packed panel to the next, as those are.
pub const STRIDE: usize = MOST * COLUMNS + 16;

/// The activations: `[m, inner]`.
pub struct Left<'a> {
    pub values: Dense<'a>,
    pub inner: usize,
}

impl Left<'_> {
    /// Inner elements `from..from + len` of at most [`HEIGHT`] rows, as `[len][HEIGHT]`; rows that are missing are zeros.
    ///
    /// # Safety
    /// The CPU has the features; `out` has `len · HEIGHT` elements.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn pack(
        &self,
        rows: std::ops::Range<usize>,
        from: usize,
        len: usize,
        out: *mut f32,
    ) {
        // SAFETY: the caller's.
        let out = unsafe { std::slice::from_raw_parts_mut(out, HEIGHT * len) };
        let start = |i: usize| (rows.start + i) * self.inner + from;
        if let (Dense::F32(values), HEIGHT) = (self.values, rows.len()) {
            let rows: [&[f32]; HEIGHT] = std::array::from_fn(|i| &values[start(i)..][..len]);
            for (at, out) in out.as_chunks_mut::<HEIGHT>().0.iter_mut().enumerate() {
                *out = std::array::from_fn(|i| rows[i][at]);
            }
            return;
        }
        if rows.len() < HEIGHT {
            out.fill(0.0);
        }
        for i in 0..rows.len() {
            let out = out[i..].iter_mut().step_by(HEIGHT);
            match self.values {
                Dense::F32(values) => {
                    for (out, value) in out.zip(&values[start(i)..][..len]) {
                        *out = *value;
                    }
                }
                Dense::Bf16(values) => {
                    for (out, bits) in out.zip(&values[start(i)..][..len]) {
                        *out = wide(*bits);
                    }
                }
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
            (0..AHEAD).for_each(|row| self.fetch((panel.start + row) * self.inner + from, len));
        } else {
            let start = |row: usize| (from + row) * self.columns + panel.start;
            (0..AHEAD).for_each(|row| self.fetch(start(row), panel.len()));
        }
        // SAFETY: the caller's.
        unsafe {
            if self.transposed {
                for column in panel.clone().step_by(COLUMNS) {
                    let out = out.add((column - panel.start) / COLUMNS * STRIDE);
                    for i in 0..COLUMNS {
                        let line = lines.add(i * LINE);
                        self.fetch((column + i + AHEAD) * self.inner + from, len);
                        if column + i < panel.end {
                            self.row((column + i) * self.inner + from, len, line, COLUMNS);
                        } else {
                            std::slice::from_raw_parts_mut(line, len).fill(0.0);
                        }
                    }
                    transpose(lines, len, out);
                }
                return;
            }
            let whole = panel.len().is_multiple_of(COLUMNS)
                && (self.columns | panel.start).is_multiple_of(COLUMNS);
            for l in 0..len {
                let start = (from + l) * self.columns + panel.start;
                let out = out.add(l * COLUMNS);
                self.fetch(start + AHEAD * self.columns, panel.len());
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

    /// Asks for the bytes of elements `start..start + len` of a weight, which may lie beyond its end.
    #[inline]
    fn fetch(&self, start: usize, len: usize) {
        if let Source::FourBit(weight) = self.source {
            let bytes = weight.packed.as_ptr().wrapping_add(start / 2);
            for line in (0..len / 2 + 63).step_by(64) {
                // SAFETY: a prefetch of any address does nothing else.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.wrapping_add(line).cast()) };
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
                Source::FourBit(weight) => weight.decode_f32(start, len, self.narrow, out, group),
                Source::Dense(dense) => {
                    for at in (0..len).step_by(16) {
                        let size = 16.min(len - at);
                        let out = std::slice::from_raw_parts_mut(out.add(at / 16 * group), size);
                        match dense {
                            Dense::F32(values) => {
                                out.copy_from_slice(&values[start + at..][..size]);
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
                let load = |i: usize| _mm256_loadu_ps(lines.add((half + i) * LINE + at));
                let found = transpose_8(std::array::from_fn(load));
                for (i, found) in found.into_iter().enumerate() {
                    _mm256_storeu_ps(out.add((at + i) * COLUMNS + half), found);
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

/// The transpose of 8 by 8.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_8(rows: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = rows;
    for i in (0..8).step_by(2) {
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
    std::array::from_fn(|i| {
        let (a, b) = (fours[i % 4], fours[i % 4 + 4]);
        if i < 4 {
            _mm256_permute2f128_ps::<0x20>(a, b)
        } else {
            _mm256_permute2f128_ps::<0x31>(a, b)
        }
    })
}

#[inline(always)]
fn wide(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// bf16 as f32.
#[inline(always)]
pub fn widen(bits: &[u16], out: &mut [f32]) {
    for (out, bits) in out.iter_mut().zip(bits) {
        *out = wide(*bits);
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
