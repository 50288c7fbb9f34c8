//! Data, hooks and settings that tests can reason about.

use std::path::Path;

use ferrotune::data::{Batch, BatchSource, IGNORE};
use ferrotune::engine::{Control, Event, Hooks, TrainConfig, TrainResult, train};
use ferrotune::error::{Error, Result};
use serde_json::{Value, json};

pub use crate::model::{Fault, Tiny};

pub const VOCABULARY: usize = 24;
pub const COLUMNS: usize = 12;

/// `SplitMix64`.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In [-1, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.uniform() * scale).collect()
    }
}

/// Rows in micro-batches; `shuffle` gives each epoch its order.
#[derive(Clone)]
pub struct Rows {
    pub rows: Vec<(Vec<u32>, Vec<i32>)>,
    pub batch_size: usize,
    pub shuffle: bool,
}

impl Rows {
    /// Tokens follow `3·id + shift` most of the time; rows differ in how many targets they have.
    pub fn new(count: usize, batch_size: usize, shift: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let rows = (0..count).map(|row| {
            let mut id = random.below(VOCABULARY);
            let ids: Vec<usize> = (0..=COLUMNS)
                .map(|_| {
                    let noise = if random.below(8) == 0 {
                        random.below(VOCABULARY)
                    } else {
                        0
                    };
                    id = (3 * id + shift + noise) % VOCABULARY;
                    id
                })
                .collect();
            let trained = 2 + (row * 5) % (COLUMNS - 1);
            let target = |i: usize| {
                if i < trained {
                    ids[i + 1] as i32
                } else {
                    IGNORE
                }
            };
            (
                ids[..COLUMNS].iter().map(|&id| id as u32).collect(),
                (0..COLUMNS).map(target).collect(),
            )
        });
        Self {
            rows: rows.collect(),
            batch_size,
            shuffle: true,
        }
    }
}

impl BatchSource for Rows {
    fn batches_per_epoch(&self) -> usize {
        self.rows.len().div_ceil(self.batch_size)
    }

    fn batch(&self, epoch: usize, index: usize) -> Result<Batch> {
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        if self.shuffle {
            let mut random = Random(epoch as u64 + 1000);
            for end in (1..order.len()).rev() {
                order.swap(end, random.below(end + 1));
            }
        }
        let start = index * self.batch_size;
        let rows = &order[start..order.len().min(start + self.batch_size)];
        Ok(Batch {
            rows: rows.len(),
            columns: COLUMNS,
            ids: rows
                .iter()
                .flat_map(|&row| self.rows[row].0.clone())
                .collect(),
            targets: rows
                .iter()
                .flat_map(|&row| self.rows[row].1.clone())
                .collect(),
            positions: rows.iter().flat_map(|_| 0..COLUMNS as u32).collect(),
        })
    }

    fn fingerprint(&self) -> String {
        let mut digest = Random(self.batch_size as u64);
        for (ids, targets) in &self.rows {
            for value in ids
                .iter()
                .map(|&id| id as i32)
                .chain(targets.iter().copied())
            {
                digest.0 = digest.next() ^ value as u64;
            }
        }
        format!("{:016x}", digest.next())
    }
}

/// Keeps every event; answers as told.
#[derive(Default)]
pub struct Listener {
    pub events: Vec<Value>,
    pub stop_after_step: Option<usize>,
    /// Fails, as a kill would, at this step's event.
    pub die_at_step: Option<usize>,
    /// Interrupts at this poll (from 1).
    pub interrupt_at_poll: Option<usize>,
    pub polls: usize,
}

impl Listener {
    pub fn named(&self, name: &str) -> Vec<&Value> {
        self.events
            .iter()
            .filter(|event| event["event"] == name)
            .collect()
    }
}

impl Hooks for Listener {
    fn on_event(&mut self, event: &Event) -> Result<Control> {
        let value = serde_json::to_value(event).unwrap();
        let step = value["step"].as_u64().map(|step| step as usize);
        let is_step = value["event"] == "step";
        self.events.push(value);
        if is_step && self.die_at_step.is_some() && step == self.die_at_step {
            return Err(Error::run("killed"));
        }
        if is_step && self.stop_after_step.is_some() && step == self.stop_after_step {
            return Ok(Control::Stop);
        }
        Ok(Control::Continue)
    }

    fn poll(&mut self) -> Result<Control> {
        self.polls += 1;
        if self.interrupt_at_poll == Some(self.polls) {
            return Err(Error::Interrupted);
        }
        Ok(Control::Continue)
    }
}

/// Settings for a small run into `output`, with `changes` on top.
pub fn settings(output: &Path, changes: Value) -> Value {
    let mut settings = json!({
        "model": "model", "data": ["text.txt"], "output": output, "method": "lora",
        "engine": "embedded", "task": "auto", "trained_layers": 0,
        "r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "use_rslora": false,
        "target_modules": "all-linear", "feedforward_modules": null, "num_virtual_tokens": 20, "prompt_tuning_init": "sample_vocab", "adapter_variant": "pfeiffer", "reduction_factor": 16, "rank_pattern": {}, "alpha_pattern": {},
        "quant_type": "nf4", "blocksize": 64, "double_quant": true,
        "epochs": 3.0, "max_steps": null, "max_seconds": null, "batch_size": 4,
        "gradient_accumulation": 2, "sequence_length": COLUMNS, "packing": true,
        "learning_rate": 0.05, "warmup_steps": 3, "schedule": "cosine",
        "min_learning_rate_ratio": 0.1, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.99,
        "eps": 1e-8, "max_grad_norm": 1.0, "seed": 11, "heldout": 0.1, "heldout_data": [],
        "test": 0.0, "test_data": [], "forgetting": [], "bias_column": null, "bias_terms": [],
        "group": null, "text_column": null, "prompt_column": null, "completion_column": null,
        "audit": "off", "sort_by_length": false, "split_seed": null, "shots": null, "stratify": false, "near_duplicates": 0.0, "messages_column": null, "label_column": null,
        "eval_every": 4, "eval_tokens": 100, "patience": null, "checkpoint_every": 5,
        "resume": false, "threads": null,
    });
    for (name, value) in changes.as_object().unwrap() {
        settings[name] = value.clone();
    }
    settings
}

pub fn config(output: &Path, changes: Value) -> TrainConfig {
    TrainConfig::from_json(&settings(output, changes).to_string()).unwrap()
}

pub fn training_rows() -> Rows {
    Rows::new(53, 4, 1, 3)
}

pub fn heldout_rows() -> Rows {
    Rows {
        shuffle: false,
        ..Rows::new(16, 4, 1, 4)
    }
}

/// Trains on the usual rows and returns what the run left.
pub fn run(config: &TrainConfig, model: &Tiny, hooks: &mut Listener) -> Result<TrainResult> {
    train(config, model, &training_rows(), &heldout_rows(), hooks)
}

/// The lines of metrics.jsonl without what depends on the clock.
pub fn metrics(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        let entries = value.as_object_mut().unwrap();
        for name in ["tokens_per_second", "elapsed_seconds", "remaining_seconds"] {
            assert_eq!(entries.remove(name).is_some(), entries["event"] == "step");
        }
        value
    });
    lines.collect()
}
