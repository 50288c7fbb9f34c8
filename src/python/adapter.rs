//! Adapter folders and target matching for Python: numpy arrays by module, configurations as JSON text.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use numpy::ndarray::{Array2, ArrayView2};
use numpy::{IntoPyArray, PyArray2, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use serde_json::{Map, Value};

use crate::adapter::{self, Adapter, AdapterConfig, LoraPair, Modules};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// module → (lora_A [r, k], lora_B [n, r])
type Arrays<'py> = BTreeMap<String, (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<f32>>)>;
/// module → (r, lora_alpha, scaling)
type Targets = Vec<(String, (usize, f64, f64))>;

fn parse_config(config: &str) -> Result<(AdapterConfig, Vec<String>)> {
    let map: Map<String, Value> = serde_json::from_str(config)
        .map_err(|error| Error::argument(format!("config is not a JSON object: {error}")))?;
    let (config, warnings) = AdapterConfig::from_json(&map)?;
    without_saved_modules(&config)?;
    Ok((config, warnings))
}

/// Python's modules hold adapters alone: a head that was saved beside one would be lost.
fn without_saved_modules(config: &AdapterConfig) -> Result<()> {
    if config.modules_to_save.is_empty() {
        return Ok(());
    }
    Err(Error::argument(format!(
        "modules_to_save={:?} is not supported here; only null is",
        config.modules_to_save
    )))
}

fn array(
    py: Python<'_>,
    rows: usize,
    columns: usize,
    values: Vec<f32>,
) -> Result<Bound<'_, PyArray2<f32>>> {
    Array2::from_shape_vec((rows, columns), values)
        .map(|array| array.into_pyarray(py))
        .map_err(|error| Error::run(error.to_string()))
}

fn values(array: &ArrayView2<f32>) -> Vec<f32> {
    array.iter().copied().collect()
}

/// (configuration as JSON, arrays by module, warnings) of an adapter folder.
#[pyfunction]
pub fn read_adapter(py: Python<'_>, folder: PathBuf) -> Result<(String, Arrays<'_>, Vec<String>)> {
    let (adapter, warnings) = py.detach(|| adapter::read(&folder))?;
    without_saved_modules(&adapter.config)?;
    let text = adapter.config.to_text();
    let arrays = adapter
        .modules
        .into_iter()
        .map(|(module, pair)| {
            let a = array(py, pair.r, pair.in_features, pair.lora_a)?;
            let b = array(py, pair.out_features, pair.r, pair.lora_b)?;
            Ok((module, (a, b)))
        })
        .collect::<Result<_>>()?;
    Ok((text, arrays, warnings))
}

/// Writes an adapter folder from the configuration's JSON and arrays by module; returns warnings.
#[pyfunction]
#[pyo3(signature = (folder, config, modules, *, dtype = "float32", model_card = ""))]
pub fn write_adapter(
    py: Python<'_>,
    folder: PathBuf,
    config: &str,
    modules: BTreeMap<String, (PyReadonlyArray2<f32>, PyReadonlyArray2<f32>)>,
    dtype: &str,
    model_card: &str,
) -> Result<Vec<String>> {
    let (config, warnings) = parse_config(config)?;
    let dtype = DType::from_torch_name(dtype)?;
    let pairs = modules.into_iter().map(|(module, (a, b))| {
        let pair = LoraPair {
            r: a.shape()[0],
            in_features: a.shape()[1],
            out_features: b.shape()[0],
            lora_a: values(&a.as_array()),
            lora_b: values(&b.as_array()),
        };
        (module, pair)
    });
    let adapter = Adapter {
        config,
        modules: pairs.collect(),
        saved: BTreeMap::new(),
    };
    py.detach(|| adapter::write(&folder, &adapter, dtype, model_card, None))?;
    Ok(warnings)
}

/// The linear modules that a configuration chooses, with (r, lora_alpha, scaling) each, and warnings.
#[pyfunction]
#[pyo3(signature = (config, linear, *, other = Vec::new(), output = None))]
pub fn match_targets(
    config: &str,
    linear: Vec<String>,
    other: Vec<String>,
    output: Option<&str>,
) -> Result<(Targets, Vec<String>)> {
    let (config, mut warnings) = parse_config(config)?;
    let modules = Modules {
        linear: &linear,
        other: &other,
        output,
    };
    let selection = adapter::select(&config, modules)?;
    warnings.extend(selection.warnings);
    let targets = selection.targets.into_iter();
    let targets =
        targets.map(|target| (target.module, (target.r, target.lora_alpha, target.scaling)));
    Ok((targets.collect(), warnings))
}
