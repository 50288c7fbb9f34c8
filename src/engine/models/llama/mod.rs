//! Llama (Touvron et al., 2023) as transformers' `LlamaForCausalLM` defines it: RMSNorm before
//! each block, grouped-query attention with rotary embedding, SwiGLU, optionally tied embeddings.

mod attention;
mod block;
mod config;
mod decode;
mod head;
mod load;
mod mlp;
mod save;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};

pub use config::{ARCHITECTURE, LlamaConfig};
pub use decode::Decoder;
pub use load::{Init, LoadPlan, Quantize, Trained, linear_modules};

use crate::adapter::AdapterConfig;
use crate::data::Batch;
use crate::engine::{Mode, Model, Parameter};
use crate::error::{Error, Result};
use crate::lora::Dropout;
use attention::Attention;
use block::{Block, Norm, Tokens};
use head::{Head, Lookup, Table, gather};
use mlp::Mlp;

/// Dropout streams set aside for each layer.
const STREAMS: u64 = 16;

/// One decoder layer.
#[derive(Debug)]
struct Layer {
    attention: Arc<Attention>,
    mlp: Arc<Mlp>,
    /// Parameters of the two blocks, where they have any.
    attention_theta: Option<usize>,
    mlp_theta: Option<usize>,
}

/// A Llama with frozen weights in the form they were stored in, and what is trained of it.
#[derive(Debug)]
pub struct Llama {
    pub config: LlamaConfig,
    folder: PathBuf,
    embedding: Arc<Table>,
    /// The output layer; the embedding itself if they are tied.
    output: Arc<Table>,
    layers: Vec<Layer>,
    norm: Arc<Norm>,
    norm_theta: Option<usize>,
    parameters: Vec<Parameter>,
    /// The configuration to save adapters with; none if there are no adapters.
    adapter: Option<AdapterConfig>,
    lora_dropout: f32,
    /// Positions the rotary table holds.
    positions: usize,
    /// Stands in for the variable of a block that has none.
    nothing: Tensor,
}

impl Llama {
    fn theta(&self, parameter: Option<usize>, mode: Mode) -> Tensor {
        match (parameter, mode) {
            (Some(index), Mode::Train { .. }) => self.parameters[index].var.as_tensor().clone(),
            (Some(index), Mode::Eval) => self.parameters[index].var.as_detached_tensor(),
            (None, _) => self.nothing.clone(),
        }
    }

    fn table_theta(&self, table: &Table, mode: Mode) -> Tensor {
        match table {
            Table::Trained(index) => self.theta(Some(*index), mode),
            Table::Frozen(_) => self.nothing.clone(),
        }
    }

    fn embed(&self, ids: &[u32], mode: Mode) -> Result<Tensor> {
        let k = self.config.hidden_size;
        match &*self.embedding {
            Table::Frozen(weight) => {
                let rows = gather(weight, k, ids)?;
                Ok(Tensor::from_vec(rows, (ids.len(), k), &Device::Cpu)?)
            }
            table @ Table::Trained(_) => {
                let lookup = Lookup {
                    ids: Arc::new(ids.to_vec()),
                    k,
                };
                Ok(self.table_theta(table, mode).apply_op1(lookup)?)
            }
        }
    }

    /// Hidden states `[m, k]` after the last layer, before the final norm.
    fn hidden(&self, batch: &Batch, mode: Mode) -> Result<Tensor> {
        let tokens = Tokens::new(batch.rows, batch.columns, batch.positions.clone());
        let tokens = Arc::new(tokens);
        let mut x = self.embed(&batch.ids, mode)?;
        let train = matches!(mode, Mode::Train { .. });
        for (at, layer) in self.layers.iter().enumerate() {
            let dropout = self.dropout(at, mode);
            let theta = self.theta(layer.attention_theta, mode);
            let block = Block::new(&layer.attention, &tokens, dropout, train);
            x = apply(&x, &theta, block, train)?;
            let theta = self.theta(layer.mlp_theta, mode);
            let block = Block::new(&layer.mlp, &tokens, dropout, train);
            x = apply(&x, &theta, block, train)?;
        }
        Ok(x)
    }

