//! (IA)³ on the CPU (Liu et al., 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and
//! Cheaper than In-Context Learning"): a learned vector l multiplies what a projection puts out,
//! `y = l ∘ (x·Wᵀ + bias)`, or, in a feed-forward layer, what it takes in, `y = (l ∘ x)·Wᵀ + bias`.

use rayon::prelude::*;

use super::{Base, Group, Member};
use crate::error::Result;
use crate::matmul::{Into, Mat, MatMut, Threads, columns_of, matmul};
use crate::scratch::Scratch;

/// What the (IA)³ vector of a projection multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scaled {
    /// Its output, with the bias: l is `[n, 1]`.
    Output,
    /// Its input: l is `[1, k]`.
    Input,
}

/// Columns whose sums one rayon task makes. Fixed, so that no sum depends on the threads.
const COLUMNS: usize = 64;

/// One member's place: its columns in y, its vector in theta, its columns in what forward saves.
struct Place<'a> {
    member: &'a Member,
    column: usize,
    vector: std::ops::Range<usize>,
    saved: usize,
}

impl Group {
    /// Whether a member has an (IA)³ vector.
    pub(super) fn is_scaled(&self) -> bool {
        self.members.iter().any(|member| member.scaled.is_some())
    }

    /// Elements of a member's vector.
    pub(super) fn vector_len(&self, member: &Member) -> usize {
        match member.scaled {
            None => 0,
            Some(Scaled::Output) => member.n,
            Some(Scaled::Input) => self.k,
        }
    }

