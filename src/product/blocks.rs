//! The product, cut into blocks for the caches and tasks for the threads.

use std::sync::atomic::{AtomicU32, Ordering};

use super::adapter::Adapter;
use super::amx::{Segment, Tiles, multiply};
use super::output::{Block, Output};
use super::parts::Planes;
use super::tiles::{Dense, Operand, Source};
use super::weight::FourBit;
use super::{Unit, vectors};
use crate::parallel;
use crate::scratch::Scratch;

/// Rows of the activations that a task takes.
const ROWS: usize = 512;

/// Rows or columns of the weight that a task takes, at most.
const PANEL: usize = 256;

/// Bytes of a panel of the weight that a task has in tiles at a time.
const PANEL_BYTES: usize = 256 << 10;

/// Bits of 2⁻⁶⁰ and 2⁶⁰: what f32 matrices must lie between.
const SMALLEST: u32 = (127 - 60) << 23;
const LARGEST: u32 = (127 + 60) << 23;

/// Which of the weight's dimensions is summed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// `out` `[m, n]` = `input` `[m, k]` · Wᵀ.
    Forward,
    /// `out` `[m, k]` = `input` `[m, n]` · W.
    Backward,
}

/// A product of rank r that is added in the same sums.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    pub r: usize,
    /// `[m, r]`.
    pub left: Dense<'a>,
    /// Forward `[n, r]`, to be transposed; backward `[r, k]`.
    pub right: Dense<'a>,
}

/// A product with a 4-bit W `[n, k]`.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    pub direction: Direction,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub input: Dense<'a>,
    pub weight: FourBit<'a>,
    pub term: Option<Term<'a>>,
    /// One a column of the output.
    pub bias: Option<&'a [f32]>,
    /// Adds to what the output holds.
    pub accumulate: bool,
}

/// A dense operand in tiles, and the weight's side of the same sum.
struct Part<'a> {
    fixed: Buffer,
    moving: Operand<'a>,
    /// Elements and steps of the inner dimension.
    inner: usize,
    steps: usize,
}

impl Part<'_> {
    const fn step_bytes(&self) -> usize {
        self.moving.step_bytes()
    }
}

