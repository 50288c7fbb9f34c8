//! The one transformer that every family is built as: an embedding, layers of attention and MLP,
//! and a language model's head or a classifier's.

mod attention;
mod beside;
mod block;
mod bottleneck;
mod builder;
mod classifier;
mod decode;
mod embedding;
mod head;
mod init;
mod load;
mod mlp;
mod norm;
mod save;
mod stored;
mod virtual_tokens;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use candle_core::Tensor;

pub use beside::{Beside, split_prefix};
pub use block::Placement;
pub use decode::Decoder;
pub use load::{Init, LoadPlan, Lora, Quantize, Trained, linear_modules, other_modules};
pub use mlp::Activation;
pub use norm::NormKind;

use super::architecture::Architecture;
use crate::adapter::{AdapterConfig, TunedConfig};
use crate::data::Batch;
use crate::engine::evaluate::labels;
use crate::engine::ops::attention::Spans;
use crate::engine::{Judged, Judging, Mode, Model, Parameter};
use crate::error::{Error, Result};
use crate::lora::Dropout;
use attention::Attention;
use block::{Block, Tokens};
use classifier::{Classifier, ClassifierOp};
use embedding::Embedding;
use head::{LanguageHead, Table};
use mlp::Mlp;
use norm::Norm;
use virtual_tokens::Extended;

/// Dropout streams set aside for each layer.
const STREAMS: u64 = 16;

/// One layer.
#[derive(Debug)]
struct Layer {
    attention: Arc<Attention>,
    mlp: Arc<Mlp>,
    /// Parameters of the two blocks, where they have any.
    attention_theta: Option<usize>,
    mlp_theta: Option<usize>,
}

/// What stands on the layers.
#[derive(Debug)]
enum Ends {
    Language {
        norm: Arc<Norm>,
        norm_theta: Option<usize>,
        /// The output layer; the embedding itself if they are tied.
        output: Arc<Table>,
    },
    Classification {
        classifier: Arc<Classifier>,
        theta: Option<usize>,
    },
}

/// A model with frozen weights in the form they were stored in, and what is trained of it.
#[derive(Debug)]
pub struct Transformer {
    pub architecture: Architecture,
    folder: PathBuf,
    embedding: Embedding,
    layers: Vec<Layer>,
    ends: Ends,
    parameters: Vec<Parameter>,
    /// The configuration to save adapters with; none if there are no adapters.
    adapter: Option<AdapterConfig>,
    /// Likewise of a method beside LoRA.
    beside: Option<TunedConfig>,
    /// Before each document.
    virtual_tokens: usize,
    /// Parameter of the virtual tokens' embeddings.
    prompt: Option<usize>,
    lora_dropout: f32,
    /// Number of weights, adapters left out.
    elements: usize,
    /// Positions a sequence may have.
    positions: usize,
    /// Whether frozen weights were left in the folder.
    hollow: bool,
    /// Stands in for the variable of a block that has none.
    nothing: Tensor,
}

impl Transformer {
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

    /// Hidden states `[m, k]` after the last layer, before the final norm.
    fn hidden(&self, extended: &Extended, mode: Mode) -> Result<Tensor> {
        let batch = &*extended.batch;
        let spans = if self.architecture.family.is_causal() {
            Spans::causal(&batch.positions, batch.columns)
        } else {
            Spans::rows(&classifier::lengths(batch), batch.columns)
        };
        let tokens = Arc::new(Tokens {
            b: batch.rows,
            t: batch.columns,
            positions: batch.positions.clone(),
            spans,
            virtuals: extended.virtuals.clone(),
        });
        let placement = self.architecture.placement;
        let mut x = self.embed(&batch.ids, &batch.positions, &extended.virtuals, mode)?;
        let train = matches!(mode, Mode::Train { .. });
        for (at, layer) in self.layers.iter().enumerate() {
            let dropout = self.dropout(at, mode);
            let theta = self.theta(layer.attention_theta, mode);
            let block = Block::new(&layer.attention, &tokens, placement, dropout, train);
            x = apply(&x, &theta, block, train)?;
            let theta = self.theta(layer.mlp_theta, mode);
            let block = Block::new(&layer.mlp, &tokens, placement, dropout, train);
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

    /// A batch with the model's virtual tokens.
    fn extended<'a>(&self, batch: &'a Batch) -> Result<Extended<'a>> {
        self.check(batch)?;
        let extended = Extended::new(batch, self.virtual_tokens);
        if !extended.virtuals.is_empty() {
            self.check(&extended.batch)?;
        }
        Ok(extended)
    }

