//! Virtual tokens before each document: prompts (Lester et al., 2021), which are learned input
//! embeddings, and prefixes (Li and Liang, 2021), which are learned keys and values of every layer.
//!
//! Either takes the first positions of each document; the document's own tokens come after them, as
//! in transformers behind a cache of that length.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use super::Transformer;
use super::block::{slice_of, with_slice};
use super::builder::Builder;
use super::embedding::Embedding;
use super::head::{Table, gather};
use super::init::uniform;
use crate::adapter::{PROMPT_EMBEDDINGS, TunedConfig, VirtualKind};
use crate::data::{Batch, IGNORE};
use crate::engine::Mode;
use crate::engine::ops::rope::Heads;
use crate::error::Result;

/// A virtual token: its place in a batch, and which of the learned ones it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Virtual {
    /// Index of the token, row · columns + column.
    pub token: usize,
    pub number: usize,
}

/// A batch with virtual tokens in it.
#[derive(Debug)]
pub struct Extended<'a> {
    pub batch: Cow<'a, Batch>,
    pub virtuals: Vec<Virtual>,
}

impl<'a> Extended<'a> {
    /// `count` virtual tokens before each document of `batch`; what is padding stays padding: a
    /// token at position 0 that is alone and has no target.
    pub fn new(batch: &'a Batch, count: usize) -> Self {
        if count == 0 {
            return Self {
                batch: Cow::Borrowed(batch),
                virtuals: Vec::new(),
            };
        }
        let rows: Vec<Row> = (0..batch.rows)
            .map(|row| Row::new(batch, row, count))
            .collect();
        let columns = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let mut extended = Batch {
            rows: batch.rows,
            columns,
            ids: Vec::new(),
            targets: Vec::new(),
            positions: Vec::new(),
        };
        let mut virtuals = Vec::new();
        for (at, mut row) in rows.into_iter().enumerate() {
            let first = at * columns;
            virtuals.extend(row.virtuals.iter().map(|one| Virtual {
                token: first + one.token,
                ..*one
            }));
            row.ids.resize(columns, 0);
            row.targets.resize(columns, IGNORE);
            row.positions.resize(columns, 0);
            extended.ids.extend(row.ids);
            extended.targets.extend(row.targets);
            extended.positions.extend(row.positions);
        }
        Self {
            batch: Cow::Owned(extended),
            virtuals,
        }
    }

    /// Rows `[·, width]` of the tokens that are not virtual, in the shape of the batch that was
    /// extended: `columns` wide.
    pub fn real(&self, values: Vec<f32>, width: usize, columns: usize) -> Vec<f32> {
        if self.virtuals.is_empty() {
            return values;
        }
        let own = self.batch.columns;
        let mut taken = vec![false; self.batch.ids.len()];
        for one in &self.virtuals {
            taken[one.token] = true;
        }
        let mut real = Vec::with_capacity(self.batch.rows * columns * width);
        for row in 0..self.batch.rows {
            let tokens = (row * own..(row + 1) * own).filter(|&token| !taken[token]);
            for token in tokens.take(columns) {
                real.extend_from_slice(&values[token * width..(token + 1) * width]);
            }
        }
        real
    }
}

#[derive(Default)]
struct Row {
    ids: Vec<u32>,
    targets: Vec<i32>,
    positions: Vec<u32>,
    virtuals: Vec<Virtual>,
}

impl Row {
    fn new(batch: &Batch, row: usize, count: usize) -> Self {
        let range = row * batch.columns..(row + 1) * batch.columns;
        let positions = &batch.positions[range.clone()];
        let (ids, targets) = (&batch.ids[range.clone()], &batch.targets[range]);
        let starts = |at: usize| at == 0 || positions[at] == 0;
        let mut found = Self::default();
        let mut shift = 0;
        for at in 0..ids.len() {
            let alone = at + 1 == ids.len() || starts(at + 1);
            if starts(at) {
                let padding = alone && targets[at] == IGNORE && (at > 0 || ids.len() > 1);
                shift = if padding { 0 } else { count };
                for number in 0..shift {
                    let token = found.ids.len();
                    found.virtuals.push(Virtual { token, number });
                    found.push(0, IGNORE, number);
                }
            }
            found.push(ids[at], targets[at], positions[at] as usize + shift);
        }
        found
    }

    fn push(&mut self, id: u32, target: i32, position: usize) {
        self.ids.push(id);
        self.targets.push(target);
        self.positions.push(position as u32);
    }
}

/// Puts learned embeddings, flat `[count · k]`, in the places of virtual tokens among `rows` `[m, k]`.
pub struct Prompt {
    pub rows: Tensor,
    pub virtuals: Arc<Vec<Virtual>>,
    pub k: usize,
}

