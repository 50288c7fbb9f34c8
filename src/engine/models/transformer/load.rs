//! Building a model from a Hugging Face folder, with what is trained of it.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::attention::Attention;
use super::beside::{Beside, prefix_name};
use super::bottleneck::Behind;
use super::builder::Builder;
use super::classifier::{Classifier, Pooled};
use super::embedding::Embedding;
use super::mlp::Mlp;
use super::{Ends, Layer, Transformer};
use crate::adapter::{self, AdapterConfig, Target};
use crate::dtype::QuantType;
use crate::engine::models::architecture::{Architecture, Head};
use crate::engine::models::names::LM_HEAD;
use crate::engine::ops::rope::Rotations;
use crate::error::{Error, Result};
use crate::folder::Weights;

/// How linear layers are quantised at loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantize {
    pub quant_type: QuantType,
    pub blocksize: usize,
    pub double_quant: bool,
}

/// Where an adapter's first values come from.
#[derive(Debug, Clone)]
pub enum Init {
    /// A uniform in ±1/√k (Kaiming with a = √5, PEFT's default), B zero.
    Random,
    /// A saved adapter's, with the modules that were saved beside it.
    Saved(Box<adapter::Adapter>),
}

/// LoRA beside frozen weights.
#[derive(Debug, Clone)]
pub struct Lora {
    pub config: Box<AdapterConfig>,
    pub targets: Vec<Target>,
    pub init: Init,
}

/// What is trained of a model.
#[derive(Debug, Clone, Default)]
pub struct Trained {
    /// Modules whose every weight is trained, with all that is inside; an empty name is the model.
    pub whole: Vec<String>,
    pub lora: Option<Lora>,
    /// An adapter of another method.
    pub beside: Option<Beside>,
}

impl Trained {
    pub fn nothing() -> Self {
        Self::default()
    }

    pub fn everything() -> Self {
        Self {
            whole: vec![String::new()],
            ..Self::default()
        }
    }

    /// The number of virtual tokens before each document.
    pub fn virtual_tokens(&self) -> usize {
        let beside = self.beside.as_ref();
        beside.map_or(0, |beside| beside.config.virtual_tokens())
    }

    /// Whether anything is trained beside the base's weights.
    pub fn has_adapter(&self) -> bool {
        self.lora.is_some() || self.beside.is_some()
    }

    pub fn is_everything(&self) -> bool {
        self.whole.iter().any(String::is_empty)
    }
}

/// How a model is to be loaded.
#[derive(Debug, Clone)]
pub struct LoadPlan {
    pub quantize: Option<Quantize>,
    pub trained: Trained,
    /// Positions a sequence may have, at most the model's own.
    pub positions: usize,
    /// Of what is new: adapters, and a head that is not in the folder.
    pub seed: u64,
    /// Whether frozen linear layers and tables are checked alone, and left in the folder: another
    /// library computes, and the model's own forward is an error.
    pub hollow: bool,
}

/// The names of a model's linear layers, the output layer last.
pub fn linear_modules(architecture: &Architecture) -> Vec<String> {
    let names = architecture.names();
    let of_layer = |at: usize| {
        let layer = names.layer(at);
        let attention = names.qkv.iter().chain([&names.o]);
        let all = attention.chain(names.up).chain([&names.down]);
        all.map(move |name| format!("{layer}.{name}"))
            .collect::<Vec<_>>()
    };
    let pooler = names.pooler.map(|pooler| names.outer(pooler));
    (0..architecture.num_hidden_layers)
        .flat_map(of_layer)
        .chain(pooler)
        .chain([architecture.output().to_owned()])
        .collect()
}

/// The names of the other modules that contain none: a pattern that chooses one of these is PEFT's error.
pub fn other_modules(architecture: &Architecture) -> Vec<String> {
    let names = architecture.names();
    let of_layer = |at: usize| {
        let layer = names.layer(at);
        let norms = [&names.attention_norm, &names.mlp_norm].into_iter();
        let all = norms.chain(names.silent.0);
        all.map(move |name| format!("{layer}.{name}"))
            .collect::<Vec<_>>()
    };
    let outer = [
        Some(names.tokens),
        names.positions,
        names.types,
        names.embedding_norm,
        names.norm,
    ];
    let outer = outer.into_iter().flatten();
    (0..architecture.num_hidden_layers)
        .flat_map(of_layer)
        .chain(
            outer
                .chain(names.silent.1.iter().copied())
                .map(|name| names.outer(name)),
        )
        .collect()
}

