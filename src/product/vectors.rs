//! The product in f32 vectors (AVX2 with FMA), for CPUs without wider units.
//!
//! The activations lie packed, [`ROWS`] of them at a time; the weight is dequantised panel by panel, straight into the
//! order in which the inner loop reads it, and never lies in memory whole. Sums are in f32: of each [`INNER`] terms by
//! fused multiply-adds, and of those sums. It is exact for what f32 itself is, infinities and NaN included.

use super::adapter::{Adapter, Down};
use super::blocks::{Buffer, Direction, Product};
use super::micro::{COLUMNS, HEIGHT, multiply};
use super::output::Output;
use super::panels::{Left, Right, STRIDE, narrow, widen};
use super::tiles::{Dense, Source};
use crate::parallel;

/// Rows of the activations that lie packed at a time, at most.
const ROWS: usize = 512;

/// Rows that one panel of the weight meets in a row: their packed values stay in a core's cache.
const SWEEP: usize = 20 * HEIGHT;

/// Terms of a sum that are added up in registers.
pub const INNER: usize = 192;

/// Columns of the output that a task takes, at most.
pub const PANEL: usize = 16 * COLUMNS;

/// Whether this CPU has what the loops are written for.
pub fn available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// The activations' and the weight's side of a sum. Of the activations, blocks of [`INNER`] inner elements lie packed
/// behind each other, in each of them strips of [`HEIGHT`] rows.
pub struct Part<'a> {
    left: Left<'a>,
    right: Right<'a>,
    packed: Buffer,
    /// Rows that lie packed.
    high: usize,
}

impl Part<'_> {
    /// Inner elements `from..from + len`, a block, of the strip from the packed row `row` on.
    pub fn strip(&self, row: usize, from: usize, len: usize) -> *mut f32 {
        self.packed.float(self.high * from + row * len)
    }

    /// The starts of blocks and their lengths.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let inner = self.left.inner;
        (0..inner)
            .step_by(INNER)
            .map(move |from| (from, INNER.min(inner - from)))
    }
}

impl Product<'_> {
    /// Writes the product to `out`, if that is asked for, in vectors, and what the adapter asks for.
    ///
    /// # Safety
    /// [`Unit::Vectors`] is available; `out` and what the adapter writes to have their elements, which nothing else
    /// uses, and what it reads has its own.
    ///
    /// # Panics
    /// If sizes do not fit.
    pub unsafe fn run_with(&self, adapter: &Adapter<'_>, out: Option<Output>) {
        assert!(adapter.by.len() == self.inner() * self.rank(), "by");
        assert!(
            self.bias.is_none_or(|bias| bias.len() == self.columns()),
            "bias"
        );
        // SAFETY: the caller's.
        unsafe { run(self, Some(adapter), out) };
    }
}

/// # Safety
/// As [`Product::run`], with [`available`]; what `adapter` has addresses of has the elements, and nothing else uses what
/// it writes.
pub unsafe fn run(product: &Product<'_>, adapter: Option<&Adapter<'_>>, out: Option<Output>) {
    let m = product.m;
    let columns = if out.is_some() { product.columns() } else { 0 };
    let high = m.div_ceil(m.div_ceil(ROWS).max(1)).max(1);
    let width = panel_width(columns);
    let down = adapter.map(|adapter| Down::new(product, adapter));
    for first in (0..m).step_by(high) {
        let rows = first..m.min(first + high);
        let parts = parts(product, down.as_ref(), &rows);
        let panels = (0..columns).step_by(width).map(|column| (None, column));
        let outer = adapter.iter().flat_map(|adapter| &adapter.outer);
        let outer = outer.flat_map(|one| {
            (0..one.columns)
                .step_by(PANEL)
                .map(move |at| (Some(one), at))
        });
        let tasks: Vec<_> = panels.chain(outer).collect();
        parallel::for_each(tasks.into_iter(), |(outer, column)| {
            // SAFETY: the caller's; tasks' blocks of what they write do not overlap.
            unsafe {
                if let Some(outer) = outer {
                    let panel = column..outer.columns.min(column + PANEL);
                    outer.add(rows.clone(), panel, product.rank());
                } else if let Some(out) = out {
                    let panel = column..columns.min(column + width);
                    block(product, &parts, rows.clone(), panel, out);
                }
            }
        });
    }
}