impl Product<'_> {
    /// Elements of each sum.
    pub const fn inner(&self) -> usize {
        match self.direction {
            Direction::Forward => self.k,
            Direction::Backward => self.n,
        }
    }

    /// Of the term; 0 without one.
    pub const fn rank(&self) -> usize {
        match self.term {
            Some(term) => term.r,
            None => 0,
        }
    }

    /// Of the output.
    pub const fn columns(&self) -> usize {
        match self.direction {
            Direction::Forward => self.n,
            Direction::Backward => self.k,
        }
    }

    /// Writes the product to `out`; false, with `out` unspecified, where a matrix is one that this code is not exact
    /// for (see the module).
    ///
    /// # Safety
    /// `unit` is available; `out` has the output's elements, which nothing else uses.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub unsafe fn run(&self, unit: Unit, out: Output) -> bool {
        assert!(
            self.bias.is_none_or(|bias| bias.len() == self.columns()),
            "bias"
        );
        // SAFETY: the caller's.
        unsafe {
            match unit {
                Unit::Tiles => self.run_in_tiles(out),
                Unit::Wide | Unit::Vectors => {
                    vectors::run(self, unit, None, Some(out));
                    true
                }
            }
        }
    }

    /// As `run`, where the term's `left` is what the adapter makes, in vectors on every unit; it makes the rest of what it
    /// asks for, too, also where this returns false, and without `out`.
    ///
    /// # Safety
    /// `unit` is available; `out` and what the adapter writes to have their elements, which nothing else uses, and what it
    /// reads has its own.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub unsafe fn run_with(&self, unit: Unit, adapter: &Adapter<'_>, out: Option<Output>) -> bool {
        assert!(adapter.by.len() == self.inner() * self.rank(), "by");
        assert!(
            self.bias.is_none_or(|bias| bias.len() == self.columns()),
            "bias"
        );
        // SAFETY: the caller's; CPUs with tiles have wide vectors.
        unsafe {
            if unit != Unit::Tiles {
                vectors::run(self, unit, Some(adapter), out);
                return true;
            }
            vectors::run(self, Unit::Wide, Some(adapter), None);
            let left = std::slice::from_raw_parts(adapter.narrow, self.m * self.rank());
            let term = self.term.map(|term| Term {
                left: Dense::F32(left),
                ..term
            });
            out.is_none_or(|out| Product { term, ..*self }.run_in_tiles(out))
        }
    }

    /// # Safety
    /// As `run`.
    unsafe fn run_in_tiles(&self, out: Output) -> bool {
        let (inner, columns) = (self.inner(), self.columns());
        let base = (self.input, Source::FourBit(&self.weight), inner);
        let term = self
            .term
            .map(|term| (term.left, Source::Dense(term.right), term.r));
        let mut parts = Vec::with_capacity(2);
        for (fixed, moving, inner) in std::iter::once(base).chain(term) {
            let planes = planes(fixed);
            let range = Range::default();
            let part = self.part(fixed, moving, inner, columns, planes, &range);
            if planes == Planes::Three && !range.holds() {
                return false;
            }
            parts.push(part);
        }
        let panel = panel_width(columns, self.m);
        let ranges = [Range::default(), Range::default()];
        let tasks = (0..self.m)
            .step_by(ROWS)
            .flat_map(|row| (0..columns).step_by(panel).map(move |column| (row, column)));
        let tasks: Vec<_> = tasks.collect();
        parallel::for_each(tasks.into_iter(), |(row, column)| {
            let rows = row..self.m.min(row + ROWS);
            let panel = column..columns.min(column + panel);
            // SAFETY: the caller's; tasks' blocks of the output do not overlap.
            unsafe { self.block(&parts, &ranges, columns, rows, panel, out) };
        });
        parts
            .iter()
            .zip(&ranges)
            .all(|(part, range)| part.moving.planes == Planes::One || range.holds())
    }

    fn part<'a>(
        &self,
        fixed: Dense<'a>,
        moving: Source<'a>,
        inner: usize,
        columns: usize,
        planes: Planes,
        range: &Range,
    ) -> Part<'a> {
        let forward = self.direction == Direction::Forward;
        let operand = Operand {
            source: Source::Dense(fixed),
            rows: self.m,
            columns: inner,
            planes,
        };
        let steps = inner.div_ceil(32);
        let bytes = steps * operand.step_bytes();
        let buffer = Buffer::new(self.m.next_multiple_of(32) / 16 * bytes);
        parallel::for_each((0..self.m.next_multiple_of(32)).step_by(32), |row| {
            let line = Buffer::new(operand.planes.count() * steps * 64);
            for row in [row, row + 16] {
                let to = buffer.at(row / 16 * bytes);
                // SAFETY: `run` asserted the features; the buffers are as large as this needs, and rows' own.
                range.meet(unsafe {
                    operand.along_rows(row, 0, inner, forward, to, line.at(0).cast())
                });
            }
        });
        let (rows, columns) = if forward {
            (columns, inner)
        } else {
            (inner, columns)
        };
        Part {
            fixed: buffer,
            moving: Operand {
                source: moving,
                rows,
                columns,
                planes,
            },
            inner,
            steps,
        }
    }

    /// # Safety
    /// As `run`; `rows` and `panel` are of the output, and no one else's.
    unsafe fn block(
        &self,
        parts: &[Part<'_>],
        ranges: &[Range; 2],
        columns: usize,
        rows: std::ops::Range<usize>,
        panel: std::ops::Range<usize>,
        out: Output,
    ) {
        let forward = self.direction == Direction::Forward;
        let wide = panel.len().next_multiple_of(32);
        let high = rows.len().next_multiple_of(32);
        let (stride, size) = if forward {
            (high, wide * high)
        } else {
            (wide, wide * high)
        };
        let sums = Buffer::new(4 * size);
        let most = parts
            .iter()
            .map(|part| part.steps.min(steps_at_once(part, wide)) * part.step_bytes())
            .max();
        let tiles = Buffer::new(wide / 16 * most.unwrap_or(0));
        let lines = parts
            .iter()
            .map(|part| 2 * part.moving.planes.count() * (32 * part.steps).max(wide));
        let line = Buffer::new(2 * lines.max().unwrap_or(0));
        let mut accumulate = false;
        // SAFETY: the caller's; the buffers are as large as the layouts need.
        unsafe {
            let _configured = Tiles::configure();
            for (part, range) in parts.iter().zip(ranges) {
                let at_once = steps_at_once(part, wide);
                for step in (0..part.steps).step_by(at_once) {
                    let steps = at_once.min(part.steps - step);
                    let from = 32 * step;
                    let len = (32 * steps).min(part.inner - from);
                    let bytes = steps * part.step_bytes();
                    range.meet(if forward {
                        let mut most = 0;
                        for i in 0..wide / 16 {
                            let (row, to) = (panel.start + 16 * i, tiles.at(i * bytes));
                            let found = part.moving.along_rows(
                                row,
                                from,
                                len,
                                false,
                                to,
                                line.at(0).cast(),
                            );
                            most = most.max(found);
                        }
                        most
                    } else {
                        let (to, line) = (tiles.at(0), line.at(0).cast());
                        part.moving.across_rows(
                            from,
                            len,
                            panel.start,
                            panel.len(),
                            to,
                            bytes,
                            line,
                        )
                    });
                    let whole = part.steps * part.step_bytes();
                    let fixed = |tile: usize| {
                        let first = rows.start / 16 + tile;
                        part.fixed
                            .at(first * whole + step * part.step_bytes())
                            .cast_const()
                    };
                    let moving = |tile: usize| tiles.at(tile * bytes).cast_const();
                    for i in (0..high / 16).step_by(2) {
                        for j in (0..wide / 16).step_by(2) {
                            let fixed = [fixed(i), fixed(i + 1)];
                            let moving = [moving(j), moving(j + 1)];
                            let (left, right, at) = if forward {
                                (moving, fixed, 16 * (j * stride + i))
                            } else {
                                (fixed, moving, 16 * (i * stride + j))
                            };
                            let segment = Segment {
                                left,
                                right,
                                steps,
                                planes: part.moving.planes.count(),
                            };
                            let c = sums.at(4 * at).cast();
                            multiply(&[segment], c, 4 * stride, accumulate);
                        }
                    }
                    accumulate = true;
                }
            }
            let block = Block {
                sums: sums.at(0).cast(),
                stride,
                output: out,
                columns,
                rows,
                row_columns: panel,
                bias: self.bias,
                accumulate: self.accumulate,
            };
            block.write(forward);
        }
    }
}

