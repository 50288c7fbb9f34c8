//! Jobs of the engine: settings and results as JSON, events through a callback.

use std::time::{Duration, Instant};

use pyo3::prelude::*;
use serde::Serialize;

use crate::engine::jobs;
use crate::engine::{Control, Event, Hooks, TrainConfig};
use crate::error::{Error, Result};

/// Seconds between two looks for signals.
const POLL: Duration = Duration::from_millis(100);

/// Hands events to a Python callable, and looks for signals (Ctrl-C) in between.
struct PythonHooks {
    on_event: Py<PyAny>,
    polled: Instant,
}

impl PythonHooks {
    fn new(on_event: Py<PyAny>) -> Self {
        Self {
            on_event,
            polled: Instant::now(),
        }
    }
}

/// A Python signal handler's exception: Ctrl-C stops in order, anything else at once.
fn interrupted(py: Python<'_>, error: PyErr) -> Error {
    if error.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>(py) {
        Error::Interrupted
    } else {
        Error::Python(error)
    }
}

impl Hooks for PythonHooks {
    fn on_event(&mut self, event: &Event) -> Result<Control> {
        let line = serde_json::to_string(event)?;
        Python::attach(|py| {
            let answer = self
                .on_event
                .call1(py, (line,))
                .map_err(|error| interrupted(py, error))?;
            py.check_signals().map_err(|error| interrupted(py, error))?;
            Ok(if answer.is_truthy(py)? {
                Control::Continue
            } else {
                Control::Stop
            })
        })
    }

    fn poll(&mut self) -> Result<Control> {
        if self.polled.elapsed() < POLL {
            return Ok(Control::Continue);
        }
        self.polled = Instant::now();
        Python::attach(|py| {
            py.check_signals().map_err(|error| interrupted(py, error))?;
            Ok(Control::Continue)
        })
    }
}

fn to_json<T: Serialize>(value: &T) -> Result<String> {
    Ok(serde_json::to_string(value)?)
}

fn from_json<'a, T: serde::Deserialize<'a>>(text: &'a str) -> Result<T> {
    Ok(serde_json::from_str(text)?)
}

#[pyfunction]
pub fn train(py: Python<'_>, config: &str, on_event: Py<PyAny>) -> PyResult<String> {
    let config = TrainConfig::from_json(config)?;
    let outcome = py.detach(move || jobs::train(&config, &mut PythonHooks::new(on_event)))?;
    py.check_signals()?;
    if outcome.result.stop_reason == crate::engine::StopReason::Interrupted {
        return Err(Error::Interrupted.into());
    }
    Ok(to_json(&outcome)?)
}

#[pyfunction]
pub fn evaluate(py: Python<'_>, config: &str, on_event: Py<PyAny>) -> PyResult<String> {
    let config: jobs::EvaluateConfig = from_json(config)?;
    let result = py.detach(move || jobs::evaluate(&config, &mut PythonHooks::new(on_event)))?;
    Ok(to_json(&result)?)
}

#[pyfunction]
#[pyo3(signature = (config, on_text))]
pub fn generate(py: Python<'_>, config: &str, on_text: Option<Py<PyAny>>) -> PyResult<String> {
    let config: jobs::GenerateConfig = from_json(config)?;
    let result = py.detach(move || {
        jobs::generate(&config, |piece| {
            Python::attach(|py| {
                py.check_signals()?;
                match &on_text {
                    Some(on_text) => Ok(on_text.call1(py, (piece,))?.is_truthy(py)?),
                    None => Ok(true),
                }
            })
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
