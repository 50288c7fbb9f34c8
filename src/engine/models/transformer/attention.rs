//! Attention of a layer: q/k/v as one group, rotary embedding where the model has one, o.

use std::sync::Arc;

use super::block::{Inner, Tokens};
use super::bottleneck::Bottleneck;
use super::norm::Norm;
use super::virtual_tokens::{put_prefix, take_prefix};
use crate::engine::ops::attention::{attention, attention_backward};
use crate::engine::ops::rope::{
    Heads, Rotations, merge_heads, rope_to_heads, rope_to_heads_backward, split_heads,
};
use crate::error::Result;
use crate::lora::{Dropout, Group};
use crate::scratch::Scratch;

/// Weights and constants of one layer's attention.
#[derive(Debug)]
pub struct Attention {
    pub norm: Norm,
    /// q, k and v of one input; one projection may make all three.
    pub qkv: Group,
    pub o: Group,
    pub h: usize,
    pub hkv: usize,
    pub d: usize,
    /// None where positions are learned.
    pub rotations: Option<Arc<Rotations>>,
    /// Virtual tokens with learned keys and values, `[prefix, 2, hkv, d]` behind o's tensors.
    pub prefix: usize,
    pub bottleneck: Option<Bottleneck>,
}

/// What backward needs of forward, all head-major.
pub struct AttentionSaved {
    qkv: Scratch,
    out: Scratch,
    lse: Scratch,
    h_qkv: Scratch,
    h_o: Scratch,
}

impl Attention {
    fn heads(&self, tokens: &Tokens) -> Heads {
        Heads {
            b: tokens.b,
            t: tokens.t,
            h: self.h,
            hkv: self.hkv,
            d: self.d,
        }
    }

    /// The prefix in the block's flat variable.
    pub fn prefix<'a>(&self, theta: &'a [f32]) -> &'a [f32] {
        let from = self.qkv.theta_len() + self.o.theta_len();
        &theta[from.min(theta.len())..][..self.prefix_len()]
    }

    pub fn prefix_len(&self) -> usize {
        self.prefix * 2 * self.hkv * self.d
    }

    /// o's masks come after the group's own.
    fn o_dropout(&self, dropout: Option<Dropout>) -> Option<Dropout> {
        dropout.map(|dropout| dropout.stream(dropout.stream + self.qkv.members.len() as u64))
    }
}

impl Inner for Attention {
    type Saved = AttentionSaved;
    const NAME: &'static str = "attention_block";

    fn norm(&self) -> &Norm {
        &self.norm
    }

    fn bottleneck(&self) -> Option<&Bottleneck> {
        self.bottleneck.as_ref()
    }

    fn theta_len(&self) -> usize {
        self.qkv.theta_len() + self.o.theta_len() + self.prefix_len()
    }

    fn forward(
        &self,
        x: &[f32],
        theta: &[f32],
        tokens: &Tokens,
        dropout: Option<Dropout>,
    ) -> Result<(Scratch, AttentionSaved)> {
        let heads = self.heads(tokens);
        let (theta_qkv, theta_o) = theta.split_at(self.qkv.theta_len());
        let (theta_o, prefix) = theta_o.split_at(self.o.theta_len());
        let (rows, h_qkv) = self.qkv.forward(x, theta_qkv, dropout)?;
        let mut qkv = Scratch::dirty(rows.len());
        let rotations = self.rotations.as_deref();
        rope_to_heads(&rows, heads, rotations, &tokens.positions, &mut qkv);
        drop(rows);
        if self.prefix > 0 {
            put_prefix(prefix, heads, &tokens.virtuals, &mut qkv);
        }
        let mut out = Scratch::dirty(tokens.m() * self.h * self.d);
        let mut lse = Scratch::dirty(tokens.m() * self.h);
        attention(&qkv, heads, &tokens.spans, &mut out, &mut lse);
        let mut merged = Scratch::dirty(out.len());
        merge_heads(&out, heads, &mut merged);
        let (y, h_o) = self.o.forward(&merged, theta_o, self.o_dropout(dropout))?;
        Ok((
            y,
            AttentionSaved {
                qkv,
                out,
                lse,
                h_qkv,
                h_o,
            },
        ))
    }

    fn backward(
        &self,
        x: &[f32],
        theta: &[f32],
        tokens: &Tokens,
        dropout: Option<Dropout>,
        saved: AttentionSaved,
        dy: &[f32],
        dx: Option<&mut [f32]>,
        dtheta: &mut [f32],
    ) -> Result<()> {
        let heads = self.heads(tokens);
        let (theta_qkv, theta_o) = theta.split_at(self.qkv.theta_len());
        let (theta_o, _) = theta_o.split_at(self.o.theta_len());
        let (dtheta_qkv, dtheta_o) = dtheta.split_at_mut(self.qkv.theta_len());
        let (dtheta_o, d_prefix) = dtheta_o.split_at_mut(self.o.theta_len());
        let mut merged = Scratch::dirty(saved.out.len());
        merge_heads(&saved.out, heads, &mut merged);
        let mut d_merged = Scratch::dirty(saved.out.len());
        self.o.backward(
            &merged,
            theta_o,
            &saved.h_o,
            dy,
            self.o_dropout(dropout),
            Some(&mut d_merged),
            dtheta_o,
        )?;
        let mut d_out = merged;
        split_heads(&d_merged, heads, &mut d_out);
        let mut d_heads = Scratch::dirty(saved.qkv.len());
        attention_backward(
            &saved.qkv,
            heads,
            &tokens.spans,
            &saved.out,
            &saved.lse,
            &d_out,
            &mut d_heads,
        );
        if self.prefix > 0 {
            take_prefix(heads, &tokens.virtuals, &mut d_heads, d_prefix);
        }
        let mut dqkv = saved.qkv;
        let positions = &tokens.positions;
        let rotations = self.rotations.as_deref();
        rope_to_heads_backward(&d_heads, heads, rotations, positions, &mut dqkv);
        let h = &saved.h_qkv;
        self.qkv
            .backward(x, theta_qkv, h, &dqkv, dropout, dx, dtheta_qkv)
    }
}