    fn dropout(&self, layer: usize, mode: Mode) -> Option<Dropout> {
        match mode {
            Mode::Train { seed } if self.lora_dropout > 0.0 => Some(Dropout {
                p: self.lora_dropout,
                seed,
                stream: layer as u64 * STREAMS,
            }),
            _ => None,
        }
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        let size = batch.rows * batch.columns;
        if [batch.ids.len(), batch.targets.len(), batch.positions.len()] != [size; 3] {
            return Err(Error::argument(
                "a batch's ids, targets and positions must each have rows × columns elements",
            ));
        }
        let vocabulary = self.config.vocab_size;
        let outside = |id: i64| id >= vocabulary as i64;
        if let Some(id) = batch.ids.iter().find(|&&id| outside(i64::from(id))) {
            return Err(Error::argument(format!(
                "token id {id} is outside the model's vocabulary of {vocabulary}"
            )));
        }
        if let Some(id) = batch
            .targets
            .iter()
            .find(|&&id| outside(i64::from(id)) || (id < 0 && id != crate::data::IGNORE))
        {
            return Err(Error::argument(format!(
                "target {id} is outside the model's vocabulary of {vocabulary}"
            )));
        }
        if let Some(position) = batch
            .positions
            .iter()
            .find(|&&position| position as usize >= self.positions)
        {
            return Err(Error::argument(format!(
                "position {position} is beyond the {} this model was loaded for",
                self.positions
            )));
        }
        Ok(())
    }

    /// Logits `[m, vocabulary]` of every token of a batch, in f32.
    pub fn logits(&self, batch: &Batch) -> Result<Vec<f32>> {
        self.check(batch)?;
        let x = self.hidden(batch, Mode::Eval)?;
        let k = self.config.hidden_size;
        let weight = self.output_weights()?;
        let norm = self.theta(self.norm_theta, Mode::Eval);
        let out = block::with_slice(&x, |x| {
            block::with_slice(&norm, |norm| {
                Ok(head::logits(&self.norm.forward(x, norm), &weight, k))
            })
        })?;
        Ok(out)
    }

    /// Number of weights, adapters left out.
    pub fn base_parameters(&self) -> usize {
        load::base_parameters(&self.config)
    }

    /// Number of trained elements.
    pub fn trainable(&self) -> usize {
        self.parameters
            .iter()
            .flat_map(|parameter| &parameter.segments)
            .map(crate::engine::Segment::len)
            .sum()
    }

    /// Bytes of the frozen 4-bit weights with their absmax.
    pub fn quantized_bytes(&self) -> usize {
        self.frozen_weights()
            .filter(|weight| matches!(weight, crate::lora::FrozenWeight::FourBit(_)))
            .map(crate::lora::FrozenWeight::bytes)
            .sum()
    }

    /// The folder the weights came from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

fn apply<I: block::Inner + 'static>(
    x: &Tensor,
    theta: &Tensor,
    block: Block<I>,
    train: bool,
) -> Result<Tensor> {
    Ok(if train {
        x.apply_op2(theta, block)?
    } else {
        x.apply_op2_no_bwd(theta, &block)?
    })
}

impl Model for Llama {
    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn loss(&self, batch: &Batch, mode: Mode) -> Result<(Tensor, usize)> {
        self.check(batch)?;
        let x = self.hidden(batch, mode)?;
        let train = matches!(mode, Mode::Train { .. });
        let frozen = matches!(*self.output, Table::Frozen(_)).then(|| Arc::clone(&self.output));
        let head = Head {
            norm: Arc::clone(&self.norm),
            frozen,
            targets: batch.targets.clone(),
            train,
            saved: Mutex::new(None),
        };
        let weight = self.table_theta(&self.output, mode);
        let norm = self.theta(self.norm_theta, mode);
        let loss = if train {
            x.apply_op3(&weight, &norm, head)?
        } else {
            x.apply_op3_no_bwd(&weight, &norm, &head)?
        };
        Ok((loss, batch.target_count()))
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.write(folder)
    }
}
