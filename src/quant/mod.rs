//! Blockwise 4-bit quantisation in bitsandbytes' formats.
//!
//! A tensor is flattened row-major and cut into blocks of `blocksize` elements, which may straddle rows. A block keeps
//! its `absmax` (the largest magnitude, f32) and one 4-bit code an element: the nearest of the sixteen values of
//! [`Codebook`] to `element / absmax`. Element 2i is the high nibble of byte i, element 2i + 1 the low one.
//! Double quantisation stores the absmax as bytes in turn (see [`Absmax::Nested`]).
//!
//! Codes, absmax and dequantised values are bit-equal to those of bitsandbytes' CPU backend, version 0.50, on x86-64,
//! except where that backend is at fault:
//! - with AVX-512 it scales a block that straddles two rows by the wrong absmax when the last dimension is a multiple
//!   of 16 but not of `blocksize`; here every element gets its own block's absmax, as in bitsandbytes' reference code;
//! - with AVX-512-BF16 it flushes subnormal bfloat16 results to zero; here they are rounded like any other value.

mod blockwise;
mod checkpoint;
mod codebook;
mod dequantize;
mod element;
mod kernels;
mod mean;
mod nested;
mod state;
#[cfg(test)]
mod tests;

pub use blockwise::quantize_4bit;
pub use checkpoint::{NamedTensor, TensorBytes, from_tensors, to_tensors};
pub use codebook::{Codebook, dynamic_map};
pub use dequantize::{dequantize_4bit, dequantize_4bit_range};
pub use element::Element;
pub use mean::torch_mean;
pub use state::{Absmax, BLOCKSIZES, NESTED_BLOCKSIZE, QuantState, Quantized4bit};
