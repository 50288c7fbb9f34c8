//! Building a Llama from a Hugging Face folder, with what is trained of it.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::attention::Attention;
use super::block::Norm;
use super::head::Table;
use super::mlp::Mlp;
use super::{Layer, Llama, LlamaConfig};
use crate::adapter::{self, AdapterConfig, LoraPair, Target};
use crate::dtype::{DType, QuantType};
use crate::engine::ops::rope::Rotations;
use crate::engine::{Parameter, Segment};
use crate::error::{Error, Result};
use crate::folder::Weights;
use crate::lora::{Adapter, Base, FrozenWeight, Group, Member};
use crate::quant::quantize_4bit;

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
    Random { seed: u64 },
    /// A saved adapter's.
    Saved(Box<adapter::Adapter>),
}

/// What is trained of a model.
#[derive(Debug, Clone)]
pub enum Trained {
    Nothing,
    Lora {
        config: Box<AdapterConfig>,
        targets: Vec<Target>,
        init: Init,
    },
    Everything,
}

/// How a model is to be loaded.
#[derive(Debug, Clone)]
pub struct LoadPlan {
    pub quantize: Option<Quantize>,
    pub trained: Trained,
    /// Positions a sequence may have, at most the model's own.
    pub positions: usize,
}

/// The names of a model's linear layers, the output layer last.
pub fn linear_modules(config: &LlamaConfig) -> Vec<String> {
    let layer = |at: usize| {
        ["q_proj", "k_proj", "v_proj", "o_proj"]
            .map(|name| format!("model.layers.{at}.self_attn.{name}"))
            .into_iter()
            .chain(
                ["gate_proj", "up_proj", "down_proj"]
                    .map(|name| format!("model.layers.{at}.mlp.{name}")),
            )
    };
    (0..config.num_hidden_layers)
        .flat_map(layer)
        .chain(["lm_head".to_owned()])
        .collect()
}

/// Number of weights the sizes make.
pub fn base_parameters(config: &LlamaConfig) -> usize {
    let (k, f, d) = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
    );
    let (q, kv) = (
        config.num_attention_heads * d,
        config.num_key_value_heads * d,
    );
    let attention_bias = if config.attention_bias {
        q + 2 * kv + k
    } else {
        0
    };
    let mlp_bias = if config.mlp_bias { 2 * f + k } else { 0 };
    let layer = 2 * k * q + 2 * k * kv + 3 * k * f + 2 * k + attention_bias + mlp_bias;
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    config.num_hidden_layers * layer + tables * config.vocab_size * k + k
}

struct Builder<'a> {
    weights: &'a Weights,
    config: &'a LlamaConfig,
    plan: &'a LoadPlan,
    parameters: Vec<Parameter>,
}

impl Llama {
    /// Loads `folder` as `plan` says.
    ///
    /// # Errors
    /// `Format` for a missing, truncated or misshapen tensor, naming it; `Argument` for a plan that
    /// does not fit the model.
    pub fn load(folder: &Path, config: LlamaConfig, plan: &LoadPlan) -> Result<Self> {
        let limit = config.max_position_embeddings;
        if plan.positions > limit {
            return Err(Error::argument(format!(
                "sequence_length {} is longer than the {limit} positions the model was made for \
                 (max_position_embeddings)",
                plan.positions
            )));
        }
        let weights = Weights::open(folder)?;
        let mut builder = Builder {
            weights: &weights,
            config: &config,
            plan,
            parameters: Vec::new(),
        };
        let embedding = Arc::new(builder.table("model.embed_tokens")?);
        let rotations = Arc::new(Rotations::new(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            plan.positions,
        ));
        let layers = (0..config.num_hidden_layers)
            .map(|at| builder.layer(at, &rotations))
            .collect::<Result<Vec<_>>>()?;
        let norm = builder.norm("model.norm")?;
        let norm_theta = builder.parameter("model.norm", &[], Some(&norm))?;
        let output = if config.tie_word_embeddings {
            Arc::clone(&embedding)
        } else {
            Arc::new(builder.table("lm_head")?)
        };
        let (adapter, lora_dropout) = match &plan.trained {
            Trained::Lora { config, .. } => (Some((**config).clone()), config.lora_dropout as f32),
            _ => (None, 0.0),
        };
        let parameters = builder.parameters;
        Ok(Self {
            folder: folder.to_owned(),
            embedding,
            output,
            layers,
            norm: Arc::new(norm),
            norm_theta,
            parameters,
            adapter,
            lora_dropout,
            positions: plan.positions,
            nothing: Tensor::zeros(0, candle_core::DType::F32, &Device::Cpu)?,
            config,
        })
    }
}

