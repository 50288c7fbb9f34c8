//! Sums from a block of tiles to the caller's memory.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::parts::{narrow, transpose, widen};
use super::tiles::mask_16;

/// Where results go: row-major, `columns` wide.
#[derive(Debug, Clone, Copy)]
pub enum Output {
    F32(*mut f32),
    /// Bits; sums are rounded once.
    Bf16(*mut u16),
}

// SAFETY: tasks write to parts of it that do not overlap.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// A block of sums and its place in the output.
pub struct Block<'a> {
    pub sums: *const f32,
    /// Elements from one row of `sums` to the next.
    pub stride: usize,
    pub output: Output,
    /// Of the output.
    pub columns: usize,
    pub rows: std::ops::Range<usize>,
    pub row_columns: std::ops::Range<usize>,
    /// Added to every row: one a column of the output.
    pub bias: Option<&'a [f32]>,
    /// Adds to what the output holds.
    pub accumulate: bool,
}

impl Block<'_> {
    /// Writes the block; with `transposed`, rows of the output are columns of `sums`.
    ///
    /// # Safety
    /// The CPU has the features; `sums` are whole tiles that cover the block; the output has the rows and columns.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn write(&self, transposed: bool) {
        // SAFETY: the caller's.
        unsafe {
            for row in self.rows.clone().step_by(16) {
                for column in self.row_columns.clone().step_by(16) {
                    let (i, j) = (row - self.rows.start, column - self.row_columns.start);
                    let at = if transposed {
                        self.sums.add(j * self.stride + i)
                    } else {
                        self.sums.add(i * self.stride + j)
                    };
                    let load = |i| _mm512_loadu_si512(at.add(i * self.stride).cast());
                    let mut words = std::array::from_fn(load);
                    if transposed {
                        words = transpose(&words);
                    }
                    let mask = mask_16(self.row_columns.end - column);
                    let bias = self.bias.map_or(_mm512_setzero_ps(), |bias| {
                        _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(column))
                    });
                    for (i, words) in words.into_iter().enumerate().take(self.rows.end - row) {
                        let sums = _mm512_add_ps(_mm512_castsi512_ps(words), bias);
                        self.store(sums, (row + i) * self.columns + column, mask);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As `write`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn store(&self, mut sums: __m512, at: usize, mask: u16) {
        // SAFETY: the caller's; masked elements are neither read nor written.
        unsafe {
            match self.output {
                Output::F32(out) => {
                    let out = out.add(at);
                    if self.accumulate {
                        sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, out));
                    }
                    _mm512_mask_storeu_ps(out, mask, sums);
                }
                Output::Bf16(out) => {
                    let out = out.add(at);
                    let wide = u32::from(mask);
                    if self.accumulate {
                        let old =
                            _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(wide, out.cast()));
                        sums = _mm512_add_ps(sums, widen(old));
                    }
                    _mm256_mask_storeu_epi16(out.cast(), mask, narrow(sums));
                }
            }
        }
    }
}
