//! The norms of a model, each with its weights frozen or trained.

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use super::block::{gradient_of, slice_of, with_slice};
use crate::engine::ops::norm::{layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
use crate::scratch::Scratch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    Rms,
    /// With a bias.
    Layer,
}

/// A norm over rows of `k` whose weight `[k]`, and bias `[k]` of a LayerNorm behind it, are frozen,
/// or trained at the end of their block's flat variable.
#[derive(Debug, Clone)]
pub struct Norm {
    pub name: String,
    pub kind: NormKind,
    pub k: usize,
    pub eps: f32,
    /// Weight, then bias; none if trained.
    pub frozen: Option<Vec<f32>>,
}

impl Norm {
    /// Names of its tensors, `[k]` each, in their order.
    pub fn tensors(&self) -> Vec<String> {
        let weight = format!("{}.weight", self.name);
        match self.kind {
            NormKind::Rms => vec![weight],
            NormKind::Layer => vec![weight, format!("{}.bias", self.name)],
        }
    }

    pub fn theta_len(&self) -> usize {
        match (&self.frozen, self.kind) {
            (Some(_), _) => 0,
            (None, NormKind::Rms) => self.k,
            (None, NormKind::Layer) => 2 * self.k,
        }
    }

    fn weights<'a>(&'a self, theta: &'a [f32]) -> (&'a [f32], &'a [f32]) {
        self.frozen.as_deref().unwrap_or(theta).split_at(self.k)
    }

    pub fn forward(&self, x: &[f32], theta: &[f32]) -> Scratch {
        let mut y = Scratch::dirty(x.len());
        let (weight, bias) = self.weights(theta);
        match self.kind {
            NormKind::Rms => rms_norm(x, weight, self.eps, &mut y),
            NormKind::Layer => layer_norm(x, weight, bias, self.eps, &mut y),
        }
        y
    }

    /// `dy` becomes the gradient of x, plus `residual` where there is one.
    pub fn backward(
        &self,
        x: &[f32],
        theta: &[f32],
        dy: &mut [f32],
        residual: Option<&[f32]>,
        dtheta: &mut [f32],
    ) {
        dtheta.fill(0.0);
        let trained = self.frozen.is_none();
        let (weight, _) = self.weights(theta);
        match self.kind {
            NormKind::Rms => {
                let dweight = trained.then_some(dtheta);
                rms_norm_backward(x, weight, self.eps, dy, residual, dweight);
            }
            NormKind::Layer => {
                let affine = if trained {
                    Some(dtheta.split_at_mut(self.k))
                } else {
                    None
                };
                layer_norm_backward(x, weight, self.eps, dy, residual, affine);
            }
        }
    }
}

/// A norm as an operation of its own, of x `[m, k]` and the norm's flat variable.
pub struct NormOp(pub std::sync::Arc<Norm>);

impl CustomOp2 for NormOp {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        theta: &CpuStorage,
        theta_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let theta = slice_of(theta, theta_layout)?;
        let y = self.0.forward(slice_of(x, x_layout)?, theta);
        Ok((CpuStorage::F32(y.to_vec()), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        theta: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut dx = dy.flatten_all()?.to_vec1::<f32>()?;
        let mut dtheta = vec![0.0f32; theta.elem_count()];
        with_slice(x, |x| {
            with_slice(theta, |theta| {
                let own = &mut dtheta[..self.0.theta_len()];
                self.0.backward(x, theta, &mut dx, None, own);
                Ok(())
            })
        })?;
        let dtheta = gradient_of(theta, dtheta)?;
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), dtheta))
    }
}