    fn scaled_places(&self) -> Vec<Place<'_>> {
        let (mut column, mut vector, mut saved) = (0, 0, 0);
        let place = |member| {
            let place = Place {
                member,
                column,
                vector: vector..vector + self.vector_len(member),
                saved,
            };
            column += member.n;
            vector = place.vector.end;
            if member.scaled == Some(Scaled::Output) {
                saved += member.n;
            }
            place
        };
        self.members.iter().map(place).collect()
    }

    /// Σn of the members whose output is multiplied: the width of what forward saves.
    fn saved_width(&self) -> usize {
        let outputs = self.members.iter();
        outputs
            .filter(|member| member.scaled == Some(Scaled::Output))
            .map(|member| member.n)
            .sum()
    }

    fn has_scaled_input(&self) -> bool {
        let mut members = self.members.iter();
        members.any(|member| member.scaled == Some(Scaled::Input))
    }

    /// `y` `[m, Σn]`, and the outputs before they are multiplied `[m, Σn of those members]`.
    pub(super) fn scaled_forward(&self, x: &[f32], theta: &[f32]) -> Result<(Scratch, Scratch)> {
        let (k, width, kept) = (self.k, self.width(), self.saved_width());
        let m = x.len() / k;
        let mut y = Scratch::dirty(m * width);
        let places = self.scaled_places();
        self.with_weights(theta, |w| {
            if !self.has_scaled_input() {
                let (x, w) = (Mat::new(x, m, k), Mat::new(w, width, k));
                let out = MatMut::new(&mut y, m, width);
                matmul(out, Into::Overwrite, 1.0, x, w.t(), Threads::All);
                return;
            }
            let mut scaled = Scratch::dirty(m * k);
            for place in &places {
                let (n, column) = (place.member.n, place.column);
                let mut input = x;
                if place.member.scaled == Some(Scaled::Input) {
                    scaled.copy_from_slice(x);
                    multiply(&mut scaled, k, 0, &theta[place.vector.clone()]);
                    input = &scaled;
                }
                let w = Mat::new(&w[column * k..(column + n) * k], n, k);
                let out = MatMut::columns_of(&mut y, m, width, column..column + n);
                let input = Mat::new(input, m, k);
                matmul(out, Into::Overwrite, 1.0, input, w.t(), Threads::All);
            }
        })?;
        self.add_biases(theta, &mut y);
        let mut saved = Scratch::dirty(m * kept);
        for place in &places {
            if place.member.scaled == Some(Scaled::Output) {
                let (n, from) = (place.member.n, place.column);
                let rows = saved.chunks_exact_mut(kept).zip(y.chunks_exact(width));
                for (out, row) in rows {
                    out[place.saved..place.saved + n].copy_from_slice(&row[from..from + n]);
                }
                multiply(&mut y, width, from, &theta[place.vector.clone()]);
            }
        }
        Ok((y, saved))
    }

    /// Gradients for `dy` `[m, Σn]`: the vectors' in `dtheta`, and `dx` `[m, k]` where one is wanted.
    pub(super) fn scaled_backward(
        &self,
        x: &[f32],
        theta: &[f32],
        saved: &[f32],
        dy: &[f32],
        mut dx: Option<&mut [f32]>,
        dtheta: &mut [f32],
    ) -> Result<()> {
        let (k, width, kept) = (self.k, self.width(), self.saved_width());
        let m = x.len() / k;
        let places = self.scaled_places();
        let mut d = Scratch::dirty(dy.len());
        d.copy_from_slice(dy);
        for place in &places {
            if place.member.scaled == Some(Scaled::Output) {
                let own = place.vector.clone();
                let columns = (
                    Columns(dy, width, place.column),
                    Columns(saved, kept, place.saved),
                );
                sums_of_products(columns.0, columns.1, &mut dtheta[own.clone()]);
                multiply(&mut d, width, place.column, &theta[own]);
            }
        }
        self.with_weights(theta, |w| {
            if !self.has_scaled_input() {
                if let Some(dx) = dx {
                    let (d, w) = (Mat::new(&d, m, width), Mat::new(w, width, k));
                    let into = MatMut::new(dx, m, k);
                    matmul(into, Into::Overwrite, 1.0, d, w, Threads::All);
                }
                return;
            }
            if let Some(dx) = dx.as_deref_mut() {
                dx.fill(0.0);
            }
            let mut own = Scratch::dirty(m * k);
            for place in &places {
                let (n, column) = (place.member.n, place.column);
                let d = columns_of(&d, m, width, column..column + n);
                let w = Mat::new(&w[column * k..(column + n) * k], n, k);
                matmul(
                    MatMut::new(&mut own, m, k),
                    Into::Overwrite,
                    1.0,
                    d,
                    w,
                    Threads::All,
                );
                if place.member.scaled == Some(Scaled::Input) {
                    let vector = place.vector.clone();
                    let columns = (Columns(x, k, 0), Columns(&own, k, 0));
                    sums_of_products(columns.0, columns.1, &mut dtheta[vector.clone()]);
                    multiply(&mut own, k, 0, &theta[vector]);
                }
                if let Some(dx) = dx.as_deref_mut() {
                    for (dx, own) in dx.iter_mut().zip(own.iter()) {
                        *dx += own;
                    }
                }
            }
        })
    }

    /// Multiplies the vector `l` into a weight `[n, k]`.
    pub fn merge_scaled(scaled: Scaled, l: &[f32], weight: &mut [f32]) {
        match scaled {
            Scaled::Input => multiply(weight, l.len(), 0, l),
            Scaled::Output => {
                let k = weight.len() / l.len();
                for (row, l) in weight.chunks_exact_mut(k).zip(l) {
                    for value in row.iter_mut() {
                        *value *= l;
                    }
                }
            }
        }
    }

    /// A member's frozen bias `[n]`.
    pub fn frozen_bias(&self, member: usize) -> Option<&[f32]> {
        match &self.base {
            Base::Frozen { biases, .. } => biases[member].as_deref(),
            Base::Trained { .. } => None,
        }
    }
}

/// Multiplies the columns from `first` on of rows of `width` by `by`.
fn multiply(values: &mut [f32], width: usize, first: usize, by: &[f32]) {
    values.par_chunks_mut(width * 64).for_each(|rows| {
        for row in rows.chunks_exact_mut(width) {
            for (value, by) in row[first..first + by.len()].iter_mut().zip(by) {
                *value *= by;
            }
        }
    });
}

/// Columns of a row-major matrix: values, width, first column.
#[derive(Clone, Copy)]
struct Columns<'a>(&'a [f32], usize, usize);

/// `out[j] = Σ over the rows of a[·, j] · b[·, j]`, in f64.
fn sums_of_products(a: Columns<'_>, b: Columns<'_>, out: &mut [f32]) {
    let chunks = out.par_chunks_mut(COLUMNS).enumerate();
    chunks.for_each(|(chunk, out)| {
        let mut sums = [0.0f64; COLUMNS];
        let part = |columns: Columns<'_>, row: usize| {
            let from = row * columns.1 + columns.2 + chunk * COLUMNS;
            from..from + out.len()
        };
        for row in 0..a.0.len() / a.1 {
            let (a, b) = (&a.0[part(a, row)], &b.0[part(b, row)]);
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum += f64::from(*a) * f64::from(*b);
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum as f32;
        }
    });
}
