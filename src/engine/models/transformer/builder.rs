//! The parts of a model out of a folder's weights: frozen in their stored form, or trained in a
//! flat variable a block.

use candle_core::{Device, Var};
use half::{bf16, f16};

use super::beside;
use super::head::Table;
use super::init::{normal, uniform};
use super::load::{Init, LoadPlan};
use super::norm::Norm;
use super::stored::{laid, stored};
use crate::adapter::{LoraPair, TunedConfig};
use crate::dtype::DType;
use crate::engine::models::architecture::Architecture;
use crate::engine::{Parameter, Segment};
use crate::error::{Error, Result};
use crate::folder::Weights;
use crate::lora::{Adapter, Base, FrozenWeight, Group, Member, Scaled};
use crate::quant::quantize_4bit;

/// transformers' `initializer_range`: the spread of a new head's weights.
const INITIALIZER_RANGE: f32 = 0.02;

pub struct Builder<'a> {
    weights: &'a Weights,
    pub architecture: &'a Architecture,
    plan: &'a LoadPlan,
    pub parameters: Vec<Parameter>,
    /// Weights met so far, adapters left out.
    pub elements: usize,
    /// Modules of the head that the folder has no weights for.
    fresh: Vec<String>,
}

impl<'a> Builder<'a> {
    pub fn new(weights: &'a Weights, architecture: &'a Architecture, plan: &'a LoadPlan) -> Self {
        let mut fresh = Vec::new();
        if let Some(labels) = architecture.labels() {
            let names = architecture.names();
            let absent = |module: &str| {
                !weights.contains(&stored(weights, architecture, &format!("{module}.weight")))
            };
            if labels.fresh || absent(names.classifier) {
                fresh.push(names.classifier.to_owned());
            }
            let pooler = names.pooler.map(|name| names.outer(name));
            fresh.extend(pooler.filter(|pooler| absent(pooler)));
        }
        Self {
            weights,
            architecture,
            plan,
            parameters: Vec::new(),
            elements: 0,
            fresh,
        }
    }

    fn is_fresh(&self, module: &str) -> bool {
        self.fresh.iter().any(|fresh| fresh == module)
    }

    /// Whether every weight of `module` is trained. A head without weights is wherever anything is.
    fn trains(&self, module: &str) -> bool {
        let trained = &self.plan.trained;
        let named = trained.whole.iter().any(|whole| {
            let rest = module.strip_prefix(whole.as_str());
            whole.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        });
        let any = trained.has_adapter() || !trained.whole.is_empty();
        named || (any && self.is_fresh(module))
    }

    /// PEFT's `modules_to_save`: the names it gives the heads of all its models, and a new pooler.
    pub fn modules_to_save(&self) -> Vec<String> {
        let names = self.architecture.names();
        if self.architecture.labels().is_none() || !self.trains(names.classifier) {
            return Vec::new();
        }
        let mut modules = vec!["classifier".to_owned(), "score".to_owned()];
        let pooler = names.pooler.map(|name| names.outer(name));
        if let Some(pooler) = pooler.filter(|pooler| self.trains(pooler)) {
            // The module that holds the linear layer: `bert.pooler`, not `bert.pooler.dense`.
            modules.extend(pooler.rsplit('.').nth(1).map(str::to_owned));
        }
        modules
    }

