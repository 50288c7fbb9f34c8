//! Matrix products with 4-bit weights on the processor's tile unit (AMX), f32 and bf16.
//!
//! The weight is dequantised panel by panel, straight into tiles that stay in a core's cache, and never lies in memory
//! whole. Of f32 operands every value is the exact sum of three bf16 ([`parts`]); the six largest of the nine products
//! of parts are summed in f32, which leaves out less than 2⁻²⁴ of a product. The unit takes subnormal bf16 for zeros,
//! so that f32 below 2⁻¹¹⁰ lose their last bits: [`Product::run`] refuses f32 matrices whose largest magnitude is not
//! within [2⁻⁶⁰, 2⁶⁰], or not finite.

mod amx;
mod blocks;
mod output;
mod parts;
mod tiles;
mod weight;

#[cfg(test)]
mod tests;

pub use {
    amx::available,
    blocks::{Direction, Product, Term},
    output::Output,
    tiles::Dense,
    weight::{FourBit, Scales},
};
