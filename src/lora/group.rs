//! Projections that share their input, as one operation.

use rayon::prelude::*;

use super::{Dropout, FrozenWeight, Scaled};
use crate::error::Result;
use crate::matmul::{Into, Mat, MatMut, Threads, columns_of, matmul};
use crate::scratch::Scratch;
use crate::simd::vectorized;

/// LoRA's rank and scaling for one projection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapter {
    pub r: usize,
    /// `lora_alpha / r`, or `lora_alpha / √r` with rsLoRA.
    pub scaling: f32,
}

/// One projection of a [`Group`]: `n` out features.
#[derive(Debug, Clone)]
pub struct Member {
    pub name: String,
    pub n: usize,
    pub adapter: Option<Adapter>,
    /// An (IA)³ vector's place; none where there is a LoRA adapter.
    pub scaled: Option<Scaled>,
}

/// Where the base weights of a [`Group`] live.
#[derive(Debug, Clone)]
pub enum Base {
    /// One weight `[n, k]` and one optional bias `[n]` a member.
    Frozen {
        weights: Vec<FrozenWeight>,
        biases: Vec<Option<Vec<f32>>>,
    },
    /// Weights (and biases, where `biases` says so) are the group's trained parameters.
    Trained { biases: Vec<bool> },
}

/// Projections `y_i = x·W_iᵀ + bias_i + scaling_i · dropout_i(x)·A_iᵀ·B_iᵀ` of one input
/// `x` `[m, k]`, their outputs side by side in `y` `[m, Σn]`.
///
/// What is trained lies in one flat slice `theta`: with a frozen base all `A_i` `[r_i, k]` one
/// after another, then all `B_i` `[n_i, r_i]` (or the members' (IA)³ vectors); with a trained base all `W_i` `[n_i, k]`, then the
/// biases.
#[derive(Debug, Clone)]
pub struct Group {
    pub k: usize,
    pub members: Vec<Member>,
    pub base: Base,
}

impl Group {
    /// Σn: the width of the output.
    pub fn width(&self) -> usize {
        self.members.iter().map(|member| member.n).sum()
    }

    /// Σr: the width of H and G.
    pub fn rank(&self) -> usize {
        self.adapters().map(|(_, adapter)| adapter.r).sum()
    }

    pub(super) fn adapters(&self) -> impl Iterator<Item = (&Member, Adapter)> {
        self.members
            .iter()
            .filter_map(|member| Some((member, member.adapter?)))
    }

    /// All base weights under each other, `[Σn, k]` in f32: in `theta` when trained, else in scratch.
    pub(super) fn with_weights<R>(
        &self,
        theta: &[f32],
        work: impl FnOnce(&[f32]) -> R,
    ) -> Result<R> {
        match &self.base {
            Base::Frozen { weights, .. } => {
                if let [FrozenWeight::F32(values)] = weights.as_slice() {
                    Ok(work(values))
                } else {
                    let mut wide = Scratch::dirty(self.width() * self.k);
                    let mut rest = &mut wide[..];
                    for weight in weights {
                        let (out, after) = rest.split_at_mut(weight.len());
                        weight.widen_into(out)?;
                        rest = after;
                    }
                    Ok(work(&wide))
                }
            }
            Base::Trained { .. } => Ok(work(&theta[..self.width() * self.k])),
        }
    }

    pub(super) fn add_biases(&self, theta: &[f32], y: &mut [f32]) {
        let width = self.width();
        let mut bias = vec![0.0f32; width];
        let mut any = false;
        let mut column = 0;
        let mut trained = self.width() * self.k;
        for (at, member) in self.members.iter().enumerate() {
            let own = match &self.base {
                Base::Frozen { biases, .. } => biases[at].as_deref(),
                Base::Trained { biases } => biases[at].then(|| {
                    let start = trained;
                    trained += member.n;
                    &theta[start..trained]
                }),
            };
            if let Some(own) = own {
                bias[column..column + member.n].copy_from_slice(own);
                any = true;
            }
            column += member.n;
        }
        if any {
            y.par_chunks_mut(width * 64).for_each(|rows| {
                vectorized(|| {
                    for row in rows.chunks_mut(width) {
                        for (value, &bias) in row.iter_mut().zip(&bias) {
                            *value += bias;
                        }
                    }
                });
            });
        }
    }

