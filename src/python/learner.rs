//! A learner that Python computes: one object, whose methods are those of
//! [`crate::engine::Learner`]. `python/ferrotune/torch_engine/learner.py` is the other side.

use std::borrow::Cow;
use std::path::Path;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use super::engine::{settings, to_json};
use crate::data::Batch;
use crate::engine::jobs::{MakesLearners, Outline};
use crate::engine::models::Transformer;
use crate::engine::{Judged, Judging, Learner, Model, ModelEvent, Moments, Parameter};
use crate::error::{Error, Result};

/// Makes the learner of a run, by `build(outline, weights)`.
pub struct Maker(pub Py<PyAny>);

impl MakesLearners for Maker {
    fn learner<'a>(
        &'a self,
        model: &'a Transformer,
        outline: &Outline,
    ) -> Result<Box<dyn Learner + 'a>> {
        let outline = to_json(outline)?;
        let weights = crate::engine::snapshot(model.parameters())?;
        let object = Python::attach(|py| {
            let weights = arrays(py, &weights);
            self.0.call_method1(py, "build", (outline, weights))
        })?;
        Ok(Box::new(Outer { model, object }))
    }
}

/// A learner outside of Rust; `model` knows the names, and writes the files.
struct Outer<'a> {
    model: &'a Transformer,
    object: Py<PyAny>,
}

fn arrays<'py>(py: Python<'py>, values: &[Vec<f32>]) -> Vec<Bound<'py, PyArray1<f32>>> {
    let values = values.iter();
    values
        .map(|values| PyArray1::from_slice(py, values))
        .collect()
}

/// `[rows, columns]`: ids, targets and positions.
type Tokens<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray2<i64>>,
);

fn tokens<'py>(py: Python<'py>, batch: &Batch) -> PyResult<Tokens<'py>> {
    let shape = [batch.rows, batch.columns];
    let array = |values: Vec<i64>| PyArray1::from_vec(py, values).reshape(shape);
    Ok((
        array(batch.ids.iter().map(|&id| i64::from(id)).collect())?,
        array(batch.targets.iter().map(|&id| i64::from(id)).collect())?,
        array(batch.positions.iter().map(|&at| i64::from(at)).collect())?,
    ))
}

impl Outer<'_> {
    /// Values of the parameters' lengths, out of Python's arrays.
    fn flat(&self, arrays: &[PyReadonlyArray1<'_, f32>]) -> Result<Vec<Vec<f32>>> {
        let copied = arrays.iter().map(|array| {
            let values = array.as_slice().map_err(Error::argument_of)?;
            Ok(values.to_vec())
        });
        let copied = copied.collect::<Result<Vec<Vec<f32>>>>()?;
        let lengths = self.model.parameters().iter().map(|p| p.var.elem_count());
        if !copied.iter().map(Vec::len).eq(lengths) {
            return Err(Error::run("the learner's arrays have other lengths"));
        }
        Ok(copied)
    }
}

impl Judging for Outer<'_> {
    fn judge(&self, batch: &Batch) -> Result<Judged> {
        Python::attach(|py| {
            let (ids, targets, positions) = tokens(py, batch)?;
            let object = self.object.bind(py);
            let found = object.call_method1("judge", (ids, targets, positions))?;
            if self.labels().is_empty() {
                let (loss, rows) = found.extract()?;
                return Ok(Judged::Language { loss, rows });
            }
            let logits: PyReadonlyArray1<'_, f32> = found.extract()?;
            let logits = logits.as_slice().map_err(Error::argument_of)?;
            Ok(Judged::Classes(logits.to_vec()))
        })
    }

    fn labels(&self) -> &[String] {
        self.model.labels()
    }
}

