//! The trainer on a small model of its own: embedding, dropout, linear.

#![recursion_limit = "256"] // one json! of every setting

mod adamw;
mod failures;
mod model;
mod resume;
mod runs;
mod settings;
mod support;
