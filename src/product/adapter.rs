//! What of a LoRA term is computed beside a product in f32 vectors: its sums over the wide sides, as thin as the rank.

use super::blocks::{Buffer, Direction, Product};
use super::micro::{COLUMNS, HEIGHT, Loop, Sides, Sums, WORDS};
use super::outer::Outer;
use super::panels::{Right, STRIDE};
use super::tiles::{Dense, Source};
use super::vectors::{PANEL, Part};

/// Terms that are added up in registers of the sums that are as thin as the rank: there are few of them, and the term
/// multiplies their errors.
pub const THIN: usize = 32;

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

/// An adapter, with `by` packed: blocks of [`WORDS`] inner elements behind each other.
pub struct Down<'a> {
    adapter: &'a Adapter<'a>,
    right: Right<'a>,
    with: Loop,
    packed: Buffer,
}

impl<'a> Down<'a> {
    /// Elements of a packed block.
    const fn block(rank: usize) -> usize {
        rank.div_ceil(COLUMNS) * STRIDE
    }

    /// `with`: the base's loop. The packed side is to be written.
    pub fn new(product: &Product<'_>, adapter: &'a Adapter<'a>, with: Loop) -> Self {
        let (inner, rank) = (product.inner(), product.rank());
        Self {
            adapter,
            right: Right {
                source: Source::Dense(Dense::F32(adapter.by)),
                transposed: product.direction == Direction::Forward,
                inner,
                columns: rank,
                narrow: false,
                wide: with != Loop::Narrow,
            },
            with: match with {
                Loop::Pairs => Loop::Widened,
                floats => floats,
            },
            packed: Buffer::floats(inner.div_ceil(WORDS) * Self::block(rank)),
        }
    }

    /// Blocks of the packed side.
    pub const fn blocks(&self) -> usize {
        self.right.inner.div_ceil(WORDS)
    }

    /// Writes a block of it.
    ///
    /// # Safety
    /// As [`Product::run_with`]; no one else writes or reads the block.
    pub unsafe fn pack(&self, block: usize) {
        let (inner, rank) = (self.right.inner, self.right.columns);
        let lines = Buffer::floats(Right::LINES);
        let to = self.packed.float(block * Self::block(rank));
        let from = block * WORDS;
        let len = WORDS.min(inner - from);
        for panel in (0..rank).step_by(PANEL) {
            let until = rank.min(panel + PANEL);
            // SAFETY: the caller's; the buffers are as large as this needs.
            unsafe {
                let to = to.add(panel / COLUMNS * STRIDE);
                self.right.pack(from, len, panel..until, to, lines.float(0));
                if !len.is_multiple_of(2) {
                    // The other row of the last pair.
                    for column in 0..(until - panel).div_ceil(COLUMNS) {
                        let row = to.add(column * STRIDE + len * COLUMNS);
                        std::slice::from_raw_parts_mut(row, COLUMNS).fill(0.0);
                    }
                }
            }
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
        let rank = self.right.columns;
        let wide = rank.next_multiple_of(COLUMNS);
        let sums = Buffer::floats(HEIGHT * wide);
        let sums = sums.float(0);
        // SAFETY: the caller's; the buffers are as large as the layouts need.
        unsafe {
            for (block, whole) in part.blocks() {
                for from in (block..block + whole).step_by(WORDS) {
                    let packed = from / WORDS * Self::block(rank);
                    for column in (0..wide).step_by(COLUMNS) {
                        let sides = Sides {
                            left: part
                                .strip(at, block)
                                .add((from - block) / of_a_word(self.with)),
                            right: self.packed.float(packed + column / COLUMNS * STRIDE),
                            words: WORDS.min(block + whole - from),
                        };
                        let sums = Sums {
                            to: sums.add(column),
                            stride: wide,
                            add: from > 0,
                        };
                        thin(self.with, &sides, sums, 1);
                    }
                }
            }
            let start = self.adapter.narrow.add(rows.start * rank);
            let narrow = std::slice::from_raw_parts_mut(start, rows.len() * rank);
            for (i, row) in narrow.chunks_exact_mut(rank).enumerate() {
                let sums = std::slice::from_raw_parts(sums.add(i * wide), rank);
                for (to, sum) in row.iter_mut().zip(sums) {
                    *to = self.adapter.scaling * sum;
                }
            }
            narrow
        }
    }
}

/// One strip by `panels`, [`THIN`] terms at a time; `sides` has as many words as terms.
///
/// # Safety
/// As [`Loop::multiply`].
pub unsafe fn thin(with: Loop, sides: &Sides, sums: Sums, panels: usize) {
    let of_a_word = of_a_word(with);
    for from in (0..sides.words).step_by(THIN) {
        let len = THIN.min(sides.words - from);
        // SAFETY: the caller's.
        unsafe {
            let sides = Sides {
                left: sides.left.add(from / of_a_word),
                right: sides.right.add(COLUMNS * from),
                words: len.div_ceil(of_a_word),
            };
            let add = sums.add || from > 0;
            with.multiply(&sides, Sums { add, ..sums }, 1, panels);
        }
    }
}

fn of_a_word(with: Loop) -> usize {
    match with {
        Loop::Widened => 2,
        _ => 1,
    }
}
