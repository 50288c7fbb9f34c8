//! Tables of rows, and the language model's head: the final norm, the output layer and its loss.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Shape, Tensor};

use super::block::{gradient_of, slice_of, to_candle, with_slice};
use super::norm::Norm;
use crate::engine::ops::cross_entropy::{Gradients, linear_cross_entropy};
use crate::error::Result;
use crate::lora::FrozenWeight;
use crate::matmul::{Into, Mat, MatMut, Threads, matmul};
use crate::scratch::Scratch;

/// A `[vocabulary, k]` table: frozen, or trained as a flat variable of its own.
#[derive(Debug)]
pub enum Table {
    Frozen(FrozenWeight),
    /// Index of the parameter.
    Trained(usize),
}

/// Rows `ids` of a frozen table, as f32 `[m, k]`.
pub fn gather(weight: &FrozenWeight, k: usize, ids: &[u32]) -> Result<Vec<f32>> {
    let mut out = vec![0.0f32; ids.len() * k];
    let rows = out
        .chunks_exact_mut(k)
        .zip(ids.iter().map(|&id| id as usize * k));
    match weight {
        FrozenWeight::F32(values) => {
            rows.for_each(|(out, at)| out.copy_from_slice(&values[at..at + k]));
        }
        FrozenWeight::F16(values) => rows.for_each(|(out, at)| {
            for (out, value) in out.iter_mut().zip(&values[at..at + k]) {
                *out = value.to_f32();
            }
        }),
        FrozenWeight::BF16(values) => rows.for_each(|(out, at)| {
            for (out, value) in out.iter_mut().zip(&values[at..at + k]) {
                *out = value.to_f32();
            }
        }),
        FrozenWeight::FourBit(_) => {
            return Err(crate::error::Error::unsupported(
                "a 4-bit embedding is not supported; quantise linear layers only",
            ));
        }
    }
    Ok(out)
}

/// Looks up rows of a trained table `[vocabulary · k]`.
pub struct Lookup {
    pub ids: Arc<Vec<u32>>,
    pub k: usize,
}

impl CustomOp1 for Lookup {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(
        &self,
        table: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let table = slice_of(table, layout)?;
        let mut out = Vec::with_capacity(self.ids.len() * self.k);
        for &id in self.ids.iter() {
            let at = id as usize * self.k;
            out.extend_from_slice(&table[at..at + self.k]);
        }
        Ok((CpuStorage::F32(out), (self.ids.len(), self.k).into()))
    }

    fn bwd(
        &self,
        table: &Tensor,
        _rows: &Tensor,
        d_rows: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let mut d_table = vec![0.0f32; table.elem_count()];
        with_slice(d_rows, |d_rows| {
            for (from, &id) in d_rows.chunks_exact(self.k).zip(self.ids.iter()) {
                let at = id as usize * self.k;
                for (out, value) in d_table[at..at + self.k].iter_mut().zip(from) {
                    *out += value;
                }
            }
            Ok(())
        })?;
        Ok(Some(Tensor::from_vec(
            d_table,
            table.shape(),
            table.device(),
        )?))
    }
}

/// The final norm, the output layer and the summed cross-entropy, as one operation of
/// x `[m, k]`, the output layer's flat variable and the norm's.
///
/// The gradients are computed in the forward pass, where the logits are, and scaled in backward.
pub struct LanguageHead {
    pub norm: Arc<Norm>,
    /// The frozen output layer, unless trained.
    pub frozen: Option<Arc<Table>>,
    pub targets: Vec<i32>,
    pub train: bool,
    pub saved: Mutex<Option<HeadSaved>>,
}

pub struct HeadSaved {
    /// Of the normed hidden states, `[m, k]`.
    d_normed: Scratch,
    d_weight: Option<Vec<f32>>,
}

