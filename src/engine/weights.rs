//! The values of flat parameters, read and changed in place.

use std::cell::Cell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Var};

use super::Parameter;
use crate::error::{Error, Result};

/// Calls `read` on the values of `var`.
pub fn read<T>(var: &Var, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let (storage, layout) = var.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => {
            Ok(read(&values[start..end]))
        }
        _ => Err(unfit()),
    }
}

/// Lets `change` write the values of `var`, without a new tensor.
///
/// No tensor that shares the storage may be held by a caller up the stack as a guard.
pub fn update(var: &Var, change: impl FnOnce(&mut [f32])) -> Result<()> {
    Ok(var.inplace_op1(&Change(Cell::new(Some(change))))?)
}

struct Change<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Change<F> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.take()) {
            (CpuStorage::F32(values), Some((start, end)), Some(change)) => {
                change(&mut values[start..end]);
                Ok(())
            }
            _ => Err(candle_core::Error::Msg(unfit().to_string())),
        }
    }
}

fn unfit() -> Error {
    Error::run("a trainable parameter is not a contiguous f32 tensor on the CPU")
}

/// A copy of every parameter's values.
pub fn snapshot(parameters: &[Parameter]) -> Result<Vec<Vec<f32>>> {
    parameters
        .iter()
        .map(|parameter| read(&parameter.var, <[f32]>::to_vec))
        .collect()
}

/// Overwrites `copy` with every parameter's values.
pub fn snapshot_into(parameters: &[Parameter], copy: &mut [Vec<f32>]) -> Result<()> {
    for (parameter, copy) in parameters.iter().zip(copy) {
        read(&parameter.var, |values| copy.copy_from_slice(values))?;
    }
    Ok(())
}

/// Overwrites every parameter with a copy made by [`snapshot`].
pub fn restore(parameters: &[Parameter], copy: &[Vec<f32>]) -> Result<()> {
    for (parameter, copy) in parameters.iter().zip(copy) {
        update(&parameter.var, |values| values.copy_from_slice(copy))?;
    }
    Ok(())
}

/// Exchanges the parameters' values with a copy's.
pub fn swap(parameters: &[Parameter], copy: &mut [Vec<f32>]) -> Result<()> {
    for (parameter, copy) in parameters.iter().zip(copy) {
        update(&parameter.var, |values| values.swap_with_slice(copy))?;
    }
    Ok(())
}

/// # Errors
/// `Run` if a parameter is not what [`Parameter`] says: flat, f32, on the CPU, its segments inside and in order.
pub fn check(parameters: &[Parameter]) -> Result<()> {
    if parameters.is_empty() {
        return Err(Error::run("the model has no trainable parameter"));
    }
    for parameter in parameters {
        let elements = read(&parameter.var, <[f32]>::len)?;
        let mut end = 0;
        for segment in &parameter.segments {
            if segment.offset < end || segment.offset + segment.len() > elements {
                return Err(Error::run(format!(
                    "parameter {}: segment {} lies at {} to {}, which overlaps its neighbour or the end at {elements}",
                    parameter.name,
                    segment.name,
                    segment.offset,
                    segment.offset + segment.len(),
                )));
            }
            end = segment.offset + segment.len();
        }
    }
    Ok(())
}
