//! Gradients of a step, summed over its micro-batches.

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use rayon::prelude::*;

use super::Parameter;
use crate::error::{Error, Result};

/// Elements a rayon task takes. Fixed, so that no sum depends on the number of threads.
pub(super) const CHUNK: usize = 1 << 14;

/// One buffer for each parameter, kept from step to step.
pub struct Gradients {
    names: Vec<String>,
    sums: Vec<Vec<f32>>,
    /// Whether a sum holds something of this step.
    filled: Vec<bool>,
}

impl Gradients {
    pub fn new(parameters: &[Parameter]) -> Self {
        Self {
            names: parameters.iter().map(|p| p.name.clone()).collect(),
            sums: parameters
                .iter()
                .map(|p| vec![0.0; p.var.elem_count()])
                .collect(),
            filled: vec![false; parameters.len()],
        }
    }

    pub fn clear(&mut self) {
        self.filled.fill(false);
    }

    /// Adds what a backward pass left for the parameters, and takes it out of `store`.
    pub fn add(&mut self, parameters: &[Parameter], store: &mut GradStore) -> Result<()> {
        let slots = self.sums.iter_mut().zip(&mut self.filled);
        for (parameter, (sum, filled)) in parameters.iter().zip(slots) {
            let Some(gradient) = store.remove(parameter.var.as_tensor()) else {
                continue;
            };
            add_tensor(sum, *filled, &gradient)?;
            *filled = true;
        }
        Ok(())
    }

    /// # Errors
    /// `Run` naming the first parameter that got no gradient in this step.
    pub fn check_complete(&self) -> Result<()> {
        match self.filled.iter().position(|filled| !filled) {
            None => Ok(()),
            Some(index) => Err(Error::run(format!(
                "{} gets no gradient: the loss does not depend on it",
                self.names[index]
            ))),
        }
    }

    /// L2 norm over all parameters, in f64.
    ///
    /// # Errors
    /// `Run` naming the first parameter whose gradient is not finite.
    pub fn norm(&self) -> Result<f64> {
        let mut total = 0.0;
        for (name, sum) in self.names.iter().zip(&self.sums) {
            let squares = sum_of_squares(sum);
            if !squares.is_finite() {
                return Err(Error::run(format!("the gradient of {name} is not finite")));
            }
            total += squares;
        }
        Ok(total.sqrt())
    }

    /// The sums, in the parameters' order.
    pub fn sums(&self) -> &[Vec<f32>] {
        &self.sums
    }
}

fn add_tensor(sum: &mut [f32], filled: bool, gradient: &Tensor) -> Result<()> {
    let gradient = gradient.flatten_all()?.contiguous()?;
    let (storage, layout) = gradient.storage_and_layout();
    let values = match (&*storage, layout.contiguous_offsets()) {
        (candle_core::Storage::Cpu(candle_core::CpuStorage::F32(values)), Some((start, end)))
            if end - start == sum.len() =>
        {
            &values[start..end]
        }
        _ => {
            return Err(Error::run(
                "a gradient is not f32 of its parameter's length",
            ));
        }
    };
    let chunks = sum.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    if filled {
        chunks.for_each(|(sum, values)| {
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += value;
            }
        });
    } else {
        chunks.for_each(|(sum, values)| sum.copy_from_slice(values));
    }
    Ok(())
}

/// Squares of f32 cannot overflow f64: the sum is finite if and only if every value is.
fn sum_of_squares(values: &[f32]) -> f64 {
    let partial: Vec<f64> = values
        .par_chunks(CHUNK)
        .map(|chunk| {
            // Eight independent sums keep the vector units busy; their order is fixed.
            let mut lanes = [0.0f64; 8];
            let (eights, rest) = chunk.as_chunks::<8>();
            for eight in eights {
                for (lane, &value) in lanes.iter_mut().zip(eight) {
                    *lane += f64::from(value) * f64::from(value);
                }
            }
            let rest: f64 = rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            lanes.iter().sum::<f64>() + rest
        })
        .collect();
    partial.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_exact_to_f64_and_blind_to_threads() {
        let whole = |i: i64| i * 37 % 1001 - 500;
        let values: Vec<f32> = (0..100_003).map(|i| whole(i) as f32 / 1024.0).collect();
        let expected = (0..100_003).map(|i| whole(i).pow(2)).sum::<i64>() as f64;
        let found = sum_of_squares(&values);
        assert_eq!(found, expected / f64::from(1 << 20));
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            assert_eq!(
                pool.install(|| sum_of_squares(&values)).to_bits(),
                found.to_bits()
            );
        }
        assert!(sum_of_squares(&[f32::MAX; 64]).is_finite());
        assert!(!sum_of_squares(&[1.0, f32::INFINITY]).is_finite());
    }
}
