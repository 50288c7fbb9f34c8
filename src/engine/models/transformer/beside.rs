//! Adapters of the methods beside LoRA: first values, what is saved, what is merged.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::Transformer;
use super::builder::copy_saved;
use crate::adapter::{SavedTensor, Tuned, TunedConfig, write_tuned};
use crate::dtype::DType;
use crate::error::Result;
use crate::folder::{Tensor, encode, file_dtype};
use crate::lora::{Group, Member, Scaled};

/// The end of an (IA)³ vector's name.
const VECTOR: &str = ".ia3_l";

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
    /// First values of a trained tensor; false where they are the base's own.
    pub(super) fn fill(&self, name: &str, shape: &[usize], out: &mut [f32]) -> Result<bool> {
        if let Some(saved) = &self.saved {
            let from = saved.get(name).map(|saved| &saved.values);
            return copy_saved(name, shape, from, out).map(|()| true);
        }
        if name.ends_with(VECTOR) {
            out.fill(1.0);
            return Ok(true);
        }
        Ok(false)
    }
}

/// Whether a trained tensor multiplies the base's weights, and is no weight of a module itself.
pub fn is_factor(name: &str) -> bool {
    name.ends_with(VECTOR)
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
        let (tensors, saved) = (self.trained()?.into_iter()).partition(|(name, _)| is_factor(name));
        Ok(Some(Tuned {
            config: config.clone(),
            tensors,
            saved,
        }))
    }

    pub(super) fn write_tuned(
        &self,
        folder: &Path,
        tuned: &Tuned,
        config: Option<&str>,
    ) -> Result<()> {
        let method = tuned.config.method();
        let card = format!(
            "---\nlibrary_name: peft\ntags:\n- {method}\n- ferrotune\n---\n\n\
             An adapter of method {method}, trained with ferrotune.\n"
        );
        write_tuned(folder, tuned, DType::F32, &card, config)
    }
}
