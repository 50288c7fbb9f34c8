//! Attention of each token to a span of its row, with grouped key/value heads, in tiles of query rows.
//!
//! Only the log-sum-exp of each row is kept for backward; the probabilities are computed again
//! (Dao et al., 2022, "FlashAttention").

use rayon::prelude::*;

use super::rope::Heads;
use crate::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::scratch::Scratch;
use crate::simd::{dot, exp, max, sum, vectorized};

/// Query rows whose scores are held at once.
const TILE: usize = 64;

/// For each token, the first token of its row that it may attend to: where its document starts.
///
/// `positions` `[b, t]`; a position of 0 starts a document.
fn document_starts(positions: &[u32], t: usize) -> Vec<u32> {
    let mut starts = Vec::with_capacity(positions.len());
    for row in positions.chunks(t.max(1)) {
        let mut start = 0;
        for (at, &position) in row.iter().enumerate() {
            if position == 0 {
                start = at as u32;
            }
            starts.push(start);
        }
    }
    starts
}

/// The tokens of its own row that each token may attend to, `start..end`; neither ever decreases
/// along a row, and no span is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spans {
    pub starts: Vec<u32>,
    pub ends: Vec<u32>,
}

impl Spans {
    /// Each token sees its document up to itself. `positions` `[b, t]`; a position of 0 starts a document.
    pub fn causal(positions: &[u32], t: usize) -> Self {
        Self {
            starts: document_starts(positions, t),
            ends: (0..positions.len()).map(|at| (at % t) as u32 + 1).collect(),
        }
    }

    /// Each token sees its row's first `lengths[row]` tokens: what stands behind them is padding.
    pub fn rows(lengths: &[usize], t: usize) -> Self {
        let ends = lengths
            .iter()
            .flat_map(|&n| std::iter::repeat_n(n as u32, t));
        Self {
            starts: vec![0; lengths.len() * t],
            ends: ends.collect(),
        }
    }

    fn of_row(&self, row: usize, t: usize) -> RowSpans<'_> {
        RowSpans {
            starts: &self.starts[row * t..][..t],
            ends: &self.ends[row * t..][..t],
        }
    }
}

#[derive(Clone, Copy)]
struct RowSpans<'a> {
    starts: &'a [u32],
    ends: &'a [u32],
}

impl RowSpans<'_> {
    /// The span of token `at`, from key `from` on.
    fn visible(self, at: usize, from: usize) -> std::ops::Range<usize> {
        self.starts[at] as usize - from..self.ends[at] as usize - from
    }
}

/// The parts of one key/value group's block `[group + 2, t, d]`.
struct Block<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

fn block(qkv: &[f32], index: usize, heads: Heads) -> Block<'_> {
    let head = heads.t * heads.d;
    let group = heads.group();
    let all = &qkv[index * (group + 2) * head..(index + 1) * (group + 2) * head];
    let (q, kv) = all.split_at(group * head);
    let (k, v) = kv.split_at(head);
    Block { q, k, v }
}