impl Learner for Outer<'_> {
    fn parameters(&self) -> &[Parameter] {
        self.model.parameters()
    }

    fn clear(&mut self) -> Result<()> {
        Python::attach(|py| self.object.call_method0(py, "clear"))?;
        Ok(())
    }

    fn add(&mut self, batch: &Batch, seed: u64) -> Result<(f64, usize)> {
        Python::attach(|py| {
            let (ids, targets, positions) = tokens(py, batch)?;
            let object = self.object.bind(py);
            let found = object.call_method1("add", (ids, targets, positions, seed))?;
            Ok(found.extract()?)
        })
    }

    fn check_complete(&self) -> Result<()> {
        let missing: Option<String> =
            Python::attach(|py| self.object.call_method0(py, "missing")?.extract(py))?;
        missing.map_or(Ok(()), |name| {
            Err(Error::run(format!(
                "{name} gets no gradient: the loss does not depend on it"
            )))
        })
    }

    fn norm(&mut self) -> Result<f64> {
        let found: PyResult<(f64, Option<String>)> =
            Python::attach(|py| self.object.call_method0(py, "norm")?.extract(py));
        match found? {
            (norm, None) => Ok(norm),
            (_, Some(name)) => Err(Error::run(format!("the gradient of {name} is not finite"))),
        }
    }

    fn update(&mut self, step: usize, scale: f64, learning_rate: f64) -> Result<()> {
        let arguments = (step, scale, learning_rate);
        Python::attach(|py| self.object.call_method1(py, "update", arguments))?;
        Ok(())
    }

    fn weights(&self) -> Result<Vec<Vec<f32>>> {
        Python::attach(|py| {
            let found = self.object.bind(py).call_method0("weights")?;
            self.flat(&found.extract::<Vec<_>>()?)
        })
    }

    fn set_weights(&mut self, weights: &[Vec<f32>]) -> Result<()> {
        Python::attach(|py| {
            let weights = arrays(py, weights);
            self.object.call_method1(py, "set_weights", (weights,))
        })?;
        Ok(())
    }

    fn moments(&self) -> Result<Cow<'_, [Moments]>> {
        let (averages, squares) = Python::attach(|py| {
            let found = self.object.bind(py).call_method0("moments")?;
            let (averages, squares): (Vec<_>, Vec<_>) = found.extract()?;
            Ok::<_, Error>((self.flat(&averages)?, self.flat(&squares)?))
        })?;
        let moments = averages.into_iter().zip(squares);
        let moments = moments.map(|(exp_avg, exp_avg_sq)| Moments {
            exp_avg,
            exp_avg_sq,
        });
        Ok(Cow::Owned(moments.collect()))
    }

    fn set_moments(&mut self, moments: Vec<Moments>) -> Result<()> {
        let (averages, squares): (Vec<_>, Vec<_>) = (moments.into_iter())
            .map(|moments| (moments.exp_avg, moments.exp_avg_sq))
            .unzip();
        Python::attach(|py| {
            let moments = (arrays(py, &averages), arrays(py, &squares));
            self.object.call_method1(py, "set_moments", moments)
        })?;
        Ok(())
    }

    fn save(&mut self, folder: &Path, others: Option<&mut [Vec<f32>]>) -> Result<()> {
        let parameters = self.model.parameters();
        match others {
            Some(others) => crate::engine::restore(parameters, others)?,
            None => crate::engine::restore(parameters, &self.weights()?)?,
        }
        self.model.save(folder)
    }

    /// `facts` is a JSON object: `quantized_bytes`, and what it says of the engine.
    fn describe(&self, event: &mut ModelEvent) -> Result<()> {
        let facts: String =
            Python::attach(|py| self.object.call_method0(py, "facts")?.extract(py))?;
        let mut facts: serde_json::Map<_, _> = serde_json::from_str(&facts).map_err(settings)?;
        let bytes = facts.remove("quantized_bytes");
        let bytes = bytes.and_then(|bytes| bytes.as_u64());
        event.quantized_bytes = bytes.unwrap_or_default() as usize;
        if let Some(serde_json::Value::Object(engine)) = event.details.get_mut("engine") {
            engine.extend(facts);
        }
        Ok(())
    }
}
