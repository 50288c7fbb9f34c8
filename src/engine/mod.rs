//! The torch-free fine-tuning engine, on candle and the CPU.

mod best;
mod checkpoint;
mod config;
mod evaluate;
mod events;
pub mod generate;
mod gradients;
pub mod jobs;
mod learner;
mod methods;
pub mod metrics;
mod model;
pub mod models;
pub mod ops;
mod optimizer;
mod plan;
mod progress;
mod run_folder;
mod schedule;
mod state;
mod trainer;
mod validate;
mod weights;

pub use config::{
    EngineKind, Method, PromptInit, ScheduleKind, TargetModules, TaskChoice, TrainConfig,
};
pub use evaluate::{Evaluation, Measures, evaluate};
pub use events::{
    Control, DataEvent, EvalEvent, Event, Hooks, ModelEvent, Skip, StepEvent, StopReason,
    TrainResult,
};
pub use gradients::Gradients;
pub use learner::{Learner, Local};
pub use model::{Judged, Judging, Mode, Model, Parameter, Segment};
pub use optimizer::{AdamW, AdamWSettings, Moments, clip_factor};
pub use run_folder::RunFolder;
pub use schedule::Schedule;
pub use trainer::{train, train_in};
pub use weights::{restore, snapshot};
