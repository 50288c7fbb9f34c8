//! A decoder layer as two operations of candle's graph, each with all its trained tensors in one
//! flat variable, so that nothing between a block's input and output is ever a graph node.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use crate::engine::ops::attention::document_starts;
use crate::engine::ops::norm::{rms_norm, rms_norm_backward};
use crate::error::Result;
use crate::lora::Dropout;
use crate::scratch::Scratch;

/// A batch's sizes and positions, shared by all layers.
#[derive(Debug)]
pub struct Tokens {
    pub b: usize,
    pub t: usize,
    pub positions: Vec<u32>,
    /// First token of its row that each token may attend to.
    pub starts: Vec<u32>,
}

impl Tokens {
    pub fn new(b: usize, t: usize, positions: Vec<u32>) -> Self {
        let starts = document_starts(&positions, t);
        Self {
            b,
            t,
            positions,
            starts,
        }
    }

    /// Number of tokens, b·t.
    pub fn m(&self) -> usize {
        self.b * self.t
    }
}

/// An RMSNorm whose weight is frozen, or trained at the end of its block's flat variable.
#[derive(Debug, Clone)]
pub struct Norm {
    pub name: String,
    pub k: usize,
    pub eps: f32,
    /// The weight `[k]`, unless trained.
    pub frozen: Option<Vec<f32>>,
}

impl Norm {
    pub fn theta_len(&self) -> usize {
        if self.frozen.is_some() { 0 } else { self.k }
    }

    fn weight<'a>(&'a self, theta: &'a [f32]) -> &'a [f32] {
        self.frozen.as_deref().unwrap_or(theta)
    }

    pub fn forward(&self, x: &[f32], theta: &[f32]) -> Scratch {
        let mut y = Scratch::dirty(x.len());
        rms_norm(x, self.weight(theta), self.eps, &mut y);
        y
    }

    /// `dy` becomes the gradient of x plus `residual`.
    pub fn backward(
        &self,
        x: &[f32],
        theta: &[f32],
        dy: &mut [f32],
        residual: &[f32],
        dtheta: &mut [f32],
    ) {
        let dweight = if self.frozen.is_some() {
            None
        } else {
            dtheta.fill(0.0);
            Some(dtheta)
        };
        rms_norm_backward(x, self.weight(theta), self.eps, dy, residual, dweight);
    }
}

/// What is inside a block, between its norm and its residual sum.
pub trait Inner: Send + Sync {
    type Saved: Send;
    const NAME: &'static str;

    fn norm(&self) -> &Norm;

    /// Length of the trained part without the norm's.
    fn theta_len(&self) -> usize;

    fn forward(
        &self,
        x: &[f32],
        theta: &[f32],
        tokens: &Tokens,
        dropout: Option<Dropout>,
    ) -> Result<(Scratch, Self::Saved)>;

    /// Writes `dtheta` and, if given, the gradient `dx` of the normed input `x`.
    fn backward(
        &self,
        x: &[f32],
        theta: &[f32],
        tokens: &Tokens,
        dropout: Option<Dropout>,
        saved: Self::Saved,
        dy: &[f32],
        dx: Option<&mut [f32]>,
        dtheta: &mut [f32],
    ) -> Result<()>;
}

/// `y = x + inner(norm(x))`, for x `[m, k]` and the block's flat variable.
pub struct Block<I: Inner> {
    inner: Arc<I>,
    tokens: Arc<Tokens>,
    dropout: Option<Dropout>,
    /// Forward's activations, kept when a backward will come.
    saved: Mutex<Option<I::Saved>>,
    train: bool,
}

impl<I: Inner> Block<I> {
    pub fn new(
        inner: &Arc<I>,
        tokens: &Arc<Tokens>,
        dropout: Option<Dropout>,
        train: bool,
    ) -> Self {
        Self {
            inner: Arc::clone(inner),
            tokens: Arc::clone(tokens),
            dropout,
            saved: Mutex::new(None),
            train,
        }
    }

    fn run(&self, x: &[f32], theta: &[f32]) -> Result<Vec<f32>> {
        let (theta, norm_theta) = theta.split_at(self.inner.theta_len());
        let normed = self.inner.norm().forward(x, norm_theta);
        let (y, saved) = self
            .inner
            .forward(&normed, theta, &self.tokens, self.dropout)?;
        if self.train {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        }
        Ok(x.iter().zip(y.iter()).map(|(&x, &y)| x + y).collect())
    }

    fn run_backward(
        &self,
        x: &[f32],
        theta: &[f32],
        dy: &[f32],
        wants_dx: bool,
    ) -> Result<(Option<Vec<f32>>, Vec<f32>)> {
        let saved = self
            .saved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .ok_or_else(|| {
                crate::error::Error::run("backward of a block that kept no activations")
            })?;
        let mut dtheta = vec![0.0f32; theta.len()];
        let (theta, norm_theta) = theta.split_at(self.inner.theta_len());
        let norm = self.inner.norm();
        let wants_inner = wants_dx || norm.frozen.is_none();
        let (dinner, dnorm) = dtheta.split_at_mut(self.inner.theta_len());
        let normed = norm.forward(x, norm_theta);
        let mut dx = vec![0.0f32; if wants_inner { x.len() } else { 0 }];
        self.inner.backward(
            &normed,
            theta,
            &self.tokens,
            self.dropout,
            saved,
            dy,
            wants_inner.then_some(&mut dx[..]),
            dinner,
        )?;
        if wants_inner {
            norm.backward(x, norm_theta, &mut dx, dy, dnorm);
        }
        Ok((wants_dx.then_some(dx), dtheta))
    }
}

/// The f32 elements of a contiguous CPU tensor.
pub fn slice_of<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let values = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => Err(candle_core::Error::RequiresContiguous { op: "block" }.bt()),
    }
}

/// Runs `work` on the f32 elements of a CPU tensor.
pub fn with_slice<R>(
    tensor: &Tensor,
    work: impl FnOnce(&[f32]) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => work(slice_of(storage, layout)?),
        _ => Err(candle_core::Error::Msg(
            "a tensor that is not on the CPU".into(),
        )),
    }
}

/// Our errors through candle's graph and back.
pub fn to_candle(error: crate::error::Error) -> candle_core::Error {
    match error {
        crate::error::Error::Candle(error) => error,
        other => candle_core::Error::wrap(other),
    }
}

impl<I: Inner> CustomOp2 for Block<I> {
    fn name(&self) -> &'static str {
        I::NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        theta: &CpuStorage,
        theta_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let y = self
            .run(slice_of(x, x_layout)?, slice_of(theta, theta_layout)?)
            .map_err(to_candle)?;
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        theta: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dtheta) = with_slice(x, |x_values| {
            with_slice(theta, |theta_values| {
                with_slice(dy, |dy| {
                    self.run_backward(x_values, theta_values, dy, x.track_op())
                        .map_err(to_candle)
                })
            })
        })?;
        let dx = dx
            .map(|dx| Tensor::from_vec(dx, x.shape(), x.device()))
            .transpose()?;
        let dtheta = if theta.is_variable() {
            Some(Tensor::from_vec(dtheta, theta.shape(), theta.device())?)
        } else {
            None
        };
        Ok((dx, dtheta))
    }
}
