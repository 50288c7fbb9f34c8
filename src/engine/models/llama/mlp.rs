//! The SwiGLU MLP of a decoder layer: gate/up as one group, down.

use super::block::{Inner, Norm, Tokens};
use crate::engine::ops::swiglu::{swiglu, swiglu_backward};
use crate::error::Result;
use crate::lora::{Dropout, Group};
use crate::scratch::Scratch;

/// Weights of one layer's MLP.
#[derive(Debug)]
pub struct Mlp {
    pub norm: Norm,
    /// gate and up on the normed input.
    pub gate_up: Group,
    pub down: Group,
}

/// What backward needs of forward.
pub struct MlpSaved {
    gate_up: Scratch,
    h_gate_up: Scratch,
    h_down: Scratch,
}

/// Dropout streams the attention of the same layer may use before these.
const FIRST_STREAM: u64 = 8;

impl Mlp {
    fn dropouts(&self, dropout: Option<Dropout>) -> (Option<Dropout>, Option<Dropout>) {
        let shift = |by: u64| dropout.map(|dropout| dropout.stream(dropout.stream + by));
        let members = self.gate_up.members.len() as u64;
        (shift(FIRST_STREAM), shift(FIRST_STREAM + members))
    }
}

impl Inner for Mlp {
    type Saved = MlpSaved;
    const NAME: &'static str = "mlp_block";

    fn norm(&self) -> &Norm {
        &self.norm
    }

    fn theta_len(&self) -> usize {
        self.gate_up.theta_len() + self.down.theta_len()
    }

    fn forward(
        &self,
        x: &[f32],
        theta: &[f32],
        tokens: &Tokens,
        dropout: Option<Dropout>,
    ) -> Result<(Scratch, MlpSaved)> {
        let (theta_in, theta_down) = theta.split_at(self.gate_up.theta_len());
        let (drop_in, drop_down) = self.dropouts(dropout);
        let (gate_up, h_gate_up) = self.gate_up.forward(x, theta_in, drop_in)?;
        let mut hidden = Scratch::dirty(tokens.m() * self.down.k);
        swiglu(&gate_up, self.down.k, &mut hidden);
        let (y, h_down) = self.down.forward(&hidden, theta_down, drop_down)?;
        Ok((
            y,
            MlpSaved {
                gate_up,
                h_gate_up,
                h_down,
            },
        ))
    }

    fn backward(
        &self,
        x: &[f32],
        theta: &[f32],
        tokens: &Tokens,
        dropout: Option<Dropout>,
        saved: MlpSaved,
        dy: &[f32],
        dx: Option<&mut [f32]>,
        dtheta: &mut [f32],
    ) -> Result<()> {
        let (theta_in, theta_down) = theta.split_at(self.gate_up.theta_len());
        let (dtheta_in, dtheta_down) = dtheta.split_at_mut(self.gate_up.theta_len());
        let (drop_in, drop_down) = self.dropouts(dropout);
        let f = self.down.k;
        let mut hidden = Scratch::dirty(tokens.m() * f);
        swiglu(&saved.gate_up, f, &mut hidden);
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
        let mut d_gate_up = saved.gate_up;
        swiglu_backward(&mut d_gate_up, f, &d_hidden);
        let h = &saved.h_gate_up;
        self.gate_up
            .backward(x, theta_in, h, &d_gate_up, drop_in, dx, dtheta_in)
    }
}
