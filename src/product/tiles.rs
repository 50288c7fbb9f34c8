//! Operands laid out in tiles.
//!
//! A left tile holds 16 rows of 32 inner elements. A right tile holds, in row i, inner elements 2i and 2i + 1 of its
//! 16 columns, side by side. Tiles of one row (or column) of tiles lie behind each other along the inner dimension,
//! the planes of a step together; what is beyond the matrix is zeros.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::amx::TILE_BYTES;
use super::parts::{Planes, parts_of, transpose_words};
use super::weight::{FourBit, Target};

/// A dense matrix, row-major without gaps.
#[derive(Debug, Clone, Copy)]
pub enum Dense<'a> {
    F32(&'a [f32]),
    /// Bits.
    Bf16(&'a [u16]),
}

impl Dense<'_> {
    pub const fn is_bf16(self) -> bool {
        matches!(self, Self::Bf16(_))
    }
}

/// Where rows come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    Dense(Dense<'a>),
    FourBit(&'a FourBit<'a>),
}

/// Rows of a 4-bit weight that are on their way from memory while one is decoded: pieces of rows are too short for the
/// processor to see where the next one lies.
pub const AHEAD: usize = 8;

impl Source<'_> {
    /// Asks for the bytes of elements `start..start + len` of a weight, which may lie beyond its end.
    #[inline]
    pub fn fetch(&self, start: usize, len: usize) {
        if let Self::FourBit(weight) = self {
            let bytes = weight.packed.as_ptr().wrapping_add(start / 2);
            for line in (0..len / 2 + 63).step_by(64) {
                // SAFETY: a prefetch of any address does nothing else.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.wrapping_add(line).cast()) };
            }
        }
    }
}

/// A matrix of `rows` by `columns` to be laid out.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    pub source: Source<'a>,
    pub rows: usize,
    pub columns: usize,
    pub planes: Planes,
}

