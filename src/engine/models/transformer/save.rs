//! What a trained model leaves behind, and its weights merged with an adapter.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::beside::{is_factor, scale_of, scaled_bias, write_adapter};
use super::head::widened;
use super::stored::transpose;
use super::{Ends, Transformer, linear_modules};
use crate::adapter::{self, LoraPair, SavedTensor};
use crate::dtype::DType;
use crate::engine::Mode;
use crate::engine::models::architecture::Task;
use crate::engine::models::names::{Family, LM_HEAD};
use crate::error::{Error, Result};
use crate::folder::{
    ConfigFile, MAX_SHARD_SIZE, ModelFolder, Tensor, Weights, encode, file_dtype, write_model,
};
use crate::lora::{Base, FrozenWeight, Group};
use crate::matmul::{Into, Mat, MatMut, Threads, matmul};

impl Transformer {
    pub(super) fn groups(&self) -> impl Iterator<Item = &Group> {
        let layers = self.layers.iter().flat_map(|layer| {
            [
                &layer.attention.qkv,
                &layer.attention.o,
                &layer.mlp.up,
                &layer.mlp.down,
            ]
        });
        let head = match &self.ends {
            Ends::Language { .. } => None,
            Ends::Classification { classifier, .. } => Some(classifier),
        };
        let head = head.into_iter();
        layers.chain(head.flat_map(|head| head.pooler.iter().chain([&head.output])))
    }

    pub(super) fn frozen_weights(&self) -> impl Iterator<Item = &FrozenWeight> {
        self.groups().flat_map(|group| match &group.base {
            Base::Frozen { weights, .. } => weights.as_slice(),
            Base::Trained { .. } => &[],
        })
    }

    /// A language model's output layer in f32, `[vocabulary, k]`.
    pub(super) fn output_weights(&self) -> Result<Vec<f32>> {
        let Ends::Language { output, .. } = &self.ends else {
            return Err(Error::run("a classification model has no output layer"));
        };
        match widened(Some(output))? {
            Some(wide) => Ok(wide.to_vec()),
            None => Ok(self.table_theta(output, Mode::Eval).to_vec1::<f32>()?),
        }
    }

    /// The trained tensors by name, in the layout of linear layers.
    pub(super) fn trained(&self) -> Result<BTreeMap<String, SavedTensor>> {
        let mut tensors = BTreeMap::new();
        for parameter in &self.parameters {
            let values = parameter.var.to_vec1::<f32>()?;
            for segment in &parameter.segments {
                let shape = segment.shape.clone();
                let values = values[segment.offset..segment.offset + segment.len()].to_vec();
                tensors.insert(segment.name.clone(), SavedTensor { shape, values });
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
        for module in linear_modules(&self.architecture) {
            let a = tensors.remove(&format!("{module}.lora_A.weight"));
            let b = tensors.remove(&format!("{module}.lora_B.weight"));
            if let (Some(a), Some(b)) = (a, b) {
                modules.insert(
                    module,
                    LoraPair {
                        r: a.shape[0],
                        in_features: a.shape[1],
                        out_features: b.shape[0],
                        lora_a: a.values,
                        lora_b: b.values,
                    },
                );
            }
        }
        Ok(Some(adapter::Adapter {
            config: config.clone(),
            modules,
            saved: tensors,
        }))
    }

    /// Writes the adapter in PEFT's format, or the whole model in f32 where weights were trained.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let config = match self.architecture.task() {
            Task::Generation => None,
            Task::Classification => Some(self.config()?.text()),
        };
        if let Some(tuned) = self.tuned()? {
            return write_adapter(folder, &tuned, config.as_deref());
        }
        if let Some(adapter) = self.adapter()? {
            return adapter::write(
                folder,
                &adapter,
                DType::F32,
                ADAPTER_CARD,
                config.as_deref(),
            );
        }
        let tensors = self.trained()?;
        if tensors.is_empty() {
            return Err(Error::argument("the model has nothing that was trained"));
        }
        let (config, weights) = (self.config()?, Weights::open(&self.folder)?);
        let tensors = tensors
            .into_iter()
            .map(|(name, tensor)| self.stored_tensor(name, tensor, DType::F32))
            .collect();
        self.write_folder(folder, DType::F32, &config, &weights, tensors)
    }

    /// Whether a tensor's file layout is the transpose of ours.
    fn is_transposed(&self, name: &str, shape: &[usize]) -> bool {
        let names = self.architecture.names();
        let layer = format!("{}.{}.", names.base, names.layers);
        self.architecture.family.is_transposed() && shape.len() == 2 && name.starts_with(&layer)
    }

    fn stored_tensor<'a>(&self, name: String, tensor: SavedTensor, dtype: DType) -> Tensor<'a> {
        let SavedTensor { shape, values } = tensor;
        let (shape, values) = match shape[..] {
            [n, k] if self.is_transposed(&name, &shape) => (vec![k, n], transpose(&values, n, k)),
            _ => (shape, values),
        };
        Tensor::lazy(name, file_dtype(dtype), &shape, move || {
            Ok(Cow::Owned(encode(&values, dtype).into_owned()))
        })
    }

    /// config.json of the trained model: the base's, with the head's classes and labels.
    pub(super) fn config(&self) -> Result<ConfigFile> {
        let file = ConfigFile::open(&self.folder)?;
        let changes = self.architecture.changes(&file);
        Ok(file.with(changes))
    }

