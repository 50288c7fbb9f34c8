//! Prepared rows as numpy arrays, and their order in an epoch.

use std::path::PathBuf;

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::Deserialize;

use super::caller;
use super::engine::to_json;
use super::frames::{self, Tables};
use crate::data::audit::AuditMode;
use crate::data::{self, DataConfig, Rows, Tokenizer};
use crate::engine::jobs::with_threads;
use crate::error::{Error, Result};

#[derive(Deserialize)]
struct RowsConfig {
    #[serde(flatten)]
    data: DataConfig,
    /// The folder with tokenizer.json.
    tokenizer: PathBuf,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
    audit: AuditMode,
    threads: Option<usize>,
}

/// The sides' arrays, the second `None` where nothing is held out, and a report as JSON.
type Prepared<'py> = (Bound<'py, PyDict>, Option<Bound<'py, PyDict>>, String);

#[pyfunction]
#[pyo3(signature = (config, frames=None))]
pub fn prepare_rows<'py>(
    py: Python<'py>,
    config: &str,
    frames: Option<Tables<'py>>,
) -> PyResult<Prepared<'py>> {
    let mut config: RowsConfig = serde_json::from_str(config)
        .map_err(|error| Error::argument(format!("settings: {error}")))?;
    config.data.frames = frames::import(frames)?;
    config.data.audit = config.audit;
    let (train, heldout, report) = caller::run(py, None, |_| {
        with_threads(config.threads, || {
            let (bos, eos) = (config.bos_token_id, config.eos_token_id);
            let tokenizer = Tokenizer::from_folder(&config.tokenizer, bos, eos, None)?;
            data::prepare_rows(&config.data, &tokenizer)
        })
    })?;
    Ok((
        arrays(py, train)?,
        heldout.map(|rows| arrays(py, rows)).transpose()?,
        to_json(&report)?,
    ))
}

fn arrays(py: Python<'_>, rows: Rows) -> Result<Bound<'_, PyDict>> {
    let arrays = PyDict::new(py);
    arrays.set_item("ids", rows.ids.into_pyarray(py))?;
    arrays.set_item("labels", rows.labels.into_pyarray(py))?;
    arrays.set_item("positions", rows.positions.into_pyarray(py))?;
    arrays.set_item("offsets", rows.offsets.into_pyarray(py))?;
    Ok(arrays)
}

#[pyfunction]
pub fn epoch_order<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, u32>,
    batch_size: usize,
    seed: u64,
    epoch: u64,
    by_length: bool,
) -> Result<Bound<'py, PyArray1<u32>>> {
    let lengths = lengths
        .as_slice()
        .map_err(|_| Error::argument("lengths must be contiguous"))?;
    let order = data::epoch_order(lengths, batch_size, seed, epoch, by_length);
    Ok(order.into_pyarray(py))
}
