//! From token ids to hidden states: tokens, learned positions, token types, a norm.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::Transformer;
use super::head::{Lookup, Table, gather};
use super::norm::{Norm, NormOp};
use super::virtual_tokens::Virtual;
use crate::engine::Mode;
use crate::error::Result;

#[derive(Debug)]
pub struct Embedding {
    pub k: usize,
    pub tokens: Arc<Table>,
    pub positions: Option<Table>,
    /// Every token is of the first type.
    pub types: Option<Table>,
    /// With the index of its parameter.
    pub norm: Option<(Arc<Norm>, Option<usize>)>,
}

impl Transformer {
    /// Hidden states `[m, k]` before the first layer.
    pub(super) fn embed(
        &self,
        ids: &[u32],
        positions: &[u32],
        virtuals: &[Virtual],
        mode: Mode,
    ) -> Result<Tensor> {
        let embedding = &self.embedding;
        let mut x = self.rows(&embedding.tokens, ids, mode)?;
        x = self.with_prompt(x, virtuals, mode)?;
        if let Some(table) = &embedding.positions {
            x = (x + self.rows(table, positions, mode)?)?;
        }
        if let Some(table) = &embedding.types {
            x = (x + self.rows(table, &vec![0; ids.len()], mode)?)?;
        }
        let Some((norm, theta)) = &embedding.norm else {
            return Ok(x);
        };
        let theta = self.theta(*theta, mode);
        let op = NormOp(Arc::clone(norm));
        Ok(match mode {
            Mode::Train { .. } => x.apply_op2(&theta, op)?,
            Mode::Eval => x.apply_op2_no_bwd(&theta, &op)?,
        })
    }

    fn rows(&self, table: &Table, ids: &[u32], mode: Mode) -> Result<Tensor> {
        let k = self.embedding.k;
        match table {
            Table::Frozen(weight) => {
                let rows = gather(weight, k, ids)?;
                Ok(Tensor::from_vec(rows, (ids.len(), k), &Device::Cpu)?)
            }
            Table::Trained(_) => {
                let ids = Arc::new(ids.to_vec());
                Ok(self.table_theta(table, mode).apply_op1(Lookup { ids, k })?)
            }
        }
    }
}
