//! Matrix products with 4-bit weights, f32 and bf16: on the processor's tile unit (AMX), or in vectors ([`vectors`]).
//!
//! In tiles the weight is dequantised panel by panel, straight into tiles that stay in a core's cache, and never lies in
//! memory whole. Of f32 operands every value is the exact sum of three bf16 ([`parts`]); the six largest of the nine
//! products of parts are summed in f32, which leaves out less than 2⁻²⁴ of a product. The unit takes subnormal bf16 for
//! zeros, so that f32 below 2⁻¹¹⁰ lose their last bits: [`Product::run`] refuses f32 matrices whose largest magnitude is
//! not within [2⁻⁶⁰, 2⁶⁰], or not finite. What a LoRA term adds beside its product ([`Adapter`]) is summed in vectors there, too.

mod adapter;
mod amx;
mod blocks;
mod decode;
mod micro;
mod outer;
mod output;
mod panels;
mod parts;
mod tiles;
mod vectors;
mod weight;

#[cfg(test)]
mod tests;

pub use {
    adapter::Adapter,
    blocks::{Direction, Product, Term},
    outer::Outer,
    output::Output,
    tiles::Dense,
    weight::{FourBit, Scales},
};

/// What products run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// AMX, with AVX-512.
    Tiles,
    /// AVX-512.
    Wide,
    /// AVX2.
    Vectors,
}

impl Unit {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tiles => "tiles",
            Self::Wide => "wide",
            Self::Vectors => "vectors",
        }
    }

    /// The units of this CPU and system, the fastest first.
    pub fn available() -> impl Iterator<Item = Self> {
        [
            (Self::Tiles, amx::available() && vectors::wide_available()),
            (Self::Wide, vectors::wide_available()),
            (Self::Vectors, vectors::available()),
        ]
        .into_iter()
        .filter_map(|(unit, available)| available.then_some(unit))
    }
}
