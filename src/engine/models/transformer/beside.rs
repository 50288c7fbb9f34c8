//! Adapters of the methods beside LoRA: first values, what is saved, what is merged.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::Transformer;
use super::builder::copy_saved;
use super::init::normal;
use crate::adapter::{INFIX, PROMPT_EMBEDDINGS, SavedTensor, Tuned, TunedConfig, write_tuned};
use crate::dtype::DType;
use crate::engine::models::architecture::Architecture;
use crate::error::{Error, Result};
use crate::folder::{Tensor, encode, file_dtype};
use crate::lora::{Group, Member, Scaled};

/// The end of an (IA)³ vector's name.
const VECTOR: &str = ".ia3_l";

/// The end of the name of a layer's prefix, `[num_virtual_tokens, 2 · hkv · d]`: keys, then values.
pub const PREFIX: &str = ".prefix";
/// transformers' `initializer_range`. PEFT draws prefixes with deviation 1, which drowns a text.
const PREFIX_DEVIATION: f32 = 0.02;
/// Houlsby et al., section 3.6: near the identity.
const BOTTLENECK_DEVIATION: f32 = 0.01;

/// An adapter of a method beside LoRA.
#[derive(Debug, Clone)]
pub struct Beside {
    pub config: Box<TunedConfig>,
    /// Modules with an (IA)³ vector.
    pub scaled: BTreeMap<String, Scaled>,
    /// Tensors of a saved adapter by name, those of whole modules among them.
    pub saved: Option<BTreeMap<String, SavedTensor>>,
}

impl Beside {
    pub fn new(config: TunedConfig) -> Self {
        Self {
            config: Box::new(config),
            scaled: BTreeMap::new(),
            saved: None,
        }
    }

    /// # Errors
    /// `Argument` where no weights can do what the adapter of `folder` does.
    pub fn mergeable(&self, folder: &Path) -> Result<()> {
        match &*self.config {
            TunedConfig::Ia3(_) => Ok(()),
            TunedConfig::Bottleneck(_) => Err(Error::argument(format!(
                "{}: bottleneck adapters cannot be merged, the base model has no layers like \
                 theirs; give the adapter to generate and eval",
                folder.display()
            ))),
            TunedConfig::Virtual(_) => Err(Error::argument(format!(
                "{}: an adapter of method {} cannot be merged, its virtual tokens are input and no \
                 weights; give it as the adapter to generate and eval",
                folder.display(),
                self.config.method()
            ))),
        }
    }

    /// First values of a trained tensor; false where they are the base's own.
    pub(super) fn fill(
        &self,
        seed: u64,
        name: &str,
        shape: &[usize],
        out: &mut [f32],
    ) -> Result<bool> {
        if let Some(saved) = &self.saved {
            let from = saved.get(name).map(|saved| &saved.values);
            return copy_saved(name, shape, from, out).map(|()| true);
        }
        if name.ends_with(VECTOR) {
            out.fill(1.0);
        } else if name == PROMPT_EMBEDDINGS {
            normal(seed, name, 1.0, out);
        } else if name.ends_with(PREFIX) {
            normal(seed, name, PREFIX_DEVIATION, out);
        } else if name.contains(INFIX) && name.ends_with(".weight") {
            normal(seed, name, BOTTLENECK_DEVIATION, out);
        } else if name.contains(INFIX) {
            out.fill(0.0);
        } else {
            return Ok(false);
        }
        Ok(true)
    }
}

/// Whether a trained tensor multiplies the base's weights, and is no weight of a module itself.
pub fn is_factor(name: &str) -> bool {
    name.ends_with(VECTOR)
}

/// Whether a trained tensor is a method's own, and no weight of a module of the base.
fn is_own(name: &str) -> bool {
    is_factor(name) || name == PROMPT_EMBEDDINGS || name.ends_with(PREFIX) || name.contains(INFIX)
}

/// The name of a layer's prefix.
pub fn prefix_name(model: &Architecture, layer: usize) -> String {
    let names = model.names();
    format!("{}.{}{PREFIX}", names.layer(layer), names.attention)
}