    pub fn norm(&mut self, name: &str) -> Result<Norm> {
        let (k, kind) = (self.architecture.hidden_size, self.architecture.norm);
        let mut norm = Norm {
            name: name.to_owned(),
            kind,
            k,
            eps: self.architecture.norm_eps,
            frozen: None,
        };
        let mut values = Vec::new();
        for tensor in norm.tensors() {
            values.extend(self.vector(&tensor, k)?);
        }
        self.elements += values.len();
        norm.frozen = (!self.trains(name)).then_some(values);
        Ok(norm)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let name = &stored(self.weights, self.architecture, name);
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

    /// A weight `[n, k]` in the type it is stored in; `transposed` where the file has `[k, n]`.
    fn dense(&self, name: &str, n: usize, k: usize, transposed: bool) -> Result<FrozenWeight> {
        let name = &self.shaped(name, n, k, transposed)?;
        let view = self.weights.get(name)?;
        Ok(match view.float() {
            Some(DType::F16) => {
                FrozenWeight::F16(laid(view.elements::<f16>().into_owned(), n, k, transposed))
            }
            Some(DType::BF16) => {
                FrozenWeight::BF16(laid(view.elements::<bf16>().into_owned(), n, k, transposed))
            }
            _ => FrozenWeight::F32(laid(self.weights.to_f32(name)?, n, k, transposed)),
        })
    }

    /// As [`Self::dense`]; of a hollow model its shape alone is looked at.
    fn frozen(&self, name: &str, n: usize, k: usize, transposed: bool) -> Result<FrozenWeight> {
        if !self.plan.hollow {
            return self.dense(name, n, k, transposed);
        }
        self.shaped(name, n, k, transposed)?;
        Ok(FrozenWeight::F32(Vec::new()))
    }

    /// What the folder calls a weight, which has the shape that config.json makes it.
    fn shaped(&self, name: &str, n: usize, k: usize, transposed: bool) -> Result<String> {
        let name = stored(self.weights, self.architecture, name);
        let found = self.weights.get(&name)?.shape;
        let expected = if transposed { [k, n] } else { [n, k] };
        if found != expected {
            return Err(self.misshapen(&name, found, &expected));
        }
        Ok(name)
    }

    /// A linear layer's weight: 4-bit as it was saved, quantised now, or dense.
    fn weight(&self, module: &str, n: usize, k: usize) -> Result<FrozenWeight> {
        let name = stored(self.weights, self.architecture, &format!("{module}.weight"));
        if let Some(saved) = self.weights.quantized(&name)? {
            if saved.state.shape != [n, k] {
                return Err(self.misshapen(&name, &saved.state.shape, &[n, k]));
            }
            return Ok(FrozenWeight::FourBit(saved));
        }
        let dense = self.frozen(&name, n, k, self.is_transposed(module))?;
        if self.plan.hollow {
            return Ok(dense);
        }
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

    /// Whether a module's weight is stored `[k, n]`: heads are linear layers in every family.
    pub fn is_transposed(&self, module: &str) -> bool {
        self.architecture.family.is_transposed() && module != self.architecture.output()
    }

    /// Projections of one input with `k` features: `(module, out features)`.
    pub fn group(
        &mut self,
        projections: &[(String, usize)],
        k: usize,
        bias: bool,
    ) -> Result<Group> {
        let weights = |builder: &Self| {
            let weights = projections.iter().map(|(module, n)| {
                if builder.is_fresh(module) {
                    Ok(builder.fresh_weight(module, *n, k))
                } else {
                    builder.weight(module, *n, k)
                }
            });
            weights.collect::<Result<Vec<_>>>()
        };
        self.projections(projections, k, bias, weights)
    }

    /// The classification head, which is never quantised.
    pub fn head_group(&mut self, module: &str, n: usize, k: usize, bias: bool) -> Result<Group> {
        let weights = |builder: &Self| {
            Ok(vec![if builder.is_fresh(module) {
                builder.fresh_weight(module, n, k)
            } else {
                builder.dense(&format!("{module}.weight"), n, k, false)?
            }])
        };
        self.projections(&[(module.to_owned(), n)], k, bias, weights)
    }

    fn fresh_weight(&self, module: &str, n: usize, k: usize) -> FrozenWeight {
        let mut values = vec![0.0; n * k];
        self.fresh_values(&format!("{module}.weight"), &mut values);
        FrozenWeight::F32(values)
    }

    /// A new layer's, as transformers initialises it: normal weights, biases of zero.
    fn fresh_values(&self, name: &str, out: &mut [f32]) {
        if name.rsplit('.').next() == Some("bias") {
            out.fill(0.0);
        } else {
            normal(self.plan.seed, name, INITIALIZER_RANGE, out);
        }
    }

    fn projections(
        &mut self,
        projections: &[(String, usize)],
        k: usize,
        bias: bool,
        weights: impl FnOnce(&Self) -> Result<Vec<FrozenWeight>>,
    ) -> Result<Group> {
        let width: usize = projections.iter().map(|(_, n)| n).sum();
        self.elements += width * k + if bias { width } else { 0 };
        let members = projections.iter().map(|(module, n)| Member {
            name: module.clone(),
            n: *n,
            adapter: self.adapter_of(module),
            scaled: self.scaled_of(module),
        });
        let mut members: Vec<Member> = members.collect();
        let base = if projections.iter().any(|(module, _)| self.trains(module)) {
            for member in &mut members {
                member.adapter = None;
                member.scaled = None;
                let name = format!("{}.weight", member.name);
                let name = stored(self.weights, self.architecture, &name);
                if self.weights.contains(&name) && self.weights.quantized(&name)?.is_some() {
                    return Err(Error::argument(format!(
                        "this method trains dense weights, but {} is stored in 4 bits; use qlora",
                        member.name
                    )));
                }
            }
            Base::Trained {
                biases: vec![bias; projections.len()],
            }
        } else {
            let biases = projections.iter().map(|(module, n)| {
                if !bias {
                    Ok(None)
                } else if self.is_fresh(module) {
                    Ok(Some(vec![0.0; *n]))
                } else {
                    self.vector(&format!("{module}.bias"), *n).map(Some)
                }
            });
            Base::Frozen {
                biases: biases.collect::<Result<_>>()?,
                weights: weights(self)?,
            }
        };
        Ok(Group { k, members, base })
    }

    fn adapter_of(&self, module: &str) -> Option<Adapter> {
        let lora = self.plan.trained.lora.as_ref()?;
        let target = lora.targets.iter().find(|target| target.module == module)?;
        Some(Adapter {
            r: target.r,
            scaling: target.scaling as f32,
        })
    }

    /// The configuration of a method beside LoRA.
    pub fn beside(&self) -> Option<&'a TunedConfig> {
        let beside = self.plan.trained.beside.as_ref();
        beside.map(|beside| &*beside.config)
    }

    /// Whether that method's tensors begin here, rather than in a saved adapter.
    pub fn is_new(&self) -> bool {
        let beside = self.plan.trained.beside.as_ref();
        beside.is_some_and(|beside| beside.saved.is_none())
    }

    pub fn seed(&self) -> u64 {
        self.plan.seed
    }

    fn scaled_of(&self, module: &str) -> Option<Scaled> {
        let beside = self.plan.trained.beside.as_ref()?;
        beside.scaled.get(module).copied()
    }

    /// An embedding or output table `[n, k]`.
    pub fn table(&mut self, module: &str, n: usize) -> Result<Table> {
        let k = self.architecture.hidden_size;
        let name = format!("{module}.weight");
        self.elements += n * k;
        if !self.trains(module) {
            // A prompt may begin at rows of the embedding.
            let drawn = matches!(self.beside(), Some(TunedConfig::Virtual(_)));
            let weight = if drawn {
                self.dense(&name, n, k, false)?
            } else {
                self.frozen(&name, n, k, false)?
            };
            return Ok(Table::Frozen(weight));
        }
        let weight = self.dense(&name, n, k, false)?;
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

    /// Registers what a block trains: its groups' tensors, then its norm's.
    pub fn parameter(
        &mut self,
        name: &str,
        groups: &[&Group],
        norm: Option<&Norm>,
    ) -> Result<Option<usize>> {
        self.parameter_with(name, groups, None, norm)
    }

    /// Registers what a block trains: its groups' tensors, one more, then its norm's.
    pub fn parameter_with(
        &mut self,
        name: &str,
        groups: &[&Group],
        more: Option<(String, Vec<usize>)>,
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
                    decay: tensor.shape.len() > 1 && !beside::is_factor(&tensor.name),
                    name: tensor.name,
                    offset: at,
                    shape: tensor.shape,
                });
            }
        }
        if let Some((name, shape)) = more {
            let offset = values.len();
            values.resize(offset + shape.iter().product::<usize>(), 0.0);
            self.fill(&name, &shape, &mut values[offset..])?;
            segments.push(Segment {
                decay: true,
                name,
                offset,
                shape,
            });
        }
        if let Some(norm) = norm.filter(|norm| norm.frozen.is_none()) {
            for name in norm.tensors() {
                segments.push(Segment {
                    offset: values.len(),
                    shape: vec![norm.k],
                    decay: false,
                    name: name.clone(),
                });
                values.extend(self.vector(&name, norm.k)?);
            }
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
        if let Some(beside) = &self.plan.trained.beside
            && beside.fill(self.plan.seed, name, shape, out)?
        {
            return Ok(());
        }
        let init = self.plan.trained.lora.as_ref().map(|lora| &lora.init);
        let factor = (name
            .strip_suffix(".lora_A.weight")
            .map(|module| (module, true)))
        .or_else(|| {
            name.strip_suffix(".lora_B.weight")
                .map(|module| (module, false))
        });
        match (factor, init) {
            (Some((_, is_a)), Some(Init::Random)) => {
                if is_a {
                    uniform(self.plan.seed, name, 1.0 / (shape[1] as f32).sqrt(), out);
                }
                Ok(())
            }
            (Some((module, is_a)), Some(Init::Saved(adapter))) => {
                let pair = adapter.modules.get(module);
                let from =
                    pair.map(|pair: &LoraPair| if is_a { &pair.lora_a } else { &pair.lora_b });
                copy_saved(name, shape, from, out)
            }
            (None, Some(Init::Saved(adapter))) => {
                let from = adapter.saved.get(name).map(|saved| &saved.values);
                copy_saved(name, shape, from, out)
            }
            _ => self.fill_from_base(name, shape, out),
        }
    }

    fn fill_from_base(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<()> {
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        if self.is_fresh(module) {
            self.fresh_values(name, out);
            return Ok(());
        }
        if let [n, k] = shape {
            self.dense(name, *n, *k, self.is_transposed(module))?
                .widen_into(out)
        } else {
            out.copy_from_slice(&self.vector(name, out.len())?);
            Ok(())
        }
    }
}

pub fn copy_saved(
    name: &str,
    shape: &[usize],
    from: Option<&Vec<f32>>,
    out: &mut [f32],
) -> Result<()> {
    match from {
        Some(values) if values.len() == out.len() => {
            out.copy_from_slice(values);
            Ok(())
        }
        Some(values) => Err(Error::argument(format!(
            "the adapter's {name} has {} elements, but this model needs {shape:?}",
            values.len()
        ))),
        None => Err(Error::argument(format!("the adapter has no tensor {name}"))),
    }
}
