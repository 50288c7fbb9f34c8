//! Tables of other libraries through Arrow's PyCapsule interface: their buffers are shared, not copied.

use std::collections::HashMap;

use arrow_array::RecordBatchReader;
use arrow_array::ffi_stream::{FFI_ArrowArrayStream, RecordBatchStreamReader};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::data::{Frame, Frames};
use crate::error::{Error, Result};

/// Objects with `__arrow_c_stream__`, by the name that stands for each among the data.
pub type Tables<'py> = HashMap<String, Bound<'py, PyAny>>;

/// Takes the tables over.
///
/// # Errors
/// `Argument` for what is no such object, and what its producer raises.
pub fn import(tables: Option<Tables<'_>>) -> Result<Frames> {
    let tables = tables.unwrap_or_default();
    tables
        .into_iter()
        .map(|(name, table)| Ok((name.clone().into(), frame(&name, &table)?)))
        .collect()
}

fn frame(name: &str, table: &Bound<'_, PyAny>) -> Result<Frame> {
    let capsule = table.call_method0("__arrow_c_stream__")?;
    let capsule = capsule.cast::<PyCapsule>().map_err(PyErr::from)?;
    let pointer = capsule.pointer_checked(Some(c"arrow_array_stream"))?;
    let fail = |error: &dyn std::fmt::Display| Error::argument(format!("{name}: {error}"));
    // SAFETY: a capsule of this name holds an Arrow stream by the PyCapsule interface, and is alive
    // during the call; the stream is moved out of it, which marks it as released.
    let stream = unsafe {
        RecordBatchStreamReader::from_raw(pointer.as_ptr().cast::<FFI_ArrowArrayStream>())
    };
    let stream = stream.map_err(|error| fail(&error))?;
    let schema = stream.schema();
    let batches: std::result::Result<Vec<_>, _> = stream.collect();
    Ok(Frame {
        schema,
        batches: batches.map_err(|error| fail(&error))?.into(),
    })
}