impl Transformer {
    /// Loads `folder` as `plan` says.
    ///
    /// # Errors
    /// `Format` for a missing, truncated or misshapen tensor, naming it; `Argument` for a plan that
    /// does not fit the model.
    pub fn load(folder: &Path, architecture: Architecture, plan: &LoadPlan) -> Result<Self> {
        let limit = architecture.max_position_embeddings;
        if plan.positions > limit {
            return Err(Error::argument(format!(
                "sequence_length {} is longer than the {limit} positions the model was made for \
                 (max_position_embeddings)",
                plan.positions - plan.trained.virtual_tokens()
            )));
        }
        let weights = Weights::open(folder)?;
        let mut builder = Builder::new(&weights, &architecture, plan);
        let embedding = builder.embedding()?;
        let prompt = builder.prompt(&embedding)?;
        let rotations = architecture.rope.map(|(theta, scaling)| {
            let d = architecture.head_dim;
            Arc::new(Rotations::new(d, theta, scaling, plan.positions))
        });
        let layers = (0..architecture.num_hidden_layers)
            .map(|at| builder.layer(at, rotations.as_ref()))
            .collect::<Result<Vec<_>>>()?;
        let ends = match &architecture.head {
            Head::Language => builder.language_head(&embedding)?,
            Head::Classification(labels) => {
                if labels.is_empty() {
                    return Err(Error::argument(format!(
                        "{}: the folder has no classification head, and no labels to make one for",
                        folder.display()
                    )));
                }
                builder.classification_head(labels.len())?
            }
        };
        let elements = builder.elements;
        let adapter = plan.trained.lora.as_ref().map(|lora| {
            let mut config = (*lora.config).clone();
            config.modules_to_save = builder.modules_to_save();
            config.fan_in_fan_out |= architecture.family.is_transposed();
            config
        });
        let beside = plan.trained.beside.as_ref().map(|beside| {
            let mut config = (*beside.config).clone();
            config.common_mut().modules_to_save = builder.modules_to_save();
            config
        });
        let lora_dropout = adapter.as_ref().map_or(0.0, |c| c.lora_dropout as f32);
        let parameters = builder.parameters;
        Ok(Self {
            folder: folder.to_owned(),
            embedding,
            layers,
            ends,
            parameters,
            adapter,
            beside,
            virtual_tokens: plan.trained.virtual_tokens(),
            prompt,
            lora_dropout,
            elements,
            positions: plan.positions,
            hollow: plan.hollow,
            nothing: Tensor::zeros(0, candle_core::DType::F32, &Device::Cpu)?,
            architecture,
        })
    }
}