    /// `y` `[m, Σn]` and the saved `H` `[m, Σr]`, H_i = scaling_i · dropout_i(x)·A_iᵀ, for `x` `[m, k]`.
    ///
    /// Member i draws its mask from stream `dropout.stream + i`.
    pub fn forward(
        &self,
        x: &[f32],
        theta: &[f32],
        dropout: Option<Dropout>,
    ) -> Result<(Scratch, Scratch)> {
        if self.is_scaled() {
            return self.scaled_forward(x, theta);
        }
        let (k, width, rank) = (self.k, self.width(), self.rank());
        let m = x.len() / k;
        let mut y = Scratch::dirty(m * width);
        let mut h = Scratch::dirty(m * rank);
        self.project_down(x, theta, dropout, &mut h);
        let mut column = 0;
        let mut place = self.places();
        for member in &self.members {
            let columns = column..column + member.n;
            column = columns.end;
            let out = MatMut::columns_of(&mut y, m, width, columns);
            if let Some(adapter) = member.adapter {
                let (r0, b) = place.next_b(member.n, adapter.r);
                let b = Mat::new(&theta[b], member.n, adapter.r);
                let h = columns_of(&h, m, rank, r0..r0 + adapter.r);
                matmul(out, Into::Overwrite, 1.0, h, b.t(), Threads::All);
            } else if rank > 0 {
                let none = columns_of(&[], m, 0, 0..0);
                matmul(
                    out,
                    Into::Overwrite,
                    1.0,
                    none,
                    Mat::new(&[], 0, member.n),
                    Threads::All,
                );
            }
        }
        let into = if rank > 0 {
            Into::Accumulate
        } else {
            Into::Overwrite
        };
        self.with_weights(theta, |w| {
            let out = MatMut::new(&mut y, m, width);
            let (x, w) = (Mat::new(x, m, k), Mat::new(w, width, k));
            matmul(out, into, 1.0, x, w.t(), Threads::All);
        })?;
        self.add_biases(theta, &mut y);
        Ok((y, h))
    }

    /// H of every member: one pass over x without dropout, one a member with it.
    fn project_down(&self, x: &[f32], theta: &[f32], dropout: Option<Dropout>, h: &mut [f32]) {
        let (k, rank) = (self.k, self.rank());
        if rank == 0 {
            return;
        }
        let m = x.len() / k;
        match dropout {
            None => {
                let a = Mat::new(&theta[..rank * k], rank, k);
                matmul(
                    MatMut::new(h, m, rank),
                    Into::Overwrite,
                    1.0,
                    Mat::new(x, m, k),
                    a.t(),
                    Threads::All,
                );
            }
            Some(dropout) => {
                let mut dropped = Scratch::dirty(m * k);
                let mut row = 0;
                for (at, member) in self.members.iter().enumerate() {
                    let Some(adapter) = member.adapter else {
                        continue;
                    };
                    dropout
                        .stream(dropout.stream + at as u64)
                        .apply(x, &mut dropped);
                    let a = Mat::new(&theta[row * k..(row + adapter.r) * k], adapter.r, k);
                    let out = MatMut::columns_of(h, m, rank, row..row + adapter.r);
                    let dropped = Mat::new(&dropped, m, k);
                    matmul(out, Into::Overwrite, 1.0, dropped, a.t(), Threads::All);
                    row += adapter.r;
                }
            }
        }
        let scale: Vec<f32> = self
            .adapters()
            .flat_map(|(_, adapter)| std::iter::repeat_n(adapter.scaling, adapter.r))
            .collect();
        h.par_chunks_mut(rank * 256).for_each(|rows| {
            vectorized(|| {
                for row in rows.chunks_mut(rank) {
                    for (value, &scale) in row.iter_mut().zip(&scale) {
                        *value *= scale;
                    }
                }
            });
        });
    }

    /// Gradients for `dy` `[m, Σn]`: written to `dtheta`, and to `dx` `[m, k]` where one is wanted.
    pub fn backward(
        &self,
        x: &[f32],
        theta: &[f32],
        h: &[f32],
        dy: &[f32],
        dropout: Option<Dropout>,
        mut dx: Option<&mut [f32]>,
        dtheta: &mut [f32],
    ) -> Result<()> {
        if self.is_scaled() {
            return self.scaled_backward(x, theta, h, dy, dx, dtheta);
        }
        let (k, width, rank) = (self.k, self.width(), self.rank());
        let m = x.len() / k;
        let mut g = Scratch::dirty(m * rank);
        self.project_up_backward(theta, h, dy, &mut g, dtheta);
        if let Base::Trained { biases } = &self.base {
            self.trained_backward(x, dy, biases, dtheta);
        }
        let mut filled = false;
        if rank > 0 {
            match dropout {
                None => {
                    let (da, _) = dtheta.split_at_mut(rank * k);
                    let g = Mat::new(&g, m, rank);
                    let out = MatMut::new(da, rank, k);
                    matmul(
                        out,
                        Into::Overwrite,
                        1.0,
                        g.t(),
                        Mat::new(x, m, k),
                        Threads::All,
                    );
                    if let Some(dx) = dx.as_deref_mut() {
                        let a = Mat::new(&theta[..rank * k], rank, k);
                        matmul(
                            MatMut::new(dx, m, k),
                            Into::Overwrite,
                            1.0,
                            g,
                            a,
                            Threads::All,
                        );
                        filled = true;
                    }
                }
                Some(dropout) => {
                    if let Some(dx) = dx.as_deref_mut() {
                        dx.fill(0.0);
                        filled = true;
                    }
                    self.dropped_backward(x, theta, &g, dropout, dx.as_deref_mut(), dtheta);
                }
            }
        }
        if let Some(dx) = dx {
            let into = if filled {
                Into::Accumulate
            } else {
                Into::Overwrite
            };
            self.with_weights(theta, |w| {
                let (dy, w) = (Mat::new(dy, m, width), Mat::new(w, width, k));
                matmul(MatMut::new(dx, m, k), into, 1.0, dy, w, Threads::All);
            })?;
        }
        Ok(())
    }

