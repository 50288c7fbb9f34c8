//! What of a LoRA term is computed beside a product in f32 vectors: its sums over the wide sides, as thin as the rank.

use super::blocks::{Buffer, Direction, Product};
use super::micro::{COLUMNS, HEIGHT, multiply};
use super::panels::{Right, STRIDE};
use super::tiles::{Dense, Source};
use super::vectors::{INNER, PANEL, Part};
use crate::parallel;

/// As [`INNER`], of the sums that are as thin as the rank: there are few of them, and the term multiplies their errors.
const THIN: usize = 32;

/// What of a LoRA term is computed beside a product, all in f32: it needs a product with a term, whose `left` it makes.
pub struct Adapter<'a> {
    /// Forward A `[r, k]`, backward B `[n, r]`.
    pub by: &'a [f32],
    pub scaling: f32,
    /// `[m, r]`: `scaling · input · by` (forward `byᵀ`) is written there, and is the term's `left`.
    pub narrow: *mut f32,
    pub outer: Vec<Outer<'a>>,
}

// SAFETY: tasks write to parts of what the pointers are to that do not overlap.
unsafe impl Sync for Adapter<'_> {}
// SAFETY: as above.
unsafe impl Sync for Outer<'_> {}

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

/// An adapter, with `by` packed: blocks of [`INNER`] inner elements behind each other.
pub struct Down<'a> {
    adapter: &'a Adapter<'a>,
    rank: usize,
    packed: Buffer,
}

impl<'a> Down<'a> {
    /// Elements of a packed block.
    const fn block(rank: usize) -> usize {
        rank.div_ceil(COLUMNS) * STRIDE
    }

    pub fn new(product: &Product<'_>, adapter: &'a Adapter<'a>) -> Self {
        let (inner, rank) = (product.inner(), product.rank());
        let right = Right {
            source: Source::Dense(Dense::F32(adapter.by)),
            transposed: product.direction == Direction::Forward,
            inner,
            columns: rank,
            narrow: false,
        };
        let packed = Buffer::floats(inner.div_ceil(INNER) * Self::block(rank));
        parallel::for_each((0..inner).step_by(INNER), |from| {
            let lines = Buffer::floats(Right::LINES);
            let to = packed.float(from / INNER * Self::block(rank));
            for panel in (0..rank).step_by(PANEL) {
                let until = rank.min(panel + PANEL);
                // SAFETY: the CPU has the features; the buffers are as large as this needs, and blocks do not overlap.
                unsafe {
                    let to = to.add(panel / COLUMNS * STRIDE);
                    right.pack(
                        from,
                        INNER.min(inner - from),
                        panel..until,
                        to,
                        lines.float(0),
                    );
                }
            }
        });
        Self {
            adapter,
            rank,
            packed,
        }
    }

    /// The rows of `narrow`, of activations that lie packed from the row `at` of `part` on.
    ///
    /// # Safety
    /// As [`Product::run_with`]; the rows, at most [`HEIGHT`], are no one else's.
    pub unsafe fn rows(
        &self,
        rows: std::ops::Range<usize>,
        part: &Part<'_>,
        at: usize,
    ) -> &'a [f32] {
        let wide = self.rank.next_multiple_of(COLUMNS);
        let sums = Buffer::floats(HEIGHT * wide);
        let sums = sums.float(0);
        // SAFETY: the caller's; the buffers are as large as the layouts need.
        unsafe {
            for (from, len) in part.blocks() {
                let left = part.strip(at, from, len);
                let right = self.packed.float(from / INNER * Self::block(self.rank));
                for column in (0..wide).step_by(COLUMNS) {
                    let right = right.add(column / COLUMNS * STRIDE);
                    thin(left, right, len, sums.add(column), wide, from > 0);
                }
            }
            let start = self.adapter.narrow.add(rows.start * self.rank);
            let narrow = std::slice::from_raw_parts_mut(start, rows.len() * self.rank);
            for (i, row) in narrow.chunks_exact_mut(self.rank).enumerate() {
                let sums = std::slice::from_raw_parts(sums.add(i * wide), self.rank);
                for (to, sum) in row.iter_mut().zip(sums) {
                    *to = self.adapter.scaling * sum;
                }
            }
            narrow
        }
    }
}

impl Outer<'_> {
    /// Adds the sums over `rows`, or, of the first rows, writes them.
    ///
    /// # Safety
    /// As [`Product::run_with`]; the columns `panel` of the output, at most [`PANEL`], are no one else's.
    pub unsafe fn add(
        &self,
        rows: std::ops::Range<usize>,
        panel: std::ops::Range<usize>,
        rank: usize,
    ) {
        let wide = panel.len().next_multiple_of(COLUMNS);
        let high = rank.next_multiple_of(HEIGHT);
        let (left, right) = (
            Buffer::floats(high * INNER),
            Buffer::floats(wide / COLUMNS * STRIDE),
        );
        let (sums, lines) = (Buffer::floats(high * wide), Buffer::floats(Right::LINES));
        let (left, right) = (left.float(0), right.float(0));
        let sums = sums.float(0);
        let side = Right {
            source: Source::Dense(self.right),
            transposed: false,
            inner: rows.end,
            columns: self.columns,
            narrow: false,
        };
        // SAFETY: the caller's; the buffers are as large as the layouts need.
        unsafe {
            for from in rows.clone().step_by(INNER) {
                let len = INNER.min(rows.end - from);
                side.pack(from, len, panel.clone(), right, lines.float(0));
                let narrow = std::slice::from_raw_parts(self.left.add(from * rank), len * rank);
                for row in (0..high).step_by(HEIGHT) {
                    let left = left.add(row * len);
                    for (l, narrow) in narrow.chunks_exact(rank).enumerate() {
                        for i in 0..HEIGHT {
                            *left.add(l * HEIGHT + i) = narrow.get(row + i).copied().unwrap_or(0.0);
                        }
                    }
                    for column in (0..wide).step_by(COLUMNS) {
                        let right = right.add(column / COLUMNS * STRIDE);
                        let sums = sums.add(row * wide + column);
                        thin(left, right, len, sums, wide, from > rows.start);
                    }
                }
            }
            for row in 0..rank {
                for column in 0..panel.len() {
                    let at = panel.start + column;
                    let to = self.out.add(if self.across {
                        at * rank + row
                    } else {
                        row * self.columns + at
                    });
                    let found = *sums.add(row * wide + column);
                    *to = if rows.start > 0 { *to + found } else { found };
                }
            }
        }
    }
}

/// [`multiply`], [`THIN`] terms at a time.
///
/// # Safety
/// As there.
unsafe fn thin(
    left: *const f32,
    right: *const f32,
    inner: usize,
    sums: *mut f32,
    stride: usize,
    add: bool,
) {
    for from in (0..inner).step_by(THIN) {
        let len = THIN.min(inner - from);
        // SAFETY: the caller's.
        unsafe {
            let (left, right) = (left.add(HEIGHT * from), right.add(COLUMNS * from));
            multiply(left, right, len, sums, stride, add || from > 0);
        }
    }
}