fn parts<'a>(
    product: &'a Product<'_>,
    down: Option<&Down<'_>>,
    rows: &std::ops::Range<usize>,
) -> Vec<Part<'a>> {
    let forward = product.direction == Direction::Forward;
    let base = (
        product.input,
        Source::FourBit(&product.weight),
        product.inner(),
    );
    let term = product
        .term
        .map(|term| (term.left, Source::Dense(term.right), term.r));
    let parts = std::iter::once(base).chain(term);
    let high = rows.len().next_multiple_of(HEIGHT);
    let parts: Vec<_> = parts
        .map(|(values, source, inner)| Part {
            left: Left { values, inner },
            right: Right {
                source,
                transposed: forward,
                inner,
                columns: product.columns(),
                narrow: product.input.is_bf16(),
            },
            packed: Buffer::floats(high * inner),
            high,
        })
        .collect();
    parallel::for_each(rows.clone().step_by(HEIGHT), |row| {
        let (at, strip) = (row - rows.start, row..rows.end.min(row + HEIGHT));
        for (i, part) in parts.iter().enumerate() {
            // SAFETY: the CPU has the features; strips of the buffers and of `narrow` do not overlap.
            unsafe {
                // The term's are made of the base's.
                let made = down.filter(|_| i > 0).map(|down| Left {
                    values: Dense::F32(down.rows(strip.clone(), &parts[0], at)),
                    inner: part.left.inner,
                });
                let (left, strip) = match &made {
                    Some(left) => (left, 0..strip.len()),
                    None => (&part.left, strip.clone()),
                };
                for (from, len) in part.blocks() {
                    left.pack(strip.clone(), from, len, part.strip(at, from, len));
                }
            }
        }
    });
    parts
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
    // Sums of a 16-bit output lie beside it until they are whole.
    let own = match out {
        Output::F32(_) => None,
        Output::Bf16(_) => Some(Buffer::floats(rows.len() * wide)),
    };
    // SAFETY: the caller's; buffers are as large as the layouts need.
    unsafe {
        let (sums, stride) = match (out, &own) {
            (_, Some(own)) => (own.float(0), wide),
            (Output::F32(out), None) => (out.add(start), columns),
            (Output::Bf16(_), None) => unreachable!(),
        };
        let begun = begin(product, &rows, &panel, out, sums, stride);
        let mut add = begun;
        let moving = Buffer::floats(wide / COLUMNS * STRIDE);
        let lines = Buffer::floats(Right::LINES);
        for part in parts {
            for (from, len) in part.blocks() {
                let right = moving.float(0);
                part.right
                    .pack(from, len, panel.clone(), right, lines.float(0));
                for sweep in (0..rows.len()).step_by(SWEEP) {
                    let until = rows.len().min(sweep + SWEEP);
                    for column in (0..panel.len()).step_by(COLUMNS) {
                        let right = right.add(column / COLUMNS * STRIDE);
                        let size = COLUMNS.min(panel.len() - column);
                        for row in (sweep..until).step_by(HEIGHT) {
                            let left = part.strip(row, from, len);
                            let height = HEIGHT.min(rows.len() - row);
                            let at = sums.add(row * stride + column);
                            if (height, size) == (HEIGHT, COLUMNS) {
                                multiply(left, right, len, at, stride, add);
                            } else {
                                edge(left, right, len, at, stride, add, height, size);
                            }
                        }
                    }
                }
                add = true;
            }
        }
        if let (Output::Bf16(out), Some(_)) = (out, &own) {
            for row in 0..rows.len() {
                let sums = std::slice::from_raw_parts(sums.add(row * stride), panel.len());
                narrow(sums, out.add(start + row * columns));
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
                Output::F32(_) => {}
                Output::Bf16(out) => {
                    widen(std::slice::from_raw_parts(out.add(at), sums.len()), sums);
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

/// A block at the right or lower end.
///
/// # Safety
/// As `multiply`, of a block of `height` by `size`.
#[cold]
unsafe fn edge(
    left: *const f32,
    right: *const f32,
    inner: usize,
    sums: *mut f32,
    stride: usize,
    add: bool,
    height: usize,
    size: usize,
) {
    let mut whole = [0.0_f32; HEIGHT * COLUMNS];
    // SAFETY: the caller's; packed sides have whole blocks.
    unsafe {
        multiply(left, right, inner, whole.as_mut_ptr(), COLUMNS, false);
        for row in 0..height {
            let to = std::slice::from_raw_parts_mut(sums.add(row * stride), size);
            for (to, found) in to.iter_mut().zip(&whole[row * COLUMNS..]) {
                *to = if add { *to + found } else { *found };
            }
        }
    }
}

/// Narrower for small outputs, that there be some tasks for every thread.
fn panel_width(columns: usize) -> usize {
    let mut width = PANEL;
    while width > COLUMNS && columns.div_ceil(width) < 4 * parallel::threads() {
        width /= 2;
    }
    width
}
