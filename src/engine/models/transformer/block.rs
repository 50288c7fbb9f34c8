//! A layer as two operations of candle's graph, each with all its trained tensors in one flat
//! variable, so that nothing between a block's input and output is ever a graph node.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use super::bottleneck::{Bottleneck, BottleneckSaved, copy};
use super::norm::Norm;
use super::virtual_tokens::Virtual;
use crate::engine::ops::attention::Spans;
use crate::error::Result;
use crate::lora::Dropout;
use crate::scratch::Scratch;

/// A batch's sizes and positions, shared by all layers.
#[derive(Debug)]
pub struct Tokens {
    pub b: usize,
    pub t: usize,
    pub positions: Vec<u32>,
    /// What each token may attend to.
    pub spans: Spans,
    /// Learned tokens among them.
    pub virtuals: Vec<Virtual>,
}

impl Tokens {
    /// Number of tokens, b·t.
    pub fn m(&self) -> usize {
        self.b * self.t
    }
}

/// Where a block's norm stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// `y = x + inner(norm(x))`
    Before,
    /// `y = norm(x + inner(x))`
    After,
}

/// What is inside a block, beside its norm and its residual sum.
pub trait Inner: Send + Sync {
    type Saved: Send;
    const NAME: &'static str;

    fn norm(&self) -> &Norm;

    /// The adapter behind it.
    fn bottleneck(&self) -> Option<&Bottleneck>;

    /// Length of the trained part without the adapter's and the norm's.
    fn theta_len(&self) -> usize;

    fn forward(
        &self,
        x: &[f32],
        theta: &[f32],
        tokens: &Tokens,
        dropout: Option<Dropout>,
    ) -> Result<(Scratch, Self::Saved)>;

    /// Writes `dtheta` and, if given, the gradient `dx` of the input `x`.
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

/// A norm, a sum and what is inside, for x `[m, k]` and the block's flat variable: the inner part's
/// tensors, the adapter's, then the norm's.
pub struct Block<I: Inner> {
    inner: Arc<I>,
    tokens: Arc<Tokens>,
    placement: Placement,
    dropout: Option<Dropout>,
    /// Forward's activations, kept when a backward will come.
    saved: Mutex<Option<Saved<I>>>,
    train: bool,
}

struct Saved<I: Inner> {
    inner: I::Saved,
    /// `x + inner(x)`, where the norm comes after.
    sum: Option<Vec<f32>>,
    adapted: Option<Adapted>,
}

/// Of an adapter's forward.
struct Adapted {
    saved: BottleneckSaved,
    /// The sum before the adapter's part, where the norm comes after and the adapter stands on it.
    before: Option<Scratch>,
}

impl<I: Inner> Block<I> {
    pub fn new(
        inner: &Arc<I>,
        tokens: &Arc<Tokens>,
        placement: Placement,
        dropout: Option<Dropout>,
        train: bool,
    ) -> Self {
        Self {
            inner: Arc::clone(inner),
            tokens: Arc::clone(tokens),
            placement,
            dropout,
            saved: Mutex::new(None),
            train,
        }
    }

    fn run(&self, x: &[f32], theta: &[f32]) -> Result<Vec<f32>> {
        let [theta, own, norm_theta] = self.parts(theta);
        let norm = self.inner.norm();
        let inner = |x: &[f32]| self.inner.forward(x, theta, &self.tokens, self.dropout);
        let (mut y, saved) = match self.placement {
            Placement::Before => inner(&norm.forward(x, norm_theta))?,
            Placement::After => inner(x)?,
        };
        let bottleneck = self.inner.bottleneck();
        let mut adapted = None;
        if let Some(one) = bottleneck.filter(|one| !one.is_on_sum()) {
            let saved = one.add(copy(&y), own, &mut y)?;
            adapted = Some(Adapted {
                saved,
                before: None,
            });
        }
        let mut sum: Vec<f32> = x.iter().zip(y.iter()).map(|(&x, &y)| x + y).collect();
        if let Some(one) = bottleneck.filter(|one| one.is_on_sum()) {
            let (z, before) = match self.placement {
                Placement::Before => (copy(&sum), None),
                Placement::After => (norm.forward(&sum, norm_theta), Some(copy(&sum))),
            };
            let saved = one.add(z, own, &mut sum)?;
            adapted = Some(Adapted { saved, before });
        }
        let (y, sum) = match self.placement {
            Placement::Before => (sum, None),
            Placement::After => (norm.forward(&sum, norm_theta).to_vec(), Some(sum)),
        };
        if self.train {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(Saved {
                inner: saved,
                sum,
                adapted,
            });
        }
        Ok(y)
    }

