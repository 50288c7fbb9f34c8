//! A classification head: the row's pooled token, a norm or a pooler, one linear layer, and the
//! summed cross-entropy.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use super::block::{gradient_of, slice_of, to_candle, with_slice};
use super::norm::Norm;
use crate::data::Batch;
use crate::engine::ops::cross_entropy::softmax_cross_entropy;
use crate::error::Result;
use crate::lora::{Dropout, Group};
use crate::scratch::Scratch;

/// Which token of a row speaks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooled {
    First,
    /// The last one that is not padding.
    Last,
}

/// What is trained lies in one flat variable: the pooler's tensors, the classifier's, the norm's.
#[derive(Debug)]
pub struct Classifier {
    /// The model's final norm.
    pub norm: Option<Norm>,
    /// A linear layer and tanh.
    pub pooler: Option<Group>,
    pub output: Group,
    pub pooled: Pooled,
}

/// Activations of `b` rows.
struct Saved {
    /// `[b, k]` before and after the norm.
    x: Scratch,
    normed: Scratch,
    /// `[b, k]` after tanh, and the pooler's H.
    pooled: Option<(Scratch, Scratch)>,
    h: Scratch,
    logits: Scratch,
}

impl Classifier {
    fn parts(&self) -> [Range<usize>; 3] {
        let pooler = self.pooler.as_ref().map_or(0, Group::theta_len);
        let classifier = pooler + self.output.theta_len();
        let norm = classifier + self.norm.as_ref().map_or(0, Norm::theta_len);
        [0..pooler, pooler..classifier, classifier..norm]
    }

    fn dropouts(dropout: Option<Dropout>) -> (Option<Dropout>, Option<Dropout>) {
        (dropout, dropout.map(|d| d.stream(d.stream + 1)))
    }

    /// Logits `[b, labels]` for hidden states `x` `[m, k]`, of which `tokens` speak for the rows.
    fn forward(
        &self,
        x: &[f32],
        tokens: &[usize],
        theta: &[f32],
        dropout: Option<Dropout>,
    ) -> Result<Saved> {
        let k = self.output.k;
        let [pooler, classifier, norm] = self.parts().map(|part| &theta[part]);
        let (drop_pooler, drop_classifier) = Self::dropouts(dropout);
        let mut own = Scratch::dirty(tokens.len() * k);
        for (out, &token) in own.chunks_exact_mut(k).zip(tokens) {
            out.copy_from_slice(&x[token * k..(token + 1) * k]);
        }
        let normed = if let Some(own_norm) = &self.norm {
            own_norm.forward(&own, norm)
        } else {
            let mut same = Scratch::dirty(own.len());
            same.copy_from_slice(&own);
            same
        };
        let pooled = match &self.pooler {
            Some(group) => {
                let (mut y, h) = group.forward(&normed, pooler, drop_pooler)?;
                y.iter_mut().for_each(|value| *value = value.tanh());
                Some((y, h))
            }
            None => None,
        };
        let input = pooled.as_ref().map_or(&normed, |(y, _)| y);
        let (logits, h) = self.output.forward(input, classifier, drop_classifier)?;
        Ok(Saved {
            x: own,
            normed,
            pooled,
            h,
            logits,
        })
    }

    /// The gradient `[b, k]` of the pooled tokens, and that of `theta` written, for `d_logits`.
    fn backward(
        &self,
        theta: &[f32],
        saved: &Saved,
        d_logits: &[f32],
        dropout: Option<Dropout>,
        dtheta: &mut [f32],
    ) -> Result<Scratch> {
        let [pooler, classifier, norm] = self.parts();
        let (drop_pooler, drop_classifier) = Self::dropouts(dropout);
        let mut dx = Scratch::dirty(saved.normed.len());
        let input = saved.pooled.as_ref().map_or(&saved.normed, |(y, _)| y);
        self.output.backward(
            input,
            &theta[classifier.clone()],
            &saved.h,
            d_logits,
            drop_classifier,
            Some(&mut dx),
            &mut dtheta[classifier],
        )?;
        if let (Some(group), Some((y, h))) = (&self.pooler, &saved.pooled) {
            for (dx, &y) in dx.iter_mut().zip(y.iter()) {
                *dx *= 1.0 - y * y;
            }
            let mut d_normed = Scratch::dirty(dx.len());
            group.backward(
                &saved.normed,
                &theta[pooler.clone()],
                h,
                &dx,
                drop_pooler,
                Some(&mut d_normed),
                &mut dtheta[pooler],
            )?;
            dx = d_normed;
        }
        if let Some(own) = &self.norm {
            let dnorm = &mut dtheta[norm.clone()];
            own.backward(&saved.x, &theta[norm], &mut dx, None, dnorm);
        }
        Ok(dx)
    }

