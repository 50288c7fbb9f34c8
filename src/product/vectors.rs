//! The product in vectors, of 256 bits (AVX2 with FMA) or of 512 (AVX-512), for CPUs without a tile unit.
//!
//! The activations lie packed, [`ROWS`] of them at a time; the weight is dequantised panel by panel, straight into the
//! order in which the inner loop reads it, and never lies in memory whole. Sums are in f32: of blocks of terms by fused
//! multiply-adds, and of those sums. It is exact for what f32 itself is, infinities and NaN included; but where the CPU
//! multiplies pairs of bf16 it takes subnormal ones for zeros.

use super::Unit;
use super::adapter::{Adapter, Down};
use super::blocks::{Buffer, Direction, Product};
use super::micro::{COLUMNS, HEIGHT, Loop, PITCH, Sides, Sums, WORDS};
use super::outer::Outer;
use super::output::Output;
use super::panels::{Left, Right, STRIDE, narrow, narrow_wide, widen};
use super::parts::Planes;
use super::tiles::{Dense, Operand, Source};
use crate::parallel::{self, Round};

/// Rows of the activations that lie packed at a time, at most.
const ROWS: usize = 512;

/// Rows that one panel of the weight meets in a row: their packed values stay in a core's cache.
const SWEEP: usize = 20 * HEIGHT;

/// Columns of the output that a task takes, at most.
pub const PANEL: usize = 16 * COLUMNS;

/// Whether this CPU has what the loops of 256 bits are written for.
pub fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Whether it has vectors of 512 bits, too.
pub fn wide_available() -> bool {
    available() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}

fn pairs_available() -> bool {
    is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vl")
}

/// The weight's side of a sum.
enum Weight<'a> {
    Floats(Right<'a>),
    /// Read as pairs of bf16; with `true` `[columns, inner]` lies in memory.
    Pairs(Operand<'a>, bool),
}

/// The activations' and the weight's side of a sum. Of the activations, blocks of inner elements lie packed behind each
/// other, in each of them all rows, [`PITCH`] apart.
pub struct Part<'a> {
    pub with: Loop,
    left: Left<'a>,
    right: Weight<'a>,
    packed: Buffer,
    /// Rows that lie packed.
    high: usize,
}

impl Part<'_> {
    /// Of `len` inner elements: pairs fill steps of 32.
    const fn words(&self, len: usize) -> usize {
        match self.with {
            Loop::Pairs => len.next_multiple_of(32) / 2,
            _ => len,
        }
    }

    /// The block of inner elements from `from` on, from the packed row `row` on.
    pub fn strip(&self, row: usize, from: usize) -> *mut f32 {
        let block = from / block_of(self.with);
        self.packed.float((block * self.high + row) * PITCH)
    }

    /// The starts of blocks and their lengths.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (inner, block) = (self.left.inner, block_of(self.with));
        (0..inner)
            .step_by(block)
            .map(move |from| (from, block.min(inner - from)))
    }

    /// Packs a block of the columns `panel`, [`COLUMNS`] of them at a time, [`STRIDE`] apart.
    ///
    /// # Safety
    /// As [`Right::pack`]; `out` has room for a panel's width rounded up to 32.
    unsafe fn pack(
        &self,
        from: usize,
        len: usize,
        panel: std::ops::Range<usize>,
        out: *mut f32,
        lines: *mut f32,
    ) {
        // SAFETY: the caller's; pairs are where the CPU has what they need.
        unsafe {
            match &self.right {
                Weight::Floats(right) => right.pack(from, len, panel, out, lines),
                Weight::Pairs(weight, true) => {
                    for column in panel.clone().step_by(COLUMNS) {
                        let out = out.add((column - panel.start) / COLUMNS * STRIDE);
                        weight.along_rows(column, from, len, true, out.cast(), lines.cast());
                    }
                }
                Weight::Pairs(weight, false) => {
                    let (start, count, lines) = (panel.start, panel.len(), lines.cast());
                    weight.across_rows(from, len, start, count, out.cast(), 4 * STRIDE, lines);
                }
            }
        }
    }
}

/// Inner elements of a block; the last one may have fewer.
const fn block_of(with: Loop) -> usize {
    match with {
        Loop::Pairs => 2 * WORDS,
        _ => WORDS,
    }
}

/// # Safety
/// As [`Product::run`], with a unit of vectors; what `adapter` has addresses of has the elements, and nothing else uses what
/// it writes.
pub unsafe fn run(
    product: &Product<'_>,
    unit: Unit,
    adapter: Option<&Adapter<'_>>,
    out: Option<Output>,
) {
    // SAFETY: the caller's.
    let work = unsafe { Work::new(product, unit, adapter, out) };
    parallel::in_turn(&work.rounds());
}