    /// Writes the model's folder with the adapter added to its weights: `W + scaling · B·A` in f32,
    /// rounded once to `dtype` (the base's own if none is given). 4-bit weights are dequantised.
    /// Gives the number of merged modules.
    pub fn write_merged(&self, folder: &Path, dtype: Option<DType>) -> Result<usize> {
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => ConfigFile::open(&self.folder)?
                .dtype()?
                .unwrap_or(DType::F32),
        };
        let (config, base) = (self.config()?, Weights::open(&self.folder)?);
        let (factors, whole): (BTreeMap<_, _>, BTreeMap<_, _>) = self
            .trained()?
            .into_iter()
            .partition(|(name, _)| name.contains(".lora_") || is_factor(name));
        let mut merged = 0;
        let mut tensors: Vec<Tensor> = whole
            .into_iter()
            .map(|(name, tensor)| self.stored_tensor(name, tensor, dtype))
            .collect();
        for group in self.groups() {
            let Base::Frozen { weights, .. } = &group.base else {
                continue;
            };
            for (at, (member, weight)) in group.members.iter().zip(weights).enumerate() {
                let name = format!("{}.weight", member.name);
                let scale = scale_of(member, &factors);
                if let Some(bias) = scaled_bias(group, at, scale, dtype) {
                    tensors.push(bias);
                }
                let pair = member.adapter.map(|adapter| {
                    (
                        adapter,
                        &factors[&format!("{}.lora_A.weight", member.name)].values,
                        &factors[&format!("{}.lora_B.weight", member.name)].values,
                    )
                });
                merged += usize::from(pair.is_some() || scale.is_some());
                let (n, k) = (member.n, group.k);
                let transposed = self.is_transposed(&name, &[n, k]);
                let shape = if transposed { [k, n] } else { [n, k] };
                tensors.push(Tensor::lazy(name, file_dtype(dtype), &shape, move || {
                    let mut out = vec![0.0f32; n * k];
                    weight.widen_into(&mut out)?;
                    if let Some((adapter, a, b)) = pair {
                        let b = Mat::new(b, n, adapter.r);
                        let a = Mat::new(a, adapter.r, k);
                        let into = MatMut::new(&mut out, n, k);
                        matmul(into, Into::Accumulate, adapter.scaling, b, a, Threads::All);
                    }
                    if let Some((scaled, l)) = scale {
                        Group::merge_scaled(scaled, l, &mut out);
                    }
                    if transposed {
                        out = transpose(&out, n, k);
                    }
                    Ok(Cow::Owned(encode(&out, dtype).into_owned()))
                }));
            }
        }
        self.write_folder(folder, dtype, &config, &base, tensors)?;
        Ok(merged)
    }

    /// Writes a Hugging Face folder of `tensors` and, in `dtype`, of what the base has beside them.
    fn write_folder<'a>(
        &'a self,
        folder: &Path,
        dtype: DType,
        config: &'a ConfigFile,
        weights: &'a Weights,
        mut tensors: Vec<Tensor<'a>>,
    ) -> Result<()> {
        let done: HashSet<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        for stored in weights.names() {
            let Some(name) = self.kept(weights, stored) else {
                continue;
            };
            if done.iter().any(|done| name.starts_with(done.as_str())) {
                continue;
            }
            let view = weights.get(stored)?;
            let shape = view.shape.to_vec();
            tensors.push(Tensor::lazy(name, file_dtype(dtype), &shape, move || {
                let values = weights.to_f32(stored)?;
                Ok(Cow::Owned(encode(&values, dtype).into_owned()))
            }));
        }
        write_model(
            folder,
            ModelFolder {
                config,
                dtype,
                tensors,
                base: Some(&self.folder),
                model_card: None,
                max_shard_size: MAX_SHARD_SIZE,
            },
        )
    }

    /// What a tensor of the base's folder is called in the trained model's; none if it has no place
    /// there: buffers, and heads of another task.
    fn kept(&self, weights: &Weights, stored: &str) -> Option<String> {
        let (names, output) = (self.architecture.names(), self.architecture.output());
        let buffers: &[&str] = match self.architecture.family {
            Family::Llama => &[],
            Family::Gpt2 => &[".attn.bias", ".attn.masked_bias"],
            Family::Bert => &["embeddings.position_ids"],
        };
        if buffers.iter().any(|buffer| stored.ends_with(buffer)) {
            return None;
        }
        let (module, _) = stored.split_once('.').unwrap_or((stored, ""));
        let bare = weights.contains(&format!("{}.weight", names.tokens));
        let heads = [LM_HEAD, names.classifier, "cls"];
        if module == LM_HEAD && self.architecture.tie_word_embeddings {
            return None;
        }
        if heads.contains(&module) {
            return (module == output).then(|| stored.to_owned());
        }
        Some(if bare {
            names.outer(stored)
        } else {
            stored.to_owned()
        })
    }

    /// Names of the modules that have an adapter.
    pub fn adapter_modules(&self) -> Vec<&str> {
        self.groups()
            .flat_map(|group| &group.members)
            .filter(|member| member.adapter.is_some() || member.scaled.is_some())
            .map(|member| member.name.as_str())
            .collect()
    }
}

/// Stands until the run's own card is written over it.
const ADAPTER_CARD: &str = "---\nlibrary_name: peft\ntags:\n- lora\n- ferrotune\n---\n\n\
A LoRA adapter trained with ferrotune, in PEFT's format.\n";