impl Operand<'_> {
    /// Bytes of one step of 32 inner elements in a row of tiles.
    pub const fn step_bytes(&self) -> usize {
        self.planes.count() * TILE_BYTES
    }

    /// `len` elements of a row from column `from` on, to planes of `width` at `out`, zeros from `len` on (and
    /// everywhere, of a row beyond the last). Returns the bits of the largest magnitude met, of f32 values alone.
    ///
    /// # Safety
    /// The CPU has the features, `from + len` is at most `columns`, and `out` has `width`, a multiple of 32, per plane.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
    unsafe fn row(&self, row: usize, from: usize, len: usize, out: *mut u16, width: usize) -> u32 {
        let len = if row < self.rows { len } else { 0 };
        let start = row * self.columns + from;
        // SAFETY: reads are of elements start..start + len or masked, writes as the caller allows.
        unsafe {
            for p in 0..self.planes.count() {
                for at in (len / 32 * 32..width).step_by(32) {
                    _mm512_storeu_si512(out.add(p * width + at).cast(), _mm512_setzero_si512());
                }
            }
            if len == 0 {
                return 0;
            }
            match self.source {
                Source::FourBit(weight) => {
                    let to = Target {
                        start: out,
                        vector: 32,
                        plane: width,
                    };
                    weight.decode(start, len, self.planes, to)
                }
                Source::Dense(Dense::Bf16(values)) => {
                    let values = &values[start..start + len];
                    std::ptr::copy_nonoverlapping(values.as_ptr(), out, len);
                    0
                }
                Source::Dense(Dense::F32(values)) => {
                    let values = &values[start..start + len];
                    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
                    let mut most = _mm512_setzero_si512();
                    for at in (0..len).step_by(16) {
                        let mask = mask_16(len - at);
                        let found = _mm512_maskz_loadu_ps(mask, values.as_ptr().add(at));
                        let bits = _mm512_and_si512(_mm512_castps_si512(found), magnitude);
                        most = _mm512_max_epu32(most, bits);
                        let parts = parts_of(found, self.planes);
                        for (p, part) in parts.into_iter().enumerate().take(self.planes.count()) {
                            _mm256_storeu_si256(out.add(p * width + at).cast(), part);
                        }
                    }
                    _mm512_reduce_max_epu32(most)
                }
            }
        }
    }

    /// 16 rows from `row` on, columns `from..from + len`, as a row of left tiles at `out`, or, with `right`, as a
    /// column of right tiles of the transposed matrix.
    ///
    /// # Safety
    /// As `row`; `out` has room for `len.div_ceil(32)` steps, `line` for a row of them in all planes.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
    pub unsafe fn along_rows(
        &self,
        row: usize,
        from: usize,
        len: usize,
        right: bool,
        out: *mut u8,
        line: *mut u16,
    ) -> u32 {
        let steps = len.div_ceil(32);
        let width = 32 * steps;
        let mut most = 0;
        // SAFETY: the caller's.
        unsafe {
            for i in 0..16 {
                self.source
                    .fetch((row + i + AHEAD) * self.columns + from, len);
                if let Source::FourBit(weight) = self.source
                    && row + i < self.rows
                    && len.is_multiple_of(32)
                    && (self.columns | from).is_multiple_of(32)
                {
                    // Vectors of a row are rows of tiles.
                    let start = (row + i) * self.columns + from;
                    let to = Target {
                        start: out.add(64 * i).cast(),
                        vector: self.step_bytes() / 2,
                        plane: TILE_BYTES / 2,
                    };
                    most = most.max(weight.decode(start, len, self.planes, to));
                    continue;
                }
                most = most.max(self.row(row + i, from, len, line, width));
                for p in 0..self.planes.count() {
                    let source = line.add(p * width);
                    let target = out.add(p * TILE_BYTES + 64 * i);
                    for step in 0..steps {
                        let values = _mm512_loadu_si512(source.add(32 * step).cast());
                        _mm512_store_si512(target.add(step * self.step_bytes()).cast(), values);
                    }
                }
            }
            if right {
                for tile in 0..steps * self.planes.count() {
                    #[expect(clippy::cast_ptr_alignment, reason = "tiles start on 64 bytes")]
                    let at = out.add(tile * TILE_BYTES).cast::<u32>();
                    transpose_words(at, 16, at);
                }
            }
        }
        most
    }

    /// Rows `from..from + len` as the inner dimension, columns `column..column + count` as columns of right tiles at
    /// `out`, `stride` bytes apart; `count` is rounded up to 32.
    ///
    /// # Safety
    /// As `along_rows`; `line` has room for two lines of `count` columns in all planes.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vbmi")]
    pub unsafe fn across_rows(
        &self,
        from: usize,
        len: usize,
        column: usize,
        count: usize,
        out: *mut u8,
        stride: usize,
        line: *mut u16,
    ) -> u32 {
        let width = count.next_multiple_of(32);
        let valid = count.min(self.columns.saturating_sub(column));
        let lines = self.planes.count() * width;
        let mut most = 0;
        // SAFETY: the caller's.
        unsafe {
            let low: [u16; 32] = std::array::from_fn(|i| (i / 2 + 32 * (i % 2)) as u16);
            let low = _mm512_loadu_si512(low.as_ptr().cast());
            let high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
            for i in 0..len.div_ceil(32) * 16 {
                let first = out.add(i / 16 * self.step_bytes() + i % 16 * 64);
                for half in 0..2 {
                    let row = from + 2 * i + half + AHEAD;
                    self.source.fetch(row * self.columns + column, valid);
                }
                if let Source::FourBit(weight) = self.source
                    && 2 * i + 1 < len
                    && valid == width
                    && (self.columns | column).is_multiple_of(32)
                {
                    let start = (from + 2 * i) * self.columns + column;
                    let to = Target {
                        start: first.cast(),
                        vector: stride / 2,
                        plane: TILE_BYTES / 2,
                    };
                    let starts = [start, start + self.columns];
                    most = most.max(weight.decode_pair(starts, width, self.planes, to));
                    continue;
                }
                for half in 0..2 {
                    let row = from + 2 * i + half;
                    let row = if 2 * i + half < len { row } else { usize::MAX };
                    most = most.max(if row == usize::MAX {
                        self.row(self.rows, 0, 0, line.add(half * lines), width)
                    } else {
                        self.row(row, column, valid, line.add(half * lines), width)
                    });
                }
                for p in 0..self.planes.count() {
                    let step = first.add(p * TILE_BYTES);
                    for at in (0..width).step_by(32) {
                        let even = _mm512_loadu_si512(line.add(p * width + at).cast());
                        let odd = _mm512_loadu_si512(line.add(lines + p * width + at).cast());
                        let target = step.add(at / 16 * stride);
                        let left = _mm512_permutex2var_epi16(even, low, odd);
                        let right = _mm512_permutex2var_epi16(even, high, odd);
                        _mm512_store_si512(target.cast(), left);
                        _mm512_store_si512(target.add(stride).cast(), right);
                    }
                }
            }
        }
        most
    }
}

/// The first `len` of 16.
#[inline(always)]
pub fn mask_16(len: usize) -> u16 {
    if len >= 16 { u16::MAX } else { (1 << len) - 1 }
}