    /// G_i = scaling_i · dY_i·B_i and dB_i = dY_iᵀ·H_i.
    fn project_up_backward(
        &self,
        theta: &[f32],
        h: &[f32],
        dy: &[f32],
        g: &mut [f32],
        dtheta: &mut [f32],
    ) {
        let (width, rank) = (self.width(), self.rank());
        let m = dy.len() / width;
        let mut column = 0;
        let mut place = self.places();
        for member in &self.members {
            let columns = column..column + member.n;
            column = columns.end;
            let Some(adapter) = member.adapter else {
                continue;
            };
            let (r0, b) = place.next_b(member.n, adapter.r);
            let dy = columns_of(dy, m, width, columns);
            matmul(
                MatMut::columns_of(g, m, rank, r0..r0 + adapter.r),
                Into::Overwrite,
                adapter.scaling,
                dy,
                Mat::new(&theta[b.clone()], member.n, adapter.r),
                Threads::All,
            );
            matmul(
                MatMut::new(&mut dtheta[b], member.n, adapter.r),
                Into::Overwrite,
                1.0,
                dy.t(),
                columns_of(h, m, rank, r0..r0 + adapter.r),
                Threads::All,
            );
        }
    }

    /// With dropout: dA_i = G_iᵀ·dropout_i(x) and dX += mask_i∘(G_i·A_i)/(1 − p), member by member.
    fn dropped_backward(
        &self,
        x: &[f32],
        theta: &[f32],
        g: &[f32],
        dropout: Dropout,
        mut dx: Option<&mut [f32]>,
        dtheta: &mut [f32],
    ) {
        let (k, rank) = (self.k, self.rank());
        let m = x.len() / k;
        let mut work = Scratch::dirty(m * k);
        let mut row = 0;
        for (at, member) in self.members.iter().enumerate() {
            let Some(Adapter { r, .. }) = member.adapter else {
                continue;
            };
            let mask = dropout.stream(dropout.stream + at as u64);
            let own = row * k..(row + r) * k;
            let g = columns_of(g, m, rank, row..row + r);
            mask.apply(x, &mut work);
            matmul(
                MatMut::new(&mut dtheta[own.clone()], r, k),
                Into::Overwrite,
                1.0,
                g.t(),
                Mat::new(&work, m, k),
                Threads::All,
            );
            if let Some(dx) = dx.as_deref_mut() {
                let a = Mat::new(&theta[own], r, k);
                matmul(
                    MatMut::new(&mut work, m, k),
                    Into::Overwrite,
                    1.0,
                    g,
                    a,
                    Threads::All,
                );
                mask.apply_add(&work, dx);
            }
            row += r;
        }
    }

    /// dW = dYᵀ·x and the biases' column sums.
    fn trained_backward(&self, x: &[f32], dy: &[f32], biases: &[bool], dtheta: &mut [f32]) {
        let (k, width) = (self.k, self.width());
        let m = x.len() / k;
        let (dw, mut rest) = dtheta.split_at_mut(width * k);
        matmul(
            MatMut::new(dw, width, k),
            Into::Overwrite,
            1.0,
            Mat::new(dy, m, width).t(),
            Mat::new(x, m, k),
            Threads::All,
        );
        let mut column = 0;
        for (member, has) in self.members.iter().zip(biases) {
            if *has {
                let (own, after) = rest.split_at_mut(member.n);
                matmul(
                    MatMut::new(own, 1, member.n),
                    Into::Overwrite,
                    1.0,
                    Mat::new(&vec![1.0; m], 1, m),
                    columns_of(dy, m, width, column..column + member.n),
                    Threads::All,
                );
                rest = after;
            }
            column += member.n;
        }
    }
}
