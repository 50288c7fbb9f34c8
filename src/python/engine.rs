//! Jobs of the engine: settings and results as JSON, events through a callback.

use std::collections::BTreeMap;
use std::path::PathBuf;

use numpy::{PyArray1, PyReadonlyArray2};
use pyo3::prelude::*;
use serde::Serialize;

use super::caller;
use super::frames::{self, Tables};
use super::learner::Maker;
use crate::data::Batch;
use crate::engine::TrainConfig;
use crate::engine::jobs::{self, MakesLearners};
use crate::error::{Error, Result};

pub(super) fn settings(error: serde_json::Error) -> Error {
    Error::argument(format!("settings: {error}"))
}

pub(super) fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(settings)
}

fn from_json<'a, T: serde::Deserialize<'a>>(text: &'a str) -> Result<T> {
    serde_json::from_str(text).map_err(settings)
}

/// `why` says why the engine of the settings was chosen; `learners` makes those of engine torch.
#[pyfunction]
#[pyo3(signature = (config, on_event, frames=None, *, why=None, learners=None))]
pub fn train(
    py: Python<'_>,
    config: &str,
    on_event: Py<PyAny>,
    frames: Option<Tables<'_>>,
    why: Option<&str>,
    learners: Option<Py<PyAny>>,
) -> PyResult<String> {
    let mut config = TrainConfig::from_json(config)?;
    config.frames = frames::import(frames)?;
    let maker = learners.map(Maker);
    let maker = maker.as_ref().map(|maker| maker as &dyn MakesLearners);
    let engine = jobs::Engine { why, maker };
    let outcome = caller::run(py, Some(&on_event), |mut hooks| {
        jobs::train(&config, engine, &mut hooks)
    })?;
    py.check_signals()?;
    if outcome.result.stop_reason == crate::engine::StopReason::Interrupted {
        return Err(Error::Interrupted.into());
    }
    Ok(to_json(&outcome)?)
}

#[pyfunction]
#[pyo3(signature = (config, on_event, frames=None))]
pub fn evaluate(
    py: Python<'_>,
    config: &str,
    on_event: Py<PyAny>,
    frames: Option<Tables<'_>>,
) -> PyResult<String> {
    let mut config: jobs::EvaluateConfig = from_json(config)?;
    config.frames = frames::import(frames)?;
    let result = caller::run(py, Some(&on_event), |mut hooks| {
        jobs::evaluate(&config, &mut hooks)
    })?;
    Ok(to_json(&result)?)
}

#[pyfunction]
#[pyo3(signature = (config, frames=None))]
pub fn split(py: Python<'_>, config: &str, frames: Option<Tables<'_>>) -> PyResult<String> {
    let mut config: crate::data::SplitConfig = from_json(config)?;
    config.data.frames = frames::import(frames)?;
    let result = py.detach(move || crate::data::split_files(&config))?;
    Ok(to_json(&result)?)
}

#[pyfunction]
#[pyo3(signature = (config, frames=None))]
pub fn records(py: Python<'_>, config: &str, frames: Option<Tables<'_>>) -> PyResult<String> {
    let mut config: crate::data::DataConfig = from_json(config)?;
    config.frames = frames::import(frames)?;
    let records = py.detach(move || crate::data::records(&config))?;
    Ok(to_json(&records)?)
}

#[pyfunction]
#[pyo3(signature = (config, frames=None))]
pub fn audit(py: Python<'_>, config: &str, frames: Option<Tables<'_>>) -> PyResult<String> {
    let mut job: jobs::AuditJob = from_json(config)?;
    job.audit.data.frames = frames::import(frames)?;
    let report = caller::run(py, None, |_| jobs::audit(&job))?;
    Ok(to_json(&report)?)
}

#[pyfunction]
#[pyo3(signature = (config, on_text))]
pub fn generate(py: Python<'_>, config: &str, on_text: Option<Py<PyAny>>) -> PyResult<String> {
    let config: jobs::GenerateConfig = from_json(config)?;
    let result = caller::run(py, on_text.as_ref(), |caller| {
        jobs::generate(&config, |piece| {
            caller.poll()?;
            caller.ask(piece.to_owned())
        })
    })?;
    Ok(to_json(&result)?)
}

#[pyfunction]
pub fn merge(py: Python<'_>, config: &str) -> PyResult<String> {
    let config: jobs::MergeConfig = from_json(config)?;
    let result = py.detach(move || jobs::merge(&config))?;
    Ok(to_json(&result)?)
}

/// What the engine computes for one batch: tests and users hold it against another implementation.
///
/// `loss` is the sum over the targets, in nats; `gradients` are those of that sum, by tensor name,
/// flat. Without a method nothing is trained and there are none.
type Computed<'py> = (
    Bound<'py, PyArray1<f32>>,
    f64,
    BTreeMap<String, Bound<'py, PyArray1<f32>>>,
);

#[pyfunction]
#[pyo3(signature = (model, ids, targets, positions, *, adapter=None, full=false, quant_type=None, seed=None))]
pub fn compute<'py>(
    py: Python<'py>,
    model: PathBuf,
    ids: PyReadonlyArray2<'py, u32>,
    targets: PyReadonlyArray2<'py, i32>,
    positions: PyReadonlyArray2<'py, u32>,
    adapter: Option<PathBuf>,
    full: bool,
    quant_type: Option<&str>,
    seed: Option<u64>,
) -> PyResult<Computed<'py>> {
    let shape = ids.as_array().dim();
    if targets.as_array().dim() != shape || positions.as_array().dim() != shape {
        return Err(Error::argument("ids, targets and positions must have one shape").into());
    }
    let batch = Batch {
        rows: shape.0,
        columns: shape.1,
        ids: ids.as_array().iter().copied().collect(),
        targets: targets.as_array().iter().copied().collect(),
        positions: positions.as_array().iter().copied().collect(),
    };
    let (logits, loss, gradients) =
        py.detach(|| jobs::compute(&model, &batch, adapter.as_deref(), full, quant_type, seed))?;
    let gradients = gradients
        .into_iter()
        .map(|(name, values)| (name, PyArray1::from_vec(py, values)))
        .collect();
    Ok((PyArray1::from_vec(py, logits), loss, gradients))
}