    /// The token that speaks for each row: a prompt's own first, never one of a prefix.
    fn pooled(&self, classifier: &Classifier, batch: &Batch) -> Vec<usize> {
        let first = if self.prompt.is_some() {
            0
        } else {
            self.virtual_tokens
        };
        classifier.tokens(&classifier::lengths(batch), batch.columns, first)
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        if self.hollow {
            return Err(Error::run(
                "the model was loaded without its frozen weights",
            ));
        }
        let size = batch.rows * batch.columns;
        if [batch.ids.len(), batch.targets.len(), batch.positions.len()] != [size; 3] {
            return Err(Error::argument(
                "a batch's ids, targets and positions must each have rows × columns elements",
            ));
        }
        let vocabulary = self.architecture.vocab_size;
        let outside = |id: i64| id >= vocabulary as i64;
        if let Some(id) = batch.ids.iter().find(|&&id| outside(i64::from(id))) {
            return Err(Error::argument(format!(
                "token id {id} is outside the model's vocabulary of {vocabulary}"
            )));
        }
        let (classes, of) = match self.architecture.labels() {
            None => (vocabulary, "vocabulary of"),
            Some(labels) => (labels.len(), "labels, which are"),
        };
        let outside = |id: i32| i64::from(id) >= classes as i64;
        if let Some(id) = batch
            .targets
            .iter()
            .find(|&&id| outside(id) || (id < 0 && id != crate::data::IGNORE))
        {
            return Err(Error::argument(format!(
                "target {id} is outside the model's {of} {classes}"
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

    /// Logits in f32: `[m, vocabulary]` of every token of a batch, or `[rows, labels]` of a
    /// classification model.
    pub fn logits(&self, batch: &Batch) -> Result<Vec<f32>> {
        let extended = self.extended(batch)?;
        let x = self.hidden(&extended, Mode::Eval)?;
        let k = self.architecture.hidden_size;
        let out = match &self.ends {
            Ends::Language {
                norm, norm_theta, ..
            } => {
                let weight = self.output_weights()?;
                let theta = self.theta(*norm_theta, Mode::Eval);
                block::with_slice(&x, |x| {
                    block::with_slice(&theta, |theta| {
                        let normed = norm.forward(x, theta).to_vec();
                        let normed = extended.real(normed, k, batch.columns);
                        Ok(head::logits(&normed, &weight, k))
                    })
                })?
            }
            Ends::Classification { classifier, theta } => {
                let tokens = self.pooled(classifier, &extended.batch);
                let theta = self.theta(*theta, Mode::Eval);
                block::with_slice(&x, |x| {
                    block::with_slice(&theta, |theta| {
                        let logits = classifier.logits(x, &tokens, theta);
                        logits.map_err(block::to_candle)
                    })
                })?
            }
        };
        Ok(out)
    }

    /// Number of weights, adapters left out.
    pub fn base_parameters(&self) -> usize {
        self.elements
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

    /// Virtual tokens before each document.
    pub fn virtual_tokens(&self) -> usize {
        self.virtual_tokens
    }

    /// The content of an adapter_config.json; none if there are no adapters.
    pub fn adapter_json(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        let beside = self.beside.as_ref().map(TunedConfig::to_json);
        beside.or_else(|| self.adapter.as_ref().map(AdapterConfig::to_json))
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

impl Model for Transformer {
    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn loss(&self, batch: &Batch, mode: Mode) -> Result<(Tensor, usize)> {
        let extended = self.extended(batch)?;
        let x = self.hidden(&extended, mode)?;
        let batch = &*extended.batch;
        let train = matches!(mode, Mode::Train { .. });
        let loss = match &self.ends {
            Ends::Language {
                norm,
                norm_theta,
                output,
            } => {
                let frozen = matches!(**output, Table::Frozen(_)).then(|| Arc::clone(output));
                let head = LanguageHead {
                    norm: Arc::clone(norm),
                    frozen,
                    targets: batch.targets.clone(),
                    train,
                    saved: Mutex::new(None),
                };
                let weight = self.table_theta(output, mode);
                let theta = self.theta(*norm_theta, mode);
                if train {
                    x.apply_op3(&weight, &theta, head)?
                } else {
                    x.apply_op3_no_bwd(&weight, &theta, &head)?
                }
            }
            Ends::Classification { classifier, theta } => {
                let tokens = self.pooled(classifier, batch);
                let op = ClassifierOp {
                    classifier: Arc::clone(classifier),
                    tokens,
                    labels: labels(batch),
                    dropout: self.dropout(self.layers.len(), mode),
                    saved: Mutex::new(None),
                };
                let theta = self.theta(*theta, mode);
                if train {
                    x.apply_op2(&theta, op)?
                } else {
                    x.apply_op2_no_bwd(&theta, &op)?
                }
            }
        };
        Ok((loss, batch.target_count()))
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.write(folder)
    }
}

impl Judging for Transformer {
    fn judge(&self, batch: &Batch) -> Result<Judged> {
        let Ends::Language {
            norm, norm_theta, ..
        } = &self.ends
        else {
            return self.logits(batch).map(Judged::Classes);
        };
        let extended = self.extended(batch)?;
        let x = self.hidden(&extended, Mode::Eval)?;
        let batch = &*extended.batch;
        let weight = self.output_weights()?;
        let theta = self.theta(*norm_theta, Mode::Eval);
        let k = self.architecture.hidden_size;
        let (loss, rows) = block::with_slice(&x, |x| {
            block::with_slice(&theta, |theta| {
                let normed = norm.forward(x, theta);
                let (targets, columns) = (&batch.targets, batch.columns);
                Ok(head::row_losses(&normed, &weight, k, targets, columns))
            })
        })?;
        // A batch's loss is a number of f32, as [`Model::loss`] gives it.
        let loss = f64::from(loss as f32);
        Ok(Judged::Language { loss, rows })
    }

    fn labels(&self) -> &[String] {
        let labels = self.architecture.labels();
        labels.map_or(&[], |labels| labels.names.as_slice())
    }
}
