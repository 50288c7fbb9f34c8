//! The product, cut into blocks for the caches and tasks for the threads.

use std::sync::atomic::{AtomicU32, Ordering};

use super::adapter::Adapter;
use super::amx::{Segment, Tiles, multiply};
use super::output::{Block, Output};
use super::parts::Planes;
use super::tiles::{Dense, Operand, Source};
use super::weight::FourBit;
use super::{Unit, vectors};
use crate::parallel::{self, Round};
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

/// Where the values of a dense operand lie.
#[derive(Clone, Copy)]
enum Fixed<'a> {
    Given(Dense<'a>),
    /// By tasks that run before.
    Made(*const f32),
}

/// A dense operand in tiles, and the weight's side of the same sum.
struct Part<'a> {
    fixed: Fixed<'a>,
    tiles: Buffer,
    moving: Operand<'a>,
    /// Elements and steps of the inner dimension.
    inner: usize,
    steps: usize,
    /// What was met of either side.
    met: [Range; 2],
}

// SAFETY: what is made is read alone.
unsafe impl Sync for Part<'_> {}

impl<'a> Part<'a> {
    fn new(product: &Product<'_>, fixed: Fixed<'a>, moving: Source<'a>, inner: usize) -> Self {
        let planes = match fixed {
            Fixed::Given(Dense::Bf16(_)) => Planes::One,
            _ => Planes::Three,
        };
        let (rows, columns) = match product.direction {
            Direction::Forward => (product.columns(), inner),
            Direction::Backward => (inner, product.columns()),
        };
        let moving = Operand {
            source: moving,
            rows,
            columns,
            planes,
        };
        let steps = inner.div_ceil(32);
        let bytes = steps * moving.step_bytes();
        Self {
            fixed,
            tiles: Buffer::new(product.m.next_multiple_of(32) / 16 * bytes),
            moving,
            inner,
            steps,
            met: [Range::default(), Range::default()],
        }
    }

    const fn step_bytes(&self) -> usize {
        self.moving.step_bytes()
    }

    /// Lays 32 rows of the dense operand out.
    ///
    /// # Safety
    /// As [`Product::run`]; no one else writes or reads these tiles.
    unsafe fn lay_out(&self, product: &Product<'_>, row: usize) {
        let (inner, planes) = (self.inner, self.moving.planes);
        let values = match self.fixed {
            Fixed::Given(values) => values,
            Fixed::Made(at) => {
                // SAFETY: the caller's; what is made is made by now.
                let made = unsafe { std::slice::from_raw_parts(at, product.m * inner) };
                Dense::F32(made)
            }
        };
        let operand = Operand {
            source: Source::Dense(values),
            rows: product.m,
            columns: inner,
            planes,
        };
        let right = product.direction == Direction::Forward;
        let line = Buffer::new(planes.count() * self.steps * 64);
        for row in [row, row + 16] {
            let to = self.tiles.at(row / 16 * self.steps * self.step_bytes());
            let line = line.at(0).cast();
            // SAFETY: the caller's; the buffers are as large as this needs.
            self.met[0].meet(unsafe { operand.along_rows(row, 0, inner, right, to, line) });
        }
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
                Unit::Tiles => {
                    let tiled = Tiled::new(self, None, out);
                    parallel::in_turn(&tiled.rounds());
                    tiled.holds()
                }
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
            let thin = vectors::Work::new(self, Unit::Wide, Some(adapter), None);
            let tiled = out.map(|out| Tiled::new(self, Some(adapter.narrow), out));
            let mut rounds = thin.rounds();
            rounds.extend(tiled.iter().flat_map(Tiled::rounds));
            parallel::in_turn(&rounds);
            tiled.as_ref().is_none_or(Tiled::holds)
        }
    }
}

/// A product's tasks in tiles, and what they share.
struct Tiled<'a> {
    product: &'a Product<'a>,
    /// The base's and the term's.
    parts: Vec<Part<'a>>,
    /// First rows and columns of the output, and how many columns a task takes.
    blocks: Vec<(usize, usize)>,
    panel: usize,
    out: Output,
}

impl<'a> Tiled<'a> {
    /// With `made`, that is where the term's `left` is made before these tasks run.
    ///
    /// # Safety
    /// As [`Product::run`], until the last task has ended.
    unsafe fn new(product: &'a Product<'a>, made: Option<*const f32>, out: Output) -> Self {
        let (m, columns) = (product.m, product.columns());
        let panel = panel_width(columns, m);
        let base = (
            Fixed::Given(product.input),
            Source::FourBit(&product.weight),
        );
        let mut parts = vec![Part::new(product, base.0, base.1, product.inner())];
        if let Some(term) = product.term {
            let fixed = made.map_or(Fixed::Given(term.left), Fixed::Made);
            let right = Source::Dense(term.right);
            parts.push(Part::new(product, fixed, right, term.r));
        }
        let rows = (0..m).step_by(ROWS);
        let blocks = rows.flat_map(|row| (0..columns).step_by(panel).map(move |at| (row, at)));
        Self {
            product,
            parts,
            blocks: blocks.collect(),
            panel,
            out,
        }
    }

    fn rounds(&self) -> [Round<'_>; 2] {
        let pairs = self.product.m.div_ceil(32);
        [
            Round {
                tasks: self.parts.len() * pairs,
                // SAFETY: as `new` has it; rows are the tasks' own.
                run: Box::new(move |task| unsafe {
                    self.parts[task / pairs].lay_out(self.product, task % pairs * 32);
                }),
            },
            Round {
                tasks: self.blocks.len(),
                run: Box::new(|task| {
                    let (row, column) = self.blocks[task];
                    let rows = row..self.product.m.min(row + ROWS);
                    let panel = column..self.product.columns().min(column + self.panel);
                    // SAFETY: as `new` has it; tasks' blocks of the output do not overlap.
                    unsafe { self.block(rows, panel) };
                }),
            },
        ]
    }

    /// Whether all that was met is what this code is exact for.
    fn holds(&self) -> bool {
        self.parts
            .iter()
            .all(|part| part.moving.planes == Planes::One || part.met.iter().all(Range::holds))
    }

    /// # Safety
    /// As `new`; `rows` and `panel` are of the output, and no one else's.
    unsafe fn block(&self, rows: std::ops::Range<usize>, panel: std::ops::Range<usize>) {
        let (product, parts) = (self.product, &self.parts);
        let forward = product.direction == Direction::Forward;
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
            for part in parts {
                let at_once = steps_at_once(part, wide);
                for step in (0..part.steps).step_by(at_once) {
                    let steps = at_once.min(part.steps - step);
                    let from = 32 * step;
                    let len = (32 * steps).min(part.inner - from);
                    let bytes = steps * part.step_bytes();
                    part.met[1].meet(if forward {
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
                        part.tiles
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
                output: self.out,
                columns: product.columns(),
                rows,
                row_columns: panel,
                bias: product.bias,
                accumulate: product.accumulate,
            };
            block.write(forward);
        }
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