impl LanguageHead {
    fn run(&self, x: &[f32], weight: &[f32], norm: &[f32]) -> Result<f64> {
        let k = self.norm.k;
        let normed = self.norm.forward(x, norm);
        let wide = widened(self.frozen.as_deref())?;
        let trained = wide.is_none();
        let weight = wide.as_deref().unwrap_or(weight);
        if !self.train {
            return Ok(linear_cross_entropy(
                &normed,
                weight,
                k,
                &self.targets,
                None,
                |_, _| {},
            ));
        }
        let mut d_normed = Scratch::dirty(x.len());
        let mut d_weight = trained.then(|| vec![0.0f32; weight.len()]);
        let gradients = Gradients {
            dx: &mut d_normed,
            dweight: d_weight.as_deref_mut(),
        };
        let targets = &self.targets;
        let loss = linear_cross_entropy(&normed, weight, k, targets, Some(gradients), |_, _| {});
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(HeadSaved { d_normed, d_weight });
        Ok(loss)
    }
}

/// A frozen table in f32; none if it is trained.
pub fn widened(table: Option<&Table>) -> Result<Option<Scratch>> {
    match table {
        Some(Table::Frozen(weight)) => {
            let mut wide = Scratch::dirty(weight.len());
            weight.widen_into(&mut wide)?;
            Ok(Some(wide))
        }
        _ => Ok(None),
    }
}

/// Each row's summed loss and number of targets, and the sum of all, for hidden states that were
/// normed `[m, k]` in rows of `columns` tokens.
pub fn row_losses(
    normed: &[f32],
    weight: &[f32],
    k: usize,
    targets: &[i32],
    columns: usize,
) -> (f64, Vec<(f64, usize)>) {
    let mut rows = vec![(0.0, 0); targets.len() / columns.max(1)];
    let total = linear_cross_entropy(normed, weight, k, targets, None, |token, loss| {
        let (sum, count) = &mut rows[token / columns];
        *sum += f64::from(loss);
        *count += 1;
    });
    (total, rows)
}

/// Logits `[m, vocabulary]` of hidden states that were normed, `[m, k]`.
pub fn logits(normed: &[f32], weight: &[f32], k: usize) -> Vec<f32> {
    let (m, vocabulary) = (normed.len() / k, weight.len() / k);
    let mut out = vec![0.0f32; m * vocabulary];
    matmul(
        MatMut::new(&mut out, m, vocabulary),
        Into::Overwrite,
        1.0,
        Mat::new(normed, m, k),
        Mat::new(weight, vocabulary, k).t(),
        Threads::All,
    );
    out
}

impl CustomOp3 for LanguageHead {
    fn name(&self) -> &'static str {
        "head"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        norm: &CpuStorage,
        norm_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let loss = self
            .run(
                slice_of(x, x_layout)?,
                slice_of(weight, weight_layout)?,
                slice_of(norm, norm_layout)?,
            )
            .map_err(to_candle)?;
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        norm: &Tensor,
        _loss: &Tensor,
        d_loss: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let saved = self
            .saved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(mut saved) = saved else {
            return Err(candle_core::Error::Msg(
                "backward of a head that kept no gradients".into(),
            ));
        };
        let scale = d_loss.to_scalar::<f32>()?;
        if scale != 1.0 {
            saved.d_normed.iter_mut().for_each(|value| *value *= scale);
            if let Some(d_weight) = &mut saved.d_weight {
                for value in d_weight.iter_mut() {
                    *value *= scale;
                }
            }
        }
        let mut d_norm = vec![0.0f32; norm.elem_count()];
        with_slice(x, |x| {
            with_slice(norm, |norm| {
                let out = &mut d_norm[..self.norm.theta_len()];
                self.norm.backward(x, norm, &mut saved.d_normed, None, out);
                Ok(())
            })
        })?;
        let device = x.device();
        let dx = Tensor::from_vec(saved.d_normed.to_vec(), x.shape(), device)?;
        let d_weight = saved
            .d_weight
            .map(|values| Tensor::from_vec(values, weight.shape(), device))
            .transpose()?;
        Ok((Some(dx), d_weight, gradient_of(norm, d_norm)?))
    }
}