    /// The token that speaks for each row, whose first is number `first`.
    pub fn tokens(&self, lengths: &[usize], columns: usize, first: usize) -> Vec<usize> {
        let rows = lengths.iter().enumerate();
        rows.map(|(row, &length)| match self.pooled {
            Pooled::First => row * columns + first,
            Pooled::Last => row * columns + length - 1,
        })
        .collect()
    }

    /// Logits `[b, labels]`.
    pub fn logits(&self, x: &[f32], tokens: &[usize], theta: &[f32]) -> Result<Vec<f32>> {
        Ok(self.forward(x, tokens, theta, None)?.logits.to_vec())
    }
}

/// Each row's number of tokens: its label stands at the last of them, what follows is padding. A row
/// without a label is as long as the batch.
pub fn lengths(batch: &Batch) -> Vec<usize> {
    let rows = batch.targets.chunks_exact(batch.columns.max(1));
    rows.map(|row| {
        let last = row
            .iter()
            .rposition(|&target| target != crate::data::IGNORE);
        last.map_or(batch.columns, |at| at + 1)
    })
    .collect()
}

/// The head and its loss as one operation of x `[m, k]` and the head's flat variable.
pub struct ClassifierOp {
    pub classifier: Arc<Classifier>,
    pub tokens: Vec<usize>,
    pub labels: Vec<i32>,
    pub dropout: Option<Dropout>,
    pub saved: Mutex<Option<(HeadSaved, usize)>>,
}

/// What backward needs of forward: activations and the logits' gradient.
pub struct HeadSaved {
    activations: Saved,
    d_logits: Scratch,
}

impl CustomOp2 for ClassifierOp {
    fn name(&self) -> &'static str {
        "classifier"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        theta: &CpuStorage,
        theta_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, theta) = (slice_of(x, x_layout)?, slice_of(theta, theta_layout)?);
        let activations = self
            .classifier
            .forward(x, &self.tokens, theta, self.dropout)
            .map_err(to_candle)?;
        let mut d_logits = Scratch::dirty(activations.logits.len());
        d_logits.copy_from_slice(&activations.logits);
        let width = self.classifier.output.width();
        let loss = softmax_cross_entropy(&mut d_logits, width, &self.labels);
        let saved = HeadSaved {
            activations,
            d_logits,
        };
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some((saved, x.len()));
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        theta: &Tensor,
        _loss: &Tensor,
        d_loss: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let saved = self
            .saved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((mut saved, len)) = saved else {
            return Err(candle_core::Error::Msg(
                "backward of a head that kept no activations".into(),
            ));
        };
        let scale = d_loss.to_scalar::<f32>()?;
        saved.d_logits.iter_mut().for_each(|value| *value *= scale);
        let mut dtheta = vec![0.0f32; theta.elem_count()];
        let own = with_slice(theta, |theta| {
            let (activations, d_logits) = (&saved.activations, &saved.d_logits);
            self.classifier
                .backward(theta, activations, d_logits, self.dropout, &mut dtheta)
                .map_err(to_candle)
        })?;
        let mut dx = vec![0.0f32; len];
        let k = self.classifier.output.k;
        for (from, &token) in own.chunks_exact(k).zip(&self.tokens) {
            dx[token * k..(token + 1) * k].copy_from_slice(from);
        }
        let dtheta = gradient_of(theta, dtheta)?;
        let dx = x
            .track_op()
            .then(|| Tensor::from_vec(dx, x.shape(), x.device()))
            .transpose()?;
        Ok((dx, dtheta))
    }
}