impl CustomOp1 for Prompt {
    fn name(&self) -> &'static str {
        "prompt"
    }

    fn cpu_fwd(
        &self,
        prompt: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let prompt = slice_of(prompt, layout)?;
        let mut out = with_slice(&self.rows, |rows| Ok(rows.to_vec()))?;
        for one in self.virtuals.iter() {
            let (to, from) = (one.token * self.k, one.number * self.k);
            out[to..to + self.k].copy_from_slice(&prompt[from..from + self.k]);
        }
        Ok((CpuStorage::F32(out), self.rows.shape().clone()))
    }

    fn bwd(
        &self,
        prompt: &Tensor,
        _rows: &Tensor,
        d_rows: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let mut d_prompt = vec![0.0f32; prompt.elem_count()];
        with_slice(d_rows, |d_rows| {
            for one in self.virtuals.iter() {
                let (from, to) = (one.token * self.k, one.number * self.k);
                let part = &d_rows[from..from + self.k];
                for (out, value) in d_prompt[to..to + self.k].iter_mut().zip(part) {
                    *out += value;
                }
            }
            Ok(())
        })?;
        let d_prompt = Tensor::from_vec(d_prompt, prompt.shape(), prompt.device())?;
        Ok(Some(d_prompt))
    }
}

impl Builder<'_> {
    /// Virtual tokens of a prefix.
    pub(super) fn prefix_len(&self) -> usize {
        match self.beside() {
            Some(TunedConfig::Virtual(config)) if config.is_prefix() => config.num_virtual_tokens,
            _ => 0,
        }
    }

    /// Registers a prompt, where one is trained.
    pub(super) fn prompt(&mut self, embedding: &Embedding) -> Result<Option<usize>> {
        let Some(TunedConfig::Virtual(config)) = self.beside() else {
            return Ok(None);
        };
        let VirtualKind::Prompt { sample_vocab } = config.kind else {
            return Ok(None);
        };
        let (count, k) = (config.num_virtual_tokens, embedding.k);
        let more = Some((PROMPT_EMBEDDINGS.to_owned(), vec![count, k]));
        let prompt = self.parameter_with(PROMPT_EMBEDDINGS, &[], more, None)?;
        if sample_vocab
            && self.is_new()
            && let (Some(at), Table::Frozen(weight)) = (prompt, &*embedding.tokens)
        {
            let mut drawn = vec![0.0f32; count];
            let vocabulary = self.architecture.vocab_size;
            uniform(self.seed(), "prompt_tokens", 0.5, &mut drawn);
            let id = |&unit: &f32| ((unit + 0.5) * vocabulary as f32) as u32;
            let ids: Vec<u32> = drawn.iter().map(id).collect();
            let rows = gather(weight, k, &ids)?;
            let rows = Tensor::from_vec(rows, count * k, &Device::Cpu)?;
            self.parameters[at].var.set(&rows)?;
        }
        Ok(prompt)
    }
}

impl Transformer {
    /// Learned embeddings in the places of virtual tokens, where the model has a prompt.
    pub(super) fn with_prompt(
        &self,
        rows: Tensor,
        virtuals: &[Virtual],
        mode: Mode,
    ) -> Result<Tensor> {
        let Some(prompt) = self.prompt else {
            return Ok(rows);
        };
        let op = Prompt {
            rows,
            virtuals: Arc::new(virtuals.to_vec()),
            k: self.architecture.hidden_size,
        };
        Ok(self.theta(Some(prompt), mode).apply_op1(op)?)
    }
}

/// Where head `head`'s key or value of virtual token `number` lies in a layer's prefix
/// `[count, 2, hkv, d]`, and in head-major `[b, hkv, group + 2, t, d]`.
fn places(heads: Heads, one: Virtual) -> impl Iterator<Item = (usize, usize)> {
    let Heads { t, d, hkv, .. } = heads;
    let group = heads.group();
    let (row, column) = (one.token / t, one.token % t);
    (0..2 * hkv).map(move |at| {
        let (part, head) = (at / hkv, at % hkv);
        let block = (row * hkv + head) * (group + 2) + group + part;
        let from = (one.number * 2 + part) * hkv * d + head * d;
        (from, (block * t + column) * d)
    })
}

/// Puts a layer's prefix in the places of virtual tokens, after the rotary embedding.
pub fn put_prefix(prefix: &[f32], heads: Heads, virtuals: &[Virtual], qkv: &mut [f32]) {
    for one in virtuals {
        for (from, to) in places(heads, *one) {
            qkv[to..to + heads.d].copy_from_slice(&prefix[from..from + heads.d]);
        }
    }
}

/// Takes the prefix's gradient out of `d_qkv`, where zeros are left.
pub fn take_prefix(heads: Heads, virtuals: &[Virtual], d_qkv: &mut [f32], d_prefix: &mut [f32]) {
    d_prefix.fill(0.0);
    for one in virtuals {
        for (to, from) in places(heads, *one) {
            let own = &mut d_qkv[from..from + heads.d];
            for (out, value) in d_prefix[to..to + heads.d].iter_mut().zip(own.iter()) {
                *out += value;
            }
            own.fill(0.0);
        }
    }
}
