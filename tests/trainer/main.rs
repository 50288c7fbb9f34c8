//! The trainer on a small model of its own: embedding, dropout, linear.

#![allow(
    clippy::needless_pass_by_value,
    clippy::struct_field_names,
    clippy::unwrap_used
)]
#![cfg(feature = "engine")]
#![recursion_limit = "256"] // one json! of every setting

mod accumulation;
mod adamw;
mod failures;
mod model;
mod resume;
mod runs;
mod settings;
mod support;
