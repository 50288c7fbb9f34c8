//! LoRA's linear layer on the CPU: shapes, dropout masks, forward and backward.
//!
//! `y = x·Wᵀ + bias + scaling · dropout(x)·Aᵀ·Bᵀ` (Hu et al., 2021, "LoRA: Low-Rank Adaptation of
//! Large Language Models"), with W frozen, dense or 4-bit, or W itself trained and no adapter.

mod dropout;
mod group;
mod ia3;
mod layout;
mod weight;

pub use dropout::Dropout;
pub use group::{Adapter, Base, Group, Member};
pub use ia3::Scaled;
pub use layout::Tensor;
pub use weight::FrozenWeight;

#[cfg(test)]
mod tests;
