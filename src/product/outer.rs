//! Sums over the rows, of a matrix as thin as the rank and a wide one: the gradients of an adapter's matrices.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::adapter::{THIN, thin};
use super::blocks::Buffer;
use super::micro::{COLUMNS, HEIGHT, Loop, PITCH, Sides, Sums, WORDS};
use super::panels::{Right, STRIDE};
use super::tiles::{Dense, Source};

/// A sum over the rows: `leftᵀ·right`.
pub struct Outer<'a> {
    /// `[m, r]`; it may be the adapter's `narrow`.
    pub left: *const f32,
    /// `[m, columns]`.
    pub right: Dense<'a>,
    pub columns: usize,
    /// `[r, columns]`, or `[columns, r]` with `across`.
    pub out: *mut f32,
    pub across: bool,
}

// SAFETY: tasks write to parts of what `out` is to that do not overlap.
unsafe impl Sync for Outer<'_> {}

impl Outer<'_> {
    /// Adds the sums over `rows`, or, of the first rows, writes them.
    ///
    /// # Safety
    /// As [`Product::run_with`](super::Product::run_with); the columns `panel` of the output, at most
    /// [`PANEL`](super::vectors::PANEL), are no one else's.
    pub unsafe fn add(
        &self,
        rows: std::ops::Range<usize>,
        panel: std::ops::Range<usize>,
        rank: usize,
        with: Loop,
    ) {
        let wide = panel.len().next_multiple_of(COLUMNS);
        let high = rank.next_multiple_of(HEIGHT);
        let sums = Buffer::floats(high * wide);
        let first = rows.start == 0;
        // SAFETY: the caller's; `sums` are as large as the layouts need.
        unsafe {
            if with == Loop::Narrow || !panel.len().is_multiple_of(COLUMNS) {
                self.add_packed(rows, panel.clone(), rank, with, &sums);
            } else {
                match self.right {
                    Dense::F32(values) => {
                        let start = values.as_ptr().add(panel.start);
                        self.add_where_it_lies::<false>(rows, start.cast(), wide, rank, &sums);
                    }
                    Dense::Bf16(values) => {
                        let start = values.as_ptr().add(panel.start);
                        self.add_where_it_lies::<true>(rows, start.cast(), wide, rank, &sums);
                    }
                }
            }
            let sums = sums.float(0);
            for row in 0..rank {
                for column in 0..panel.len() {
                    let at = panel.start + column;
                    let to = self.out.add(if self.across {
                        at * rank + row
                    } else {
                        row * self.columns + at
                    });
                    let found = *sums.add(row * wide + column);
                    *to = if first { found } else { *to + found };
                }
            }
        }
    }

    /// To `sums` `[rank, wide]`, of `wide` columns, a multiple of [`COLUMNS`], from `start` on.
    ///
    /// # Safety
    /// As `add`, of a CPU with AVX-512.
    unsafe fn add_where_it_lies<const BF16: bool>(
        &self,
        rows: std::ops::Range<usize>,
        start: *const u8,
        wide: usize,
        rank: usize,
        sums: &Buffer,
    ) {
        let size = if BF16 { 2 } else { 4 };
        for from in rows.clone().step_by(THIN) {
            let until = rows.end.min(from + THIN);
            for column in (0..wide).step_by(COLUMNS) {
                let mut row = 0;
                while row < rank {
                    let step = Step {
                        left: self.left.wrapping_add(from * rank + row),
                        rank,
                        right: start.wrapping_add((from * self.columns + column) * size),
                        columns: self.columns * size,
                        rows: until - from,
                        to: sums.float(row * wide + column),
                        wide,
                        add: from > rows.start,
                    };
                    // SAFETY: the caller's.
                    row += unsafe {
                        match rank - row {
                            16.. => step.add::<16, BF16>(),
                            8.. => step.add::<8, BF16>(),
                            4.. => step.add::<4, BF16>(),
                            _ => step.add::<1, BF16>(),
                        }
                    };
                }
            }
        }
    }

    /// As `add_where_it_lies`, of any columns, in sides that are packed first.
    ///
    /// # Safety
    /// As `add`.
    unsafe fn add_packed(
        &self,
        rows: std::ops::Range<usize>,
        panel: std::ops::Range<usize>,
        rank: usize,
        with: Loop,
        sums: &Buffer,
    ) {
        let wide = panel.len().next_multiple_of(COLUMNS);
        let high = rank.next_multiple_of(HEIGHT);
        let (left, right) = (
            Buffer::floats(HEIGHT * PITCH),
            Buffer::floats(wide / COLUMNS * STRIDE),
        );
        let lines = Buffer::floats(Right::LINES);
        let (left, right) = (left.float(0), right.float(0));
        let sums = sums.float(0);
        let side = Right {
            source: Source::Dense(self.right),
            transposed: false,
            inner: rows.end,
            columns: self.columns,
            narrow: false,
            wide: with != Loop::Narrow,
        };
        // SAFETY: the caller's; the buffers are as large as the layouts need.
        unsafe {
            for from in rows.clone().step_by(WORDS) {
                let len = WORDS.min(rows.end - from);
                side.pack(from, len, panel.clone(), right, lines.float(0));
                let narrow = std::slice::from_raw_parts(self.left.add(from * rank), len * rank);
                for row in (0..high).step_by(HEIGHT) {
                    for (l, narrow) in narrow.chunks_exact(rank).enumerate() {
                        for i in 0..HEIGHT.min(rank - row) {
                            *left.add(i * PITCH + l) = narrow[row + i];
                        }
                    }
                    for column in (0..wide).step_by(with.most() * COLUMNS) {
                        let sides = Sides {
                            left,
                            right: right.add(column / COLUMNS * STRIDE),
                            words: len,
                        };
                        let sums = Sums {
                            to: sums.add(row * wide + column),
                            stride: wide,
                            add: from > rows.start,
                        };
                        let panels = with.most().min((wide - column) / COLUMNS);
                        thin(with, &sides, sums, panels);
                    }
                }
            }
        }
    }
}

/// Sums over rows of a vector of the right side and `ROWS` columns of the left one, for [`Step::add`].
struct Step {
    left: *const f32,
    /// Elements from one row of the left side to the next.
    rank: usize,
    right: *const u8,
    /// Bytes from one row of the right side to the next.
    columns: usize,
    rows: usize,
    to: *mut f32,
    /// Elements from one row of `to` to the next.
    wide: usize,
    /// To what is there.
    add: bool,
}

impl Step {
    /// Returns `ROWS`.
    ///
    /// # Safety
    /// The CPU has the instructions; all addresses are valid, and no one else's that are written to.
    #[target_feature(enable = "avx512f")]
    unsafe fn add<const ROWS: usize, const BF16: bool>(&self) -> usize {
        let mut found = [_mm512_setzero_ps(); ROWS];
        // SAFETY: the caller's.
        unsafe {
            for at in 0..self.rows {
                let right = self.right.add(at * self.columns);
                let left = self.left.add(at * self.rank);
                let right = if BF16 {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(right.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                } else {
                    _mm512_loadu_ps(right.cast())
                };
                for (i, found) in found.iter_mut().enumerate() {
                    *found = _mm512_fmadd_ps(_mm512_set1_ps(*left.add(i)), right, *found);
                }
            }
            for (i, found) in found.iter().enumerate() {
                let to = self.to.add(i * self.wide);
                let found = if self.add {
                    _mm512_add_ps(*found, _mm512_loadu_ps(to))
                } else {
                    *found
                };
                _mm512_storeu_ps(to, found);
            }
        }
        ROWS
    }
}
