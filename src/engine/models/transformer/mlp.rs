//! The MLP of a layer: up (or gate and up as one group), an activation, down.

use super::block::{Inner, Tokens};
use super::bottleneck::Bottleneck;
use super::norm::Norm;
use crate::engine::ops::gelu::{Gelu, gelu, gelu_backward};
use crate::engine::ops::swiglu::{swiglu, swiglu_backward};
use crate::error::Result;
use crate::lora::{Dropout, Group};
use crate::scratch::Scratch;

/// What stands between up and down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) · up`: two projections.
    SwiGlu,
    /// One projection.
    Gelu(Gelu),
}

impl Activation {
    /// `[m, f]` of what the projections gave, `[m, 2f]` or `[m, f]`.
    pub fn forward(self, x: &[f32], f: usize) -> Scratch {
        let m = x.len() / (self.projections() * f);
        let mut y = Scratch::dirty(m * f);
        match self {
            Self::SwiGlu => swiglu(x, f, &mut y),
            Self::Gelu(kind) => gelu(kind, x, &mut y),
        }
        y
    }

    /// Turns what the projections gave into its gradient.
    fn backward(self, x: &mut [f32], f: usize, dy: &[f32]) {
        match self {
            Self::SwiGlu => swiglu_backward(x, f, dy),
            Self::Gelu(kind) => gelu_backward(kind, x, dy),
        }
    }

    fn projections(self) -> usize {
        match self {
            Self::SwiGlu => 2,
            Self::Gelu(_) => 1,
        }
    }
}

/// Weights of one layer's MLP.
#[derive(Debug)]
pub struct Mlp {
    pub norm: Norm,
    /// Gate and up, or up alone.
    pub up: Group,
    pub down: Group,
    pub activation: Activation,
    pub bottleneck: Option<Bottleneck>,
}

/// What backward needs of forward.
pub struct MlpSaved {
    up: Scratch,
    h_up: Scratch,
    h_down: Scratch,
}

/// Dropout streams the attention of the same layer may use before these.
const FIRST_STREAM: u64 = 8;

impl Mlp {
    fn dropouts(&self, dropout: Option<Dropout>) -> (Option<Dropout>, Option<Dropout>) {
        let shift = |by: u64| dropout.map(|dropout| dropout.stream(dropout.stream + by));
        let members = self.up.members.len() as u64;
        (shift(FIRST_STREAM), shift(FIRST_STREAM + members))
    }
}

impl Inner for Mlp {
    type Saved = MlpSaved;
    const NAME: &'static str = "mlp_block";

    fn norm(&self) -> &Norm {
        &self.norm
    }

    fn bottleneck(&self) -> Option<&Bottleneck> {
        self.bottleneck.as_ref()
    }

    fn theta_len(&self) -> usize {
        self.up.theta_len() + self.down.theta_len()
    }

    fn forward(
        &self,
        x: &[f32],
        theta: &[f32],
        _tokens: &Tokens,
        dropout: Option<Dropout>,
    ) -> Result<(Scratch, MlpSaved)> {
        let (theta_in, theta_down) = theta.split_at(self.up.theta_len());
        let (drop_in, drop_down) = self.dropouts(dropout);
        let (up, h_up) = self.up.forward(x, theta_in, drop_in)?;
        let hidden = self.activation.forward(&up, self.down.k);
        let (y, h_down) = self.down.forward(&hidden, theta_down, drop_down)?;
        Ok((y, MlpSaved { up, h_up, h_down }))
    }

    fn backward(
        &self,
        x: &[f32],
        theta: &[f32],
        _tokens: &Tokens,
        dropout: Option<Dropout>,
        saved: MlpSaved,
        dy: &[f32],
        dx: Option<&mut [f32]>,
        dtheta: &mut [f32],
    ) -> Result<()> {
        let (theta_in, theta_down) = theta.split_at(self.up.theta_len());
        let (dtheta_in, dtheta_down) = dtheta.split_at_mut(self.up.theta_len());
        let (drop_in, drop_down) = self.dropouts(dropout);
        let f = self.down.k;
        let hidden = self.activation.forward(&saved.up, f);
        let mut d_hidden = Scratch::dirty(hidden.len());
        self.down.backward(
            &hidden,
            theta_down,
            &saved.h_down,
            dy,
            drop_down,
            Some(&mut d_hidden),
            dtheta_down,
        )?;
        let mut d_up = saved.up;
        self.activation.backward(&mut d_up, f, &d_hidden);
        let h = &saved.h_up;
        self.up
            .backward(x, theta_in, h, &d_up, drop_in, dx, dtheta_in)
    }
}