impl Builder<'_> {
    fn everything(&self) -> bool {
        matches!(self.plan.trained, Trained::Everything)
    }

    fn layer(&mut self, at: usize, rotations: &Arc<Rotations>) -> Result<Layer> {
        let config = self.config;
        let (k, f, d) = (
            config.hidden_size,
            config.intermediate_size,
            config.head_dim,
        );
        let (h, hkv) = (config.num_attention_heads, config.num_key_value_heads);
        let prefix = format!("model.layers.{at}");
        let name = |inner: &str| format!("{prefix}.self_attn.{inner}_proj");
        let sizes = [
            (name("q"), h * d),
            (name("k"), hkv * d),
            (name("v"), hkv * d),
        ];
        let bias = config.attention_bias;
        let attention = Attention {
            norm: self.norm(&format!("{prefix}.input_layernorm"))?,
            qkv: self.group(&sizes, k, bias)?,
            o: self.group(&[(name("o"), k)], h * d, bias)?,
            h,
            hkv,
            d,
            rotations: Arc::clone(rotations),
        };
        let groups = [&attention.qkv, &attention.o];
        let attention_theta = self.parameter(
            &format!("{prefix}.self_attn"),
            &groups,
            Some(&attention.norm),
        )?;
        let name = |inner: &str| format!("{prefix}.mlp.{inner}_proj");
        let bias = config.mlp_bias;
        let mlp = Mlp {
            norm: self.norm(&format!("{prefix}.post_attention_layernorm"))?,
            gate_up: self.group(&[(name("gate"), f), (name("up"), f)], k, bias)?,
            down: self.group(&[(name("down"), k)], f, bias)?,
        };
        let groups = [&mlp.gate_up, &mlp.down];
        let mlp_theta = self.parameter(&format!("{prefix}.mlp"), &groups, Some(&mlp.norm))?;
        Ok(Layer {
            attention: Arc::new(attention),
            mlp: Arc::new(mlp),
            attention_theta,
            mlp_theta,
        })
    }

    fn norm(&self, name: &str) -> Result<Norm> {
        let k = self.config.hidden_size;
        let weight = self.vector(&format!("{name}.weight"), k)?;
        Ok(Norm {
            name: name.to_owned(),
            k,
            eps: self.config.rms_norm_eps,
            frozen: (!self.everything()).then_some(weight),
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let view = self.weights.get(name)?;
        if view.shape != [len] {
            return Err(self.misshapen(name, view.shape, &[len]));
        }
        self.weights.to_f32(name)
    }

    fn misshapen(&self, name: &str, found: &[usize], expected: &[usize]) -> Error {
        Error::format(
            self.weights.file_of(name),
            format!("{name} has shape {found:?}, but config.json makes it {expected:?}"),
        )
    }

    /// A weight `[n, k]` in the form it is stored in.
    fn dense(&self, name: &str, n: usize, k: usize) -> Result<FrozenWeight> {
        let view = self.weights.get(name)?;
        if view.shape != [n, k] {
            return Err(self.misshapen(name, view.shape, &[n, k]));
        }
        Ok(match view.float() {
            Some(DType::F16) => FrozenWeight::F16(view.elements::<f16>().into_owned()),
            Some(DType::BF16) => FrozenWeight::BF16(view.elements::<bf16>().into_owned()),
            _ => FrozenWeight::F32(self.weights.to_f32(name)?),
        })
    }

    /// A linear layer's weight: 4-bit as it was saved, quantised now, or dense.
    fn weight(&self, module: &str, n: usize, k: usize) -> Result<FrozenWeight> {
        let name = format!("{module}.weight");
        if let Some(saved) = self.weights.quantized(&name)? {
            if saved.state.shape != [n, k] {
                return Err(self.misshapen(&name, &saved.state.shape, &[n, k]));
            }
            return Ok(FrozenWeight::FourBit(saved));
        }
        let dense = self.dense(&name, n, k)?;
        let Some(how) = self.plan.quantize else {
            return Ok(dense);
        };
        let shape = [n, k];
        let (kind, size, double) = (how.quant_type, how.blocksize, how.double_quant);
        Ok(FrozenWeight::FourBit(match &dense {
            FrozenWeight::F32(values) => quantize_4bit(values, &shape, kind, size, double)?,
            FrozenWeight::F16(values) => quantize_4bit(values, &shape, kind, size, double)?,
            FrozenWeight::BF16(values) => quantize_4bit(values, &shape, kind, size, double)?,
            FrozenWeight::FourBit(_) => return Ok(dense),
        }))
    }

    /// Projections of one input with `k` features: `(module, out features)`.
    fn group(&self, projections: &[(String, usize)], k: usize, bias: bool) -> Result<Group> {
        let members = projections
            .iter()
            .map(|(module, n)| Member {
                name: module.clone(),
                n: *n,
                adapter: self.adapter_of(module),
            })
            .collect();
        let base = if self.everything() {
            for (module, _) in projections {
                if self
                    .weights
                    .quantized(&format!("{module}.weight"))?
                    .is_some()
                {
                    return Err(Error::argument(format!(
                        "method full trains dense weights, but {module} is stored in 4 bits; use qlora"
                    )));
                }
            }
            Base::Trained {
                biases: vec![bias; projections.len()],
            }
        } else {
            let weights = projections
                .iter()
                .map(|(module, n)| self.weight(module, *n, k));
            let biases = projections.iter().map(|(module, n)| {
                bias.then(|| self.vector(&format!("{module}.bias"), *n))
                    .transpose()
            });
            Base::Frozen {
                weights: weights.collect::<Result<_>>()?,
                biases: biases.collect::<Result<_>>()?,
            }
        };
        Ok(Group { k, members, base })
    }

    fn adapter_of(&self, module: &str) -> Option<Adapter> {
        let Trained::Lora { targets, .. } = &self.plan.trained else {
            return None;
        };
        let target = targets.iter().find(|target| target.module == module)?;
        Some(Adapter {
            r: target.r,
            scaling: target.scaling as f32,
        })
    }

    /// An embedding or output table `[vocabulary, k]`.
    fn table(&mut self, module: &str) -> Result<Table> {
        let (n, k) = (self.config.vocab_size, self.config.hidden_size);
        let name = format!("{module}.weight");
        let weight = self.dense(&name, n, k)?;
        if !self.everything() {
            return Ok(Table::Frozen(weight));
        }
        let mut values = vec![0.0f32; n * k];
        weight.widen_into(&mut values)?;
        let segments = vec![Segment {
            name,
            offset: 0,
            shape: vec![n, k],
            decay: true,
        }];
        Ok(Table::Trained(self.push(module, values, segments)?))
    }

    /// Registers what a block trains: its groups' tensors, then its norm's weight.
    fn parameter(
        &mut self,
        name: &str,
        groups: &[&Group],
        norm: Option<&Norm>,
    ) -> Result<Option<usize>> {
        let mut values = Vec::new();
        let mut segments = Vec::new();
        for group in groups {
            let start = values.len();
            values.resize(start + group.theta_len(), 0.0);
            for tensor in group.tensors() {
                let len: usize = tensor.shape.iter().product();
                let at = start + tensor.offset;
                self.fill(&tensor.name, &tensor.shape, &mut values[at..at + len])?;
                segments.push(Segment {
                    decay: tensor.shape.len() > 1,
                    name: tensor.name,
                    offset: at,
                    shape: tensor.shape,
                });
            }
        }
        if let Some(norm) = norm.filter(|norm| norm.frozen.is_none()) {
            let name = format!("{}.weight", norm.name);
            segments.push(Segment {
                offset: values.len(),
                shape: vec![norm.k],
                decay: false,
                name: name.clone(),
            });
            values.extend(self.vector(&name, norm.k)?);
        }
        if values.is_empty() {
            return Ok(None);
        }
        self.push(name, values, segments).map(Some)
    }

    fn push(&mut self, name: &str, values: Vec<f32>, segments: Vec<Segment>) -> Result<usize> {
        let len = values.len();
        let var = Var::from_vec(values, len, &Device::Cpu)?;
        self.parameters.push(Parameter {
            name: name.to_owned(),
            var,
            segments,
        });
        Ok(self.parameters.len() - 1)
    }

    /// First values of a trained tensor.
    fn fill(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<()> {
        let Trained::Lora { init, .. } = &self.plan.trained else {
            match shape {
                [n, k] => self.dense(name, *n, *k)?.widen_into(out)?,
                _ => out.copy_from_slice(&self.vector(name, out.len())?),
            }
            return Ok(());
        };
        let (module, is_a) = match name.strip_suffix(".lora_A.weight") {
            Some(module) => (module, true),
            None => (name.trim_end_matches(".lora_B.weight"), false),
        };
        match init {
            Init::Random { seed } => {
                if is_a {
                    uniform(*seed, name, 1.0 / (shape[1] as f32).sqrt(), out);
                }
            }
            Init::Saved(adapter) => {
                let pair = adapter.modules.get(module);
                let from =
                    pair.map(|pair: &LoraPair| if is_a { &pair.lora_a } else { &pair.lora_b });
                match from {
                    Some(values) if values.len() == out.len() => out.copy_from_slice(values),
                    Some(values) => {
                        return Err(Error::argument(format!(
                            "the adapter's {name} has {} elements, but this model needs {shape:?}",
                            values.len()
                        )));
                    }
                    None => {
                        return Err(Error::argument(format!("the adapter has no tensor {name}")));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Uniform numbers in ±bound that depend on the seed and the tensor's name alone.
fn uniform(seed: u64, name: &str, bound: f32, out: &mut [f32]) {
    // FNV-1a: stable across versions and machines, unlike std's hasher.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut random = ChaCha8Rng::seed_from_u64(seed ^ hash);
    for value in out {
        let unit = (random.next_u32() >> 8) as f32 / (1u32 << 24) as f32;
        *value = (2.0 * unit - 1.0) * bound;
    }
}