/// PEFT's one tensor of a prefix `[count, layers · width]` as one `[count, width]` a layer.
pub fn split_prefix(whole: &SavedTensor, model: &Architecture) -> BTreeMap<String, SavedTensor> {
    let (count, layers) = (whole.shape[0], model.num_hidden_layers);
    let width = whole.shape[1] / layers;
    let part = |layer: usize| {
        let rows = whole.values.chunks_exact(layers * width);
        let values = rows.flat_map(|row| &row[layer * width..(layer + 1) * width]);
        SavedTensor {
            shape: vec![count, width],
            values: values.copied().collect(),
        }
    };
    (0..layers)
        .map(|layer| (prefix_name(model, layer), part(layer)))
        .collect()
}

/// The inverse of [`split_prefix`].
fn join_prefix(tensors: &BTreeMap<String, SavedTensor>, model: &Architecture) -> SavedTensor {
    let layers = 0..model.num_hidden_layers;
    let parts: Vec<&SavedTensor> = layers.map(|at| &tensors[&prefix_name(model, at)]).collect();
    let (count, width) = (parts[0].shape[0], parts[0].shape[1]);
    let row = |number: usize| {
        let parts = parts.iter();
        parts.flat_map(move |part| &part.values[number * width..(number + 1) * width])
    };
    SavedTensor {
        shape: vec![count, width * parts.len()],
        values: (0..count).flat_map(row).copied().collect(),
    }
}

/// A member's (IA)³ vector and what it multiplies.
pub fn scale_of<'a>(
    member: &Member,
    factors: &'a BTreeMap<String, SavedTensor>,
) -> Option<(Scaled, &'a [f32])> {
    let scaled = member.scaled?;
    let vector = factors.get(&format!("{}{VECTOR}", member.name))?;
    Some((scaled, vector.values.as_slice()))
}

/// The bias of a member whose output is multiplied, as a merged model has it.
pub fn scaled_bias<'a>(
    group: &'a Group,
    at: usize,
    scale: Option<(Scaled, &'a [f32])>,
    dtype: DType,
) -> Option<Tensor<'a>> {
    let (Scaled::Output, l) = scale? else {
        return None;
    };
    let bias = group.frozen_bias(at)?;
    let name = format!("{}.bias", group.members[at].name);
    Some(Tensor::lazy(
        name,
        file_dtype(dtype),
        &[bias.len()],
        move || {
            let merged: Vec<f32> = bias.iter().zip(l).map(|(bias, l)| bias * l).collect();
            Ok(Cow::Owned(encode(&merged, dtype).into_owned()))
        },
    ))
}

impl Transformer {
    /// The adapter of a method beside LoRA as it is now; none if the model has none.
    pub(super) fn tuned(&self) -> Result<Option<Tuned>> {
        let Some(config) = &self.beside else {
            return Ok(None);
        };
        let (mut tensors, saved): (BTreeMap<_, _>, _) =
            (self.trained()?.into_iter()).partition(|(name, _)| is_own(name));
        if matches!(config, TunedConfig::Virtual(config) if config.is_prefix()) {
            let joined = join_prefix(&tensors, &self.architecture);
            tensors = BTreeMap::from([(PROMPT_EMBEDDINGS.to_owned(), joined)]);
        }
        Ok(Some(Tuned {
            config: config.clone(),
            tensors,
            saved,
        }))
    }
}

/// Writes an adapter folder; `config` names a classifier's labels.
pub fn write_adapter(folder: &Path, tuned: &Tuned, config: Option<&str>) -> Result<()> {
    let method = tuned.config.method();
    let library = match tuned.config {
        TunedConfig::Bottleneck(_) => "ferrotune",
        _ => "peft",
    };
    let card = format!(
        "---\nlibrary_name: {library}\ntags:\n- {method}\n- ferrotune\n---\n\n\
         An adapter of method {method}, trained with ferrotune.\n"
    );
    write_tuned(folder, tuned, DType::F32, &card, config)
}