impl Builder<'_> {
    fn embedding(&mut self) -> Result<Embedding> {
        let (names, sizes) = (self.architecture.names(), self.architecture);
        let tokens = Arc::new(self.table(&names.outer(names.tokens), sizes.vocab_size)?);
        let learned = sizes.max_position_embeddings;
        let positions = match names.positions {
            Some(name) => Some(self.table(&names.outer(name), learned)?),
            None => None,
        };
        let types = match names.types {
            Some(name) => Some(self.table(&names.outer(name), sizes.type_vocab_size)?),
            None => None,
        };
        let norm = match names.embedding_norm {
            Some(name) => {
                let name = names.outer(name);
                let norm = self.norm(&name)?;
                let theta = self.parameter(&name, &[], Some(&norm))?;
                Some((Arc::new(norm), theta))
            }
            None => None,
        };
        Ok(Embedding {
            k: sizes.hidden_size,
            tokens,
            positions,
            types,
            norm,
        })
    }

    fn layer(&mut self, at: usize, rotations: Option<&Arc<Rotations>>) -> Result<Layer> {
        let (names, sizes) = (self.architecture.names(), self.architecture);
        let (k, f, d) = (sizes.hidden_size, sizes.intermediate_size, sizes.head_dim);
        let (h, hkv) = (sizes.num_attention_heads, sizes.num_key_value_heads);
        let prefix = names.layer(at);
        let named = |name: &str| format!("{prefix}.{name}");
        let widths = match names.qkv {
            [_] => vec![(h + 2 * hkv) * d],
            _ => vec![h * d, hkv * d, hkv * d],
        };
        let qkv: Vec<_> = names
            .qkv
            .iter()
            .map(|name| named(name))
            .zip(widths)
            .collect();
        let bias = sizes.attention_bias;
        let attention = Attention {
            norm: self.norm(&named(names.attention_norm))?,
            qkv: self.group(&qkv, k, bias)?,
            o: self.group(&[(named(names.o), k)], h * d, bias)?,
            h,
            hkv,
            d,
            rotations: rotations.map(Arc::clone),
            prefix: self.prefix_len(),
            bottleneck: self.bottleneck(&named(names.attention), Behind::Attention),
        };
        let mut groups = vec![&attention.qkv, &attention.o];
        groups.extend(
            attention
                .bottleneck
                .iter()
                .flat_map(|one| [&one.down, &one.up]),
        );
        let own = Some(&attention.norm);
        let more = (attention.prefix > 0).then(|| {
            let shape = vec![attention.prefix, 2 * hkv * d];
            (prefix_name(sizes, at), shape)
        });
        let attention_theta = self.parameter_with(&named(names.attention), &groups, more, own)?;
        let up: Vec<_> = names.up.iter().map(|name| (named(name), f)).collect();
        let bias = sizes.mlp_bias;
        let mlp = Mlp {
            norm: self.norm(&named(names.mlp_norm))?,
            up: self.group(&up, k, bias)?,
            down: self.group(&[(named(names.down), k)], f, bias)?,
            activation: sizes.activation,
            bottleneck: self.bottleneck(&named(names.mlp), Behind::Mlp),
        };
        let mut groups = vec![&mlp.up, &mlp.down];
        groups.extend(mlp.bottleneck.iter().flat_map(|one| [&one.down, &one.up]));
        let mlp_theta = self.parameter(&named(names.mlp), &groups, Some(&mlp.norm))?;
        Ok(Layer {
            attention: Arc::new(attention),
            mlp: Arc::new(mlp),
            attention_theta,
            mlp_theta,
        })
    }

    fn language_head(&mut self, embedding: &Embedding) -> Result<Ends> {
        let names = self.architecture.names();
        let name = names.outer(names.norm.unwrap_or_default());
        let norm = self.norm(&name)?;
        let norm_theta = self.parameter(&name, &[], Some(&norm))?;
        let output = if self.architecture.tie_word_embeddings {
            Arc::clone(&embedding.tokens)
        } else {
            Arc::new(self.table(LM_HEAD, self.architecture.vocab_size)?)
        };
        Ok(Ends::Language {
            norm: Arc::new(norm),
            norm_theta,
            output,
        })
    }

    fn classification_head(&mut self, labels: usize) -> Result<Ends> {
        let (names, k) = (self.architecture.names(), self.architecture.hidden_size);
        let norm = match names.norm {
            Some(name) => Some(self.norm(&names.outer(name))?),
            None => None,
        };
        let pooler = match names.pooler {
            Some(name) => Some(self.group(&[(names.outer(name), k)], k, true)?),
            None => None,
        };
        let has_bias = pooler.is_some();
        let classifier = self.head_group(names.classifier, labels, k, has_bias)?;
        let groups: Vec<_> = pooler.iter().chain([&classifier]).collect();
        let theta = self.parameter(names.classifier, &groups, norm.as_ref())?;
        let classifier = Classifier {
            norm,
            pooler,
            output: classifier,
            pooled: if self.architecture.family.is_causal() {
                Pooled::Last
            } else {
                Pooled::First
            },
        };
        Ok(Ends::Classification {
            classifier: Arc::new(classifier),
            theta,
        })
    }
}