/// A product's tasks, and what they share.
pub struct Work<'a> {
    product: &'a Product<'a>,
    out: Option<Output>,
    down: Option<Down<'a>>,
    /// The base's, and the term's, of f32.
    parts: Vec<Part<'a>>,
    floats: Loop,
    /// Rows that lie packed at a time.
    high: usize,
    /// Columns of the output, and of a task.
    columns: usize,
    width: usize,
    /// Panels of the output, or of what the adapter asks for.
    panels: Vec<(Option<&'a Outer<'a>>, usize)>,
}

impl<'a> Work<'a> {
    /// # Safety
    /// As [`run`], until the last task has ended.
    pub unsafe fn new(
        product: &'a Product<'a>,
        unit: Unit,
        adapter: Option<&'a Adapter<'a>>,
        out: Option<Output>,
    ) -> Self {
        let m = product.m;
        let floats = match unit {
            Unit::Wide => Loop::Wide,
            _ => Loop::Narrow,
        };
        let with = match floats {
            Loop::Wide if product.input.is_bf16() && pairs_available() => Loop::Pairs,
            _ => floats,
        };
        let columns = if out.is_some() { product.columns() } else { 0 };
        let high = m.div_ceil(m.div_ceil(ROWS).max(1)).max(1);
        let width = panel_width(columns);
        let panels = (0..columns).step_by(width).map(|column| (None, column));
        let outer = adapter.iter().flat_map(|adapter| &adapter.outer);
        let outer = outer.flat_map(|one| {
            let starts = (0..one.columns).step_by(PANEL);
            starts.map(move |at| (Some(one), at))
        });
        Self {
            product,
            out,
            down: adapter.map(|adapter| Down::new(product, adapter, with)),
            parts: parts(product, high, with, floats),
            floats,
            high,
            columns,
            width,
            panels: panels.chain(outer).collect(),
        }
    }

    pub fn rounds(&self) -> Vec<Round<'_>> {
        let mut rounds = Vec::new();
        if let Some(down) = &self.down {
            rounds.push(Round {
                tasks: down.blocks(),
                // SAFETY: as `new` has it; blocks are the tasks' own.
                run: Box::new(move |block| unsafe { down.pack(block) }),
            });
        }
        for first in (0..self.product.m).step_by(self.high) {
            let rows = first..self.product.m.min(first + self.high);
            let own = rows.clone();
            rounds.push(Round {
                tasks: rows.len().div_ceil(HEIGHT),
                run: Box::new(move |strip| self.pack(&own, strip * HEIGHT)),
            });
            rounds.push(Round {
                tasks: self.panels.len(),
                run: Box::new(move |panel| self.panel(&rows, panel)),
            });
        }
        rounds
    }

    /// Packs the rows from row `at` of `rows` on, and makes those of the term's that the adapter makes.
    fn pack(&self, rows: &std::ops::Range<usize>, at: usize) {
        let row = rows.start + at;
        let strip = row..rows.end.min(row + HEIGHT);
        for (i, part) in self.parts.iter().enumerate() {
            // SAFETY: as `new` has it; the CPU has the features; strips of the buffers and of `narrow` do not overlap.
            unsafe {
                // The term's are made of the base's.
                let made = self.down.as_ref().filter(|_| i > 0).map(|down| Left {
                    values: Dense::F32(down.rows(strip.clone(), &self.parts[0], at)),
                    inner: part.left.inner,
                });
                let (left, strip) = match &made {
                    Some(left) => (left, 0..strip.len()),
                    None => (&part.left, strip.clone()),
                };
                for (from, len) in part.blocks() {
                    let out = part.strip(at, from);
                    match part.with {
                        Loop::Pairs => left.pack_pairs(strip.clone(), from, len, out),
                        _ => left.pack(strip.clone(), from, len, out),
                    }
                }
            }
        }
    }

    fn panel(&self, rows: &std::ops::Range<usize>, panel: usize) {
        let (outer, column) = self.panels[panel];
        // SAFETY: as `new` has it; tasks' blocks of what they write do not overlap.
        unsafe {
            if let Some(outer) = outer {
                let panel = column..outer.columns.min(column + PANEL);
                outer.add(rows.clone(), panel, self.product.rank(), self.floats);
            } else if let Some(out) = self.out {
                let panel = column..self.columns.min(column + self.width);
                block(self.product, &self.parts, rows.clone(), panel, out);
            }
        }
    }
}

