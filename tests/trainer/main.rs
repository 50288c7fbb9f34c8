//! The trainer on a small model of its own: embedding, dropout, linear.

#![allow(
    clippy::unreadable_literal,
    clippy::needless_pass_by_value,
    clippy::struct_field_names
)]
#![recursion_limit = "256"] // one json! of every setting

mod accumulation;
mod adamw;
mod failures;
mod model;
mod resume;
mod runs;
mod settings;
mod support;
