//! A model that tests can reason about.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{D, Device, Tensor, Var};
use ferrotune::data::{Batch, IGNORE};
use ferrotune::engine::{Judged, Judging, Mode, Model, Parameter, Segment};
use ferrotune::error::{Error, Result};

use crate::support::{Random, VOCABULARY};

const HIDDEN: usize = 32;

/// What a model does wrong at one training call (from 1).
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    None,
    Loss(usize),
    Gradient(usize),
    Detached,
}

/// logits = dropout(embedding[id]) · weightᵀ + bias; `base` is a frozen shift of the logits.
pub struct Tiny {
    pub parameters: Vec<Parameter>,
    pub dropout: f64,
    pub base: f32,
    pub fault: Fault,
    pub pause: std::time::Duration,
    /// What saving takes: the trainer then saves seldom.
    pub save_pause: std::time::Duration,
    pub calls: AtomicUsize,
}

fn segment(name: &str, offset: usize, shape: &[usize], decay: bool) -> Segment {
    Segment {
        name: name.to_owned(),
        offset,
        shape: shape.to_vec(),
        decay,
    }
}

impl Tiny {
    pub fn new() -> Self {
        let mut random = Random(7);
        let mut flat = |count| {
            let values = random.values(count, 0.3);
            Var::from_vec(values, count, &Device::Cpu).unwrap()
        };
        let weight = VOCABULARY * HIDDEN;
        let parameters = vec![
            Parameter {
                name: "embed".to_owned(),
                var: flat(weight),
                segments: vec![segment("embed.weight", 0, &[VOCABULARY, HIDDEN], true)],
            },
            Parameter {
                name: "head".to_owned(),
                var: flat(weight + VOCABULARY),
                segments: vec![
                    segment("head.weight", 0, &[VOCABULARY, HIDDEN], true),
                    segment("head.bias", weight, &[VOCABULARY], false),
                ],
            },
        ];
        Self {
            parameters,
            dropout: 0.0,
            base: 0.0,
            fault: Fault::None,
            pause: std::time::Duration::ZERO,
            save_pause: std::time::Duration::ZERO,
            calls: AtomicUsize::new(0),
        }
    }

    pub fn with_dropout(dropout: f64) -> Self {
        Self {
            dropout,
            ..Self::new()
        }
    }

    pub fn values(&self) -> Vec<f32> {
        let parts = self.parameters.iter();
        parts
            .flat_map(|p| p.var.to_vec1::<f32>().unwrap())
            .collect()
    }

    pub fn bits(&self) -> Vec<u32> {
        self.values().iter().map(|v| v.to_bits()).collect()
    }

    fn logits(&self, ids: &[u32], mode: Mode) -> candle_core::Result<Tensor> {
        let [embed, head] = &self.parameters[..] else {
            unreachable!()
        };
        let weight = VOCABULARY * HIDDEN;
        let table = embed.var.reshape((VOCABULARY, HIDDEN))?;
        let mut hidden = table.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
        if let (Mode::Train { seed }, true) = (mode, self.dropout > 0.0) {
            let mut random = Random(seed);
            let keep = 1.0 / (1.0 - self.dropout as f32);
            let draw = |_| {
                if f64::from(random.uniform() + 1.0) / 2.0 < self.dropout {
                    0.0
                } else {
                    keep
                }
            };
            let mask: Vec<f32> = (0..ids.len() * HIDDEN).map(draw).collect();
            hidden = hidden.mul(&Tensor::from_vec(mask, (ids.len(), HIDDEN), &Device::Cpu)?)?;
        }
        let matrix = head
            .var
            .narrow(0, 0, weight)?
            .reshape((VOCABULARY, HIDDEN))?;
        let frozen: Vec<f32> = (0..VOCABULARY).map(|i| self.base * i as f32).collect();
        let bias = head.var.narrow(0, weight, VOCABULARY)?;
        hidden
            .matmul(&matrix.t()?)?
            .broadcast_add(&bias)?
            .broadcast_add(&Tensor::new(frozen, &Device::Cpu)?)
    }
}

impl Judging for Tiny {
    fn judge(&self, batch: &Batch) -> Result<Judged> {
        let (loss, count) = self.loss(batch, Mode::Eval)?;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        Ok(Judged::Language {
            loss,
            rows: vec![(loss, count)],
        })
    }
}

impl Model for Tiny {
    fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    fn loss(&self, batch: &Batch, mode: Mode) -> Result<(Tensor, usize)> {
        std::thread::sleep(self.pause);
        let trained: Vec<usize> = (0..batch.targets.len())
            .filter(|&i| batch.targets[i] != IGNORE)
            .collect();
        let ids: Vec<u32> = trained.iter().map(|&i| batch.ids[i]).collect();
        let targets: Vec<u32> = trained.iter().map(|&i| batch.targets[i] as u32).collect();
        let logits = self.logits(&ids, mode)?;
        let shift = logits.max_keepdim(D::Minus1)?.detach();
        let logits = logits.broadcast_sub(&shift)?;
        let normaliser = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let index = Tensor::new(targets, &Device::Cpu)?.unsqueeze(1)?;
        let mut loss = (normaliser - logits.gather(&index, 1)?)?.sum_all()?;
        if matches!(mode, Mode::Train { .. }) {
            let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
            if self.fault == Fault::Loss(call) {
                loss = (loss * f64::NAN)?;
            }
            if self.fault == Fault::Gradient(call) {
                // The root's value is 0, its slope infinite.
                let sum = self.parameters[1].var.sum_all()?;
                loss = (loss + (&sum - sum.detach())?.sqrt()?)?;
            }
            if self.fault == Fault::Detached {
                loss = self.parameters[0].var.sqr()?.sum_all()?;
            }
        }
        Ok((loss, trained.len()))
    }

    fn save(&self, folder: &Path) -> Result<()> {
        std::thread::sleep(self.save_pause);
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join("weights");
        let bytes: Vec<u8> = self.values().iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(&path, bytes).map_err(Error::io(&path))
    }
}