/// The base's, with the loop `with`, and the term's, of f32; `rows` of them lie packed.
fn parts<'a>(product: &'a Product<'_>, rows: usize, with: Loop, floats: Loop) -> Vec<Part<'a>> {
    let forward = product.direction == Direction::Forward;
    let base = (
        with,
        product.input,
        Source::FourBit(&product.weight),
        product.inner(),
    );
    let term = product
        .term
        .map(|term| (floats, term.left, Source::Dense(term.right), term.r));
    let high = rows.next_multiple_of(HEIGHT);
    std::iter::once(base)
        .chain(term)
        .map(|(with, values, source, inner)| Part {
            with,
            left: Left { values, inner },
            right: match with {
                Loop::Pairs => {
                    let operand = Operand {
                        source,
                        rows: product.n,
                        columns: product.k,
                        planes: Planes::One,
                    };
                    Weight::Pairs(operand, forward)
                }
                _ => Weight::Floats(Right {
                    source,
                    transposed: forward,
                    inner,
                    columns: product.columns(),
                    narrow: product.input.is_bf16(),
                    wide: with == Loop::Wide,
                }),
            },
            packed: Buffer::floats(inner.div_ceil(block_of(with)) * high * PITCH),
            high,
        })
        .collect()
}

/// # Safety
/// As [`run`]; `rows` and `panel` are of the output, and no one else's.
unsafe fn block(
    product: &Product<'_>,
    parts: &[Part<'_>],
    rows: std::ops::Range<usize>,
    panel: std::ops::Range<usize>,
    out: Output,
) {
    let columns = product.columns();
    let wide = panel.len().next_multiple_of(COLUMNS);
    let start = rows.start * columns + panel.start;
    // Sums lie beside the output until they are whole: its rows may be apart by what the cache takes for one place.
    let own = Buffer::floats(rows.len() * wide);
    // SAFETY: the caller's; buffers are as large as the layouts need.
    unsafe {
        let (sums, stride) = (own.float(0), wide);
        let mut add = begin(product, &rows, &panel, out, sums, stride);
        let moving = Buffer::floats(panel.len().next_multiple_of(32) / COLUMNS * STRIDE);
        let lines = Buffer::floats(Right::LINES);
        for part in parts {
            let most = part.with.most();
            for (from, len) in part.blocks() {
                let right = moving.float(0);
                part.pack(from, len, panel.clone(), right, lines.float(0));
                for sweep in (0..rows.len()).step_by(SWEEP) {
                    let until = rows.len().min(sweep + SWEEP);
                    for column in (0..panel.len()).step_by(most * COLUMNS) {
                        let size = panel.len() - column;
                        for row in (sweep..until).step_by(most * HEIGHT) {
                            let sides = Sides {
                                left: part.strip(row, from),
                                right: right.add(column / COLUMNS * STRIDE),
                                words: part.words(len),
                            };
                            let to = sums.add(row * stride + column);
                            let height = (until - row).min(most * HEIGHT);
                            let size = size.min(most * COLUMNS);
                            let sums = Sums { to, stride, add };
                            part.with.block(&sides, sums, height, size);
                        }
                    }
                }
                add = true;
            }
        }
        for row in 0..rows.len() {
            let sums = std::slice::from_raw_parts(sums.add(row * stride), panel.len());
            let at = start + row * columns;
            match (out, parts[0].with) {
                (Output::F32(out), _) => {
                    out.add(at)
                        .copy_from_nonoverlapping(sums.as_ptr(), sums.len());
                }
                (Output::Bf16(out), Loop::Narrow) => narrow(sums, out.add(at)),
                (Output::Bf16(out), _) => narrow_wide(sums, out.add(at)),
            }
        }
    }
}

/// Writes what the sums start from, where it is not zero: true then.
///
/// # Safety
/// As [`block`].
unsafe fn begin(
    product: &Product<'_>,
    rows: &std::ops::Range<usize>,
    panel: &std::ops::Range<usize>,
    out: Output,
    sums: *mut f32,
    stride: usize,
) -> bool {
    if product.bias.is_none() && !product.accumulate {
        return false;
    }
    for row in 0..rows.len() {
        // SAFETY: the caller's.
        unsafe {
            let sums = std::slice::from_raw_parts_mut(sums.add(row * stride), panel.len());
            let at = (rows.start + row) * product.columns() + panel.start;
            match out {
                _ if !product.accumulate => sums.fill(0.0),
                Output::F32(out) => {
                    let old = out.add(at).cast_const();
                    sums.as_mut_ptr().copy_from_nonoverlapping(old, sums.len());
                }
                Output::Bf16(out) => {
                    let old = std::slice::from_raw_parts(out.add(at), sums.len());
                    widen(old, sums.as_mut_ptr());
                }
            }
            if let Some(bias) = product.bias {
                for (sum, bias) in sums.iter_mut().zip(&bias[panel.clone()]) {
                    *sum += bias;
                }
            }
        }
    }
    true
}

/// Narrower for small outputs, that there be some tasks for every thread.
fn panel_width(columns: usize) -> usize {
    let mut width = PANEL;
    while width > COLUMNS && columns.div_ceil(width) < 4 * parallel::threads() {
        width /= 2;
    }
    width
}
