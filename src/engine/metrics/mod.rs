//! How good a model is, in numbers with intervals.

mod bootstrap;
mod classification;
mod generation;

pub use bootstrap::{Interval, RESAMPLES, ratio_interval};
pub use classification::{
    ClassMetrics, ClassificationMetrics, ClassificationSummary, Predictions, classification,
};
pub use generation::{GenerationMetrics, generation};