fn planes(values: Dense) -> Planes {
    match values {
        Dense::F32(_) => Planes::Three,
        Dense::Bf16(_) => Planes::One,
    }
}

fn steps_at_once(part: &Part, wide: usize) -> usize {
    (PANEL_BYTES / (wide / 16 * part.step_bytes())).max(1)
}

/// Narrower for small outputs, that there be some tasks for every thread.
fn panel_width(columns: usize, m: usize) -> usize {
    let tasks = |width: usize| columns.div_ceil(width) * m.div_ceil(ROWS);
    let mut width = PANEL;
    while width > 32 && tasks(width) < 4 * parallel::threads() {
        width /= 2;
    }
    width
}

/// The largest magnitude of a matrix.
#[derive(Default)]
struct Range(AtomicU32);

impl Range {
    fn meet(&self, bits: u32) {
        self.0.fetch_max(bits, Ordering::Relaxed);
    }

    /// All zeros, or as large as the products are exact for.
    fn holds(&self) -> bool {
        let bits = self.0.load(Ordering::Relaxed);
        bits == 0 || (SMALLEST..=LARGEST).contains(&bits)
    }
}

/// Bytes from a multiple of 64 on, with unspecified content, which tasks write through [`Self::at`], each its own part.
pub struct Buffer {
    start: *mut u8,
    bytes: usize,
    _memory: Scratch,
}

// SAFETY: a buffer is an address of memory that it owns.
unsafe impl Send for Buffer {}
// SAFETY: as above; whoever writes through `at` sees to it that no one else does there.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn new(bytes: usize) -> Self {
        let mut memory = Scratch::dirty(bytes.div_ceil(4) + 16);
        let start = memory.as_mut_ptr().cast::<u8>();
        Self {
            start: start.wrapping_add(start.align_offset(64)),
            bytes,
            _memory: memory,
        }
    }

    pub fn floats(count: usize) -> Self {
        Self::new(4 * count)
    }

    /// Where the float of this index lies, as `at`.
    pub fn float(&self, index: usize) -> *mut f32 {
        self.at(4 * index).cast()
    }

    pub fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.bytes, "{offset} of {}", self.bytes);
        self.start.wrapping_add(offset)
    }
}
