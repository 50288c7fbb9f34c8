//! `AdamW` (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2), with torch's arithmetic.

use std::ops::Range;

use rayon::prelude::*;

use super::gradients::CHUNK;
use super::{Parameter, TrainConfig, weights};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl From<&TrainConfig> for AdamWSettings {
    fn from(config: &TrainConfig) -> Self {
        Self {
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: config.weight_decay,
        }
    }
}

/// Running averages of one parameter's gradient and its square.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
}

pub struct AdamW {
    settings: AdamWSettings,
    moments: Vec<Moments>,
    /// For each parameter, consecutive ranges that cover it, each with or without weight decay.
    pieces: Vec<Vec<(Range<usize>, bool)>>,
}

impl AdamW {
    /// Moments of zero for `parameters`. Elements outside of every segment do not decay.
    pub fn new(settings: AdamWSettings, parameters: &[Parameter]) -> Result<Self> {
        weights::check(parameters)?;
        let moments = parameters.iter().map(|parameter| {
            let zeros = vec![0.0; parameter.var.elem_count()];
            Moments {
                exp_avg: zeros.clone(),
                exp_avg_sq: zeros,
            }
        });
        Ok(Self {
            settings,
            moments: moments.collect(),
            pieces: parameters.iter().map(pieces).collect(),
        })
    }

    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// `moments` must have the shapes of [`Self::moments`].
    pub fn set_moments(&mut self, moments: Vec<Moments>) {
        debug_assert_eq!(moments.len(), self.moments.len());
        self.moments = moments;
    }

    /// Step number `step` (from 1) with the gradient `scale · gradients`, in one pass over each parameter.
    ///
    /// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← (1−ηλ)θ − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
    pub fn step(
        &mut self,
        parameters: &[Parameter],
        gradients: &[Vec<f32>],
        scale: f64,
        learning_rate: f64,
        step: usize,
    ) -> Result<()> {
        let rule = Rule::new(&self.settings, scale, learning_rate, step);
        let states = self.moments.iter_mut().zip(&self.pieces);
        for ((parameter, gradient), (moments, pieces)) in
            parameters.iter().zip(gradients).zip(states)
        {
            weights::update(&parameter.var, |values| {
                cut(values, moments, gradient, pieces)
                    .into_par_iter()
                    .for_each(|piece| rule.apply(piece));
            })?;
        }
        Ok(())
    }
}

/// The factor that brings a gradient of `norm` down to `max_norm` (0: any), as `torch.nn.utils.clip_grad_norm_` has it.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm == 0.0 {
        return 1.0;
    }
    (max_norm / (norm + 1e-6)).min(1.0)
}

fn pieces(parameter: &Parameter) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut extend = |range: Range<usize>, decay: bool| match runs.last_mut() {
        Some((last, same)) if *same == decay => last.end = range.end,
        _ if range.is_empty() => {}
        _ => runs.push((range, decay)),
    };
    let mut end = 0;
    for segment in &parameter.segments {
        extend(end..segment.offset, false);
        end = segment.offset + segment.len();
        extend(segment.offset..end, segment.decay);
    }
    extend(end..parameter.var.elem_count(), false);
    runs.into_iter()
        .flat_map(|(range, decay)| {
            let last = range.end;
            range
                .step_by(CHUNK)
                .map(move |start| (start..last.min(start + CHUNK), decay))
        })
        .collect()
}

struct Piece<'a> {
    values: &'a mut [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
    gradient: &'a [f32],
    decay: bool,
}

fn cut<'a>(
    mut values: &'a mut [f32],
    moments: &'a mut Moments,
    mut gradient: &'a [f32],
    pieces: &[(Range<usize>, bool)],
) -> Vec<Piece<'a>> {
    let mut exp_avg = moments.exp_avg.as_mut_slice();
    let mut exp_avg_sq = moments.exp_avg_sq.as_mut_slice();
    let mut cuts = Vec::with_capacity(pieces.len());
    for (range, decay) in pieces {
        let length = range.len();
        let piece = Piece {
            values: values.split_off_mut(..length).unwrap_or_default(),
            exp_avg: exp_avg.split_off_mut(..length).unwrap_or_default(),
            exp_avg_sq: exp_avg_sq.split_off_mut(..length).unwrap_or_default(),
            gradient: gradient.split_off(..length).unwrap_or_default(),
            decay: *decay,
        };
        cuts.push(piece);
    }
    cuts
}

/// A step's scalars: computed in f64, used in f32, as torch does.
struct Rule {
    scale: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_correction2: f32,
    eps: f32,
}

impl Rule {
    fn new(settings: &AdamWSettings, scale: f64, learning_rate: f64, step: usize) -> Self {
        let correction1 = 1.0 - settings.beta1.powf(step as f64);
        let correction2 = 1.0 - settings.beta2.powf(step as f64);
        Self {
            scale: scale as f32,
            keep: (1.0 - learning_rate * settings.weight_decay) as f32,
            one_minus_beta1: (1.0 - settings.beta1) as f32,
            beta2: settings.beta2 as f32,
            one_minus_beta2: (1.0 - settings.beta2) as f32,
            step_size: (learning_rate / correction1) as f32,
            root_correction2: correction2.sqrt() as f32,
            eps: settings.eps as f32,
        }
    }

    fn apply(&self, piece: Piece) {
        let keep = if piece.decay { self.keep } else { 1.0 };
        let moments = piece.exp_avg.iter_mut().zip(piece.exp_avg_sq);
        let values = piece.values.iter_mut().zip(piece.gradient);
        for ((value, gradient), (m, v)) in values.zip(moments) {
            let gradient = gradient * self.scale;
            *m += (gradient - *m) * self.one_minus_beta1;
            *v = *v * self.beta2 + gradient * gradient * self.one_minus_beta2;
            let denominator = v.sqrt() / self.root_correction2 + self.eps;
            *value = *value * keep - self.step_size * (*m / denominator);
        }
    }
}
