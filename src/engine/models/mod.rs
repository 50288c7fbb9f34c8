//! Models of the engine, one folder an architecture.

pub mod llama;
