//! One batch through a model: logits, loss and gradients.

use std::collections::BTreeMap;
use std::path::Path;

use super::{plan, quantize};
use crate::data::Batch;
use crate::engine::models::{Architecture, Trained, Transformer};
use crate::engine::{Mode, Model};
use crate::error::{Error, Result};

/// Flat gradients by the name of the trained tensor.
type Gradients = BTreeMap<String, Vec<f32>>;

/// Logits `[rows · columns · vocabulary]` (`[rows · labels]` of a classification model, whose batch
/// has each row's label at its last token), the summed loss in nats, and the loss's gradients by the
/// name of the trained tensor: an adapter's, or with `full` every weight's.
///
/// `seed` turns the adapter's dropout on; without it the forward is that of evaluation.
///
/// # Errors
/// `Argument` and `Format` for bad input.
pub fn compute(
    folder: &Path,
    batch: &Batch,
    adapter: Option<&Path>,
    full: bool,
    quant_type: Option<&str>,
    seed: Option<u64>,
) -> Result<(Vec<f32>, f64, Gradients)> {
    if full && adapter.is_some() {
        return Err(Error::argument(
            "full trains the model itself: give no adapter",
        ));
    }
    let architecture = Architecture::read(folder)?;
    let positions = architecture.max_position_embeddings;
    let how = quantize(quant_type, 64, true)?;
    let mut ready = plan(architecture, adapter, how, positions)?;
    if full {
        ready.plan.trained = Trained::everything();
    }
    if let (Some(lora), None) = (&mut ready.plan.trained.lora, seed) {
        lora.config.lora_dropout = 0.0;
    }
    let model = Transformer::load(folder, ready.architecture, &ready.plan)?;
    let logits = model.logits(batch)?;
    let seed = seed.unwrap_or_default();
    let mut gradients = BTreeMap::new();
    if model.parameters().is_empty() {
        let (loss, _) = model.loss(batch, Mode::Eval)?;
        return Ok((logits, f64::from(loss.to_scalar::<f32>()?), gradients));
    }
    let (loss, _) = model.loss(batch, Mode::Train { seed })?;
    let mut store = loss.backward()?;
    for parameter in model.parameters() {
        let gradient = store
            .remove(parameter.var.as_tensor())
            .ok_or_else(|| Error::run(format!("{} received no gradient", parameter.name)))?;
        let values = gradient.to_vec1::<f32>()?;
        for segment in &parameter.segments {
            let part = &values[segment.offset..segment.offset + segment.len()];
            gradients.insert(segment.name.clone(), part.to_vec());
        }
    }
    Ok((logits, f64::from(loss.to_scalar::<f32>()?), gradients))
}