    /// A flat variable's parts: of what is inside, of the adapter, of the norm.
    fn parts<'a>(&self, theta: &'a [f32]) -> [&'a [f32]; 3] {
        let (inner, rest) = theta.split_at(self.inner.theta_len());
        let (own, norm) = rest.split_at(self.inner.bottleneck().map_or(0, Bottleneck::theta_len));
        [inner, own, norm]
    }

    /// Through the adapter: `dsum` becomes the gradient of `x + inner(x)`; that of `inner(x)` where
    /// it is another one. The norm is frozen wherever there is an adapter.
    fn adapted_backward(
        &self,
        adapted: &Adapted,
        own: &[f32],
        norm_theta: &[f32],
        dsum: &mut [f32],
        down: &mut [f32],
    ) -> Result<Option<Scratch>> {
        let Some(one) = self.inner.bottleneck() else {
            return Ok(None);
        };
        let mut dz = one.backward(&adapted.saved, own, dsum, down)?;
        if !one.is_on_sum() {
            for (dz, ds) in dz.iter_mut().zip(dsum.iter()) {
                *dz += ds;
            }
            return Ok(Some(dz));
        }
        if let Some(before) = &adapted.before {
            let norm = self.inner.norm();
            norm.backward(before, norm_theta, &mut dz, None, &mut []);
        }
        for (ds, dz) in dsum.iter_mut().zip(dz.iter()) {
            *ds += dz;
        }
        Ok(None)
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
        let [theta, own, norm_theta] = self.parts(theta);
        let norm = self.inner.norm();
        let (dinner, dnorm) = dtheta.split_at_mut(theta.len());
        let (down, dnorm) = dnorm.split_at_mut(own.len());
        let Saved {
            inner: saved,
            sum,
            adapted,
        } = saved;
        if let Some(sum) = sum {
            let mut dsum = Scratch::dirty(dy.len());
            dsum.copy_from_slice(dy);
            norm.backward(&sum, norm_theta, &mut dsum, None, dnorm);
            let dy = match &adapted {
                Some(adapted) => {
                    self.adapted_backward(adapted, own, norm_theta, &mut dsum, down)?
                }
                None => None,
            };
            let mut dx = vec![0.0f32; if wants_dx { x.len() } else { 0 }];
            self.inner.backward(
                x,
                theta,
                &self.tokens,
                self.dropout,
                saved,
                dy.as_deref().unwrap_or(&dsum),
                wants_dx.then_some(&mut dx[..]),
                dinner,
            )?;
            for (dx, ds) in dx.iter_mut().zip(dsum.iter()) {
                *dx += ds;
            }
            return Ok((wants_dx.then_some(dx), dtheta));
        }
        let mut adapted_sum = None;
        let mut adapted_y = None;
        if let Some(adapted) = &adapted {
            let mut dsum = copy(dy);
            adapted_y = self.adapted_backward(adapted, own, norm_theta, &mut dsum, down)?;
            adapted_sum = Some(dsum);
        }
        let dsum = adapted_sum.as_deref().unwrap_or(dy);
        let wants_inner = wants_dx || norm.theta_len() > 0;
        let normed = norm.forward(x, norm_theta);
        let mut dx = vec![0.0f32; if wants_inner { x.len() } else { 0 }];
        self.inner.backward(
            &normed,
            theta,
            &self.tokens,
            self.dropout,
            saved,
            adapted_y.as_deref().unwrap_or(dsum),
            wants_inner.then_some(&mut dx[..]),
            dinner,
        )?;
        if wants_inner {
            norm.backward(x, norm_theta, &mut dx, Some(dsum), dnorm);
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

/// A flat variable's gradient as a tensor; none for what is no variable.
pub fn gradient_of(theta: &Tensor, dtheta: Vec<f32>) -> candle_core::Result<Option<Tensor>> {
    theta
        .is_variable()
        .then(|| Tensor::from_vec(dtheta, theta.shape(), theta.device()))
        .transpose()
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
        Ok((dx, gradient_of(theta, dtheta)?))
    }
}
