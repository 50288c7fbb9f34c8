//! What a trained Llama leaves behind, and its weights merged with an adapter.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::head::widened;
use super::{Llama, linear_modules};
use crate::adapter::{self, LoraPair};
use crate::dtype::DType;
use crate::engine::Mode;
use crate::error::{Error, Result};
use crate::folder::{
    ConfigFile, MAX_SHARD_SIZE, ModelFolder, Tensor, Weights, encode, file_dtype, write_model,
};
use crate::lora::{Base, FrozenWeight, Group};
use crate::matmul::{Into, Mat, MatMut, Threads, matmul};

/// A tensor's shape and values.
type Shaped = (Vec<usize>, Vec<f32>);

impl Llama {
    pub(super) fn groups(&self) -> impl Iterator<Item = &Group> {
        self.layers.iter().flat_map(|layer| {
            [
                &layer.attention.qkv,
                &layer.attention.o,
                &layer.mlp.gate_up,
                &layer.mlp.down,
            ]
        })
    }

    pub(super) fn frozen_weights(&self) -> impl Iterator<Item = &FrozenWeight> {
        self.groups().flat_map(|group| match &group.base {
            Base::Frozen { weights, .. } => weights.as_slice(),
            Base::Trained { .. } => &[],
        })
    }

    /// The output layer in f32, `[vocabulary, k]`.
    pub(super) fn output_weights(&self) -> Result<Vec<f32>> {
        match widened(Some(&self.output))? {
            Some(wide) => Ok(wide.to_vec()),
            None => Ok(self
                .table_theta(&self.output, Mode::Eval)
                .to_vec1::<f32>()?),
        }
    }

    /// The trained tensors by name.
    fn trained(&self) -> Result<BTreeMap<String, Shaped>> {
        let mut tensors = BTreeMap::new();
        for parameter in &self.parameters {
            let values = parameter.var.to_vec1::<f32>()?;
            for segment in &parameter.segments {
                let part = values[segment.offset..segment.offset + segment.len()].to_vec();
                tensors.insert(segment.name.clone(), (segment.shape.clone(), part));
            }
        }
        Ok(tensors)
    }

    /// The adapter as it is now; none if the model has none.
    pub fn adapter(&self) -> Result<Option<adapter::Adapter>> {
        let Some(config) = &self.adapter else {
            return Ok(None);
        };
        let mut tensors = self.trained()?;
        let mut modules = BTreeMap::new();
        for module in linear_modules(&self.config) {
            let a = tensors.remove(&format!("{module}.lora_A.weight"));
            let b = tensors.remove(&format!("{module}.lora_B.weight"));
            if let (Some((a_shape, lora_a)), Some((b_shape, lora_b))) = (a, b) {
                modules.insert(
                    module,
                    LoraPair {
                        r: a_shape[0],
                        in_features: a_shape[1],
                        out_features: b_shape[0],
                        lora_a,
                        lora_b,
                    },
                );
            }
        }
        Ok(Some(adapter::Adapter {
            config: config.clone(),
            modules,
        }))
    }

    /// Writes the adapter in PEFT's format, or the whole model in f32 when every weight was trained.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        if let Some(adapter) = self.adapter()? {
            return adapter::write(folder, &adapter, DType::F32, ADAPTER_CARD);
        }
        let tensors = self.trained()?;
        if tensors.is_empty() {
            return Err(Error::argument("the model has nothing that was trained"));
        }
        let config = ConfigFile::open(&self.folder)?;
        let tensors = tensors
            .iter()
            .map(|(name, (shape, values))| {
                Tensor::from_f32(name.clone(), DType::F32, shape, values)
            })
            .collect();
        write_model(
            folder,
            ModelFolder {
                config: &config,
                dtype: DType::F32,
                tensors,
                base: Some(&self.folder),
                model_card: None,
                max_shard_size: MAX_SHARD_SIZE,
            },
        )
    }

    /// Writes the model's folder with the adapter added to its weights: `W + scaling · B·A` in f32,
    /// rounded once to `dtype` (the base's own if none is given). 4-bit weights are dequantised.
    /// Gives the number of merged modules.
    pub fn write_merged(&self, folder: &Path, dtype: Option<DType>) -> Result<usize> {
        let config = ConfigFile::open(&self.folder)?;
        let weights = Weights::open(&self.folder)?;
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => config.dtype()?.unwrap_or(DType::F32),
        };
        let trained = self.trained()?;
        let mut merged = 0;
        let mut tensors = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for group in self.groups() {
            let Base::Frozen { weights, .. } = &group.base else {
                return Err(Error::argument(
                    "a model that is trained whole has no adapter to merge",
                ));
            };
            for (member, weight) in group.members.iter().zip(weights) {
                let name = format!("{}.weight", member.name);
                seen.insert(name.clone());
                let pair = member.adapter.map(|adapter| {
                    (
                        adapter,
                        &trained[&format!("{}.lora_A.weight", member.name)].1,
                        &trained[&format!("{}.lora_B.weight", member.name)].1,
                    )
                });
                merged += usize::from(pair.is_some());
                let (n, k) = (member.n, group.k);
                tensors.push(Tensor::lazy(name, file_dtype(dtype), &[n, k], move || {
                    let mut out = vec![0.0f32; n * k];
                    weight.widen_into(&mut out)?;
                    if let Some((adapter, a, b)) = pair {
                        let b = Mat::new(b, n, adapter.r);
                        let a = Mat::new(a, adapter.r, k);
                        let into = MatMut::new(&mut out, n, k);
                        matmul(into, Into::Accumulate, adapter.scaling, b, a, Threads::All);
                    }
                    Ok(Cow::Owned(encode(&out, dtype).into_owned()))
                }));
            }
        }
        let rest: Vec<String> = weights
            .names()
            .filter(|name| !seen.iter().any(|done| name.starts_with(done.as_str())))
            .map(str::to_owned)
            .collect();
        for name in rest {
            let view = weights.get(&name)?;
            let shape = view.shape.to_vec();
            let weights = &weights;
            tensors.push(Tensor::lazy(
                name.clone(),
                file_dtype(dtype),
                &shape,
                move || {
                    Ok(Cow::Owned(
                        encode(&weights.to_f32(&name)?, dtype).into_owned(),
                    ))
                },
            ));
        }
        write_model(
            folder,
            ModelFolder {
                config: &config,
                dtype,
                tensors,
                base: Some(&self.folder),
                model_card: None,
                max_shard_size: MAX_SHARD_SIZE,
            },
        )?;
        Ok(merged)
    }

    /// Names of the modules that have an adapter.
    pub fn adapter_modules(&self) -> Vec<&str> {
        self.groups()
            .flat_map(|group| &group.members)
            .filter(|member| member.adapter.is_some())
            .map(|member| member.name.as_str())
            .collect()
    }
}

/// Stands until the run's own card is written over it.
const ADAPTER_CARD: &str = "---\nlibrary_name: peft\ntags:\n- lora\n- ferrotune\n---\n\n\
A LoRA adapter trained with ferrotune, in PEFT's format.\n";