/// Tiles of query rows: (first row, rows, first key, keys). Spans never move back along a row, so
/// the first row's start and the last one's end bound the tile's.
fn tiles(t: usize, spans: RowSpans<'_>) -> impl Iterator<Item = (usize, usize, usize, usize)> + '_ {
    (0..t).step_by(TILE).map(move |first| {
        let rows = TILE.min(t - first);
        let from = spans.starts[first] as usize;
        let keys = spans.ends[first + rows - 1] as usize - from;
        (first, rows, from, keys)
    })
}

fn scale(heads: Heads) -> f32 {
    1.0 / (heads.d as f32).sqrt()
}

/// `out` `[b, h, t, d]` and each query's log-sum-exp `[b, h, t]` for `qkv` `[b, hkv, group + 2, t, d]`.
pub fn attention(qkv: &[f32], heads: Heads, spans: &Spans, out: &mut [f32], lse: &mut [f32]) {
    let Heads { t, d, h, .. } = heads;
    let group = heads.group();
    out.par_chunks_mut(t * d)
        .zip(lse.par_chunks_mut(t))
        .enumerate()
        .for_each(|(index, (out, lse))| {
            let Block { q, k, v } = block(qkv, index / group, heads);
            let q = &q[index % group * t * d..];
            let spans = spans.of_row(index / h, t);
            let mut scores = Scratch::dirty(TILE.min(t) * t);
            for (first, rows, from, keys) in tiles(t, spans) {
                let scores = &mut scores[..rows * keys];
                let tile = Mat::new(&q[first * d..(first + rows) * d], rows, d);
                let k = Mat::new(&k[from * d..(from + keys) * d], keys, d);
                let into = MatMut::new(scores, rows, keys);
                matmul(
                    into,
                    Into::Overwrite,
                    scale(heads),
                    tile,
                    k.t(),
                    Threads::One,
                );
                vectorized(|| {
                    for (at, row) in scores.chunks_exact_mut(keys).enumerate() {
                        lse[first + at] = softmax(row, spans.visible(first + at, from));
                    }
                });
                let v = Mat::new(&v[from * d..(from + keys) * d], keys, d);
                let out = MatMut::new(&mut out[first * d..(first + rows) * d], rows, d);
                let scores = Mat::new(scores, rows, keys);
                matmul(out, Into::Overwrite, 1.0, scores, v, Threads::One);
            }
        });
}

/// Softmax of the visible part of `row` in place, zero elsewhere; gives the log-sum-exp.
#[inline(always)]
fn softmax(row: &mut [f32], visible: std::ops::Range<usize>) -> f32 {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    let top = max(row);
    for value in row.iter_mut() {
        *value = exp(*value - top);
    }
    let total = sum(row, |v| v);
    let reciprocal = 1.0 / total;
    for value in row.iter_mut() {
        *value *= reciprocal;
    }
    top + total.ln()
}

/// `d_qkv` `[b, hkv, group + 2, t, d]` for `d_out` `[b, h, t, d]`, from what forward got and gave.
pub fn attention_backward(
    qkv: &[f32],
    heads: Heads,
    spans: &Spans,
    out: &[f32],
    lse: &[f32],
    d_out: &[f32],
    d_qkv: &mut [f32],
) {
    let Heads { t, d, hkv, .. } = heads;
    let (group, head) = (heads.group(), t * d);
    d_qkv
        .par_chunks_mut((group + 2) * head)
        .enumerate()
        .for_each(|(index, d_block)| {
            let Block { q, k, v } = block(qkv, index, heads);
            let (dq, d_kv) = d_block.split_at_mut(group * head);
            let (dk, dv) = d_kv.split_at_mut(head);
            dk.fill(0.0);
            dv.fill(0.0);
            let spans = spans.of_row(index / hkv, t);
            let mut p = Scratch::dirty(TILE.min(t) * t);
            let mut ds = Scratch::dirty(TILE.min(t) * t);
            for member in 0..group {
                let of = index * group + member;
                let q = &q[member * head..(member + 1) * head];
                let dq = &mut dq[member * head..(member + 1) * head];
                let (out, d_out) = (&out[of * head..][..head], &d_out[of * head..][..head]);
                let lse = &lse[of * t..][..t];
                for (first, rows, from, keys) in tiles(t, spans) {
                    let (p, ds) = (&mut p[..rows * keys], &mut ds[..rows * keys]);
                    let queries = first * d..(first + rows) * d;
                    let span = from * d..(from + keys) * d;
                    let q = Mat::new(&q[queries.clone()], rows, d);
                    let k = Mat::new(&k[span.clone()], keys, d);
                    let v = Mat::new(&v[span.clone()], keys, d);
                    let dy = Mat::new(&d_out[queries.clone()], rows, d);
                    let one = Threads::One;
                    let into = MatMut::new(p, rows, keys);
                    matmul(into, Into::Overwrite, scale(heads), q, k.t(), one);
                    let into = MatMut::new(ds, rows, keys);
                    matmul(into, Into::Overwrite, 1.0, dy, v.t(), one);
                    vectorized(|| {
                        let both = p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys));
                        for (at, (p, ds)) in both.enumerate() {
                            let row = first + at;
                            let token = row * d..(row + 1) * d;
                            let along = dot(&out[token.clone()], &d_out[token]);
                            let visible = spans.visible(row, from);
                            probabilities_backward(p, ds, visible, lse[row], along);
                        }
                    });
                    let (p, ds) = (Mat::new(p, rows, keys), Mat::new(ds, rows, keys));
                    let into = MatMut::new(&mut dv[span.clone()], keys, d);
                    matmul(into, Into::Accumulate, 1.0, p.t(), dy, one);
                    let into = MatMut::new(&mut dk[span], keys, d);
                    matmul(into, Into::Accumulate, scale(heads), ds.t(), q, one);
                    let into = MatMut::new(&mut dq[queries], rows, d);
                    matmul(into, Into::Overwrite, scale(heads), ds, k, one);
                }
            }
        });
}

/// Scores to probabilities in `p`, and their gradient to the scores' in `ds`.
#[inline(always)]
fn probabilities_backward(
    p: &mut [f32],
    ds: &mut [f32],
    visible: std::ops::Range<usize>,
    lse: f32,
    along: f32,
) {
    for part in [&mut *p, &mut *ds] {
        part[..visible.start].fill(0.0);
        part[visible.end..].fill(0.0);
    }
    let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = exp(*p - lse);
        *ds = *p * (*ds - along);
    }
}
