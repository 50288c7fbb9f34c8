//! Products with 4-bit weights on the CPU memory of tensors: addresses and sizes in, the caller allocates.

use pyo3::prelude::*;

use super::memory::at;
use crate::dtype::{DType, QuantType};
use crate::error::{Error, Result};
use crate::product::{Dense, Direction, FourBit, Output, Product, Scales, Term};
use crate::quant::{BLOCKSIZES, Codebook};

/// A 4-bit weight `[n, k]` where it lies.
#[derive(FromPyObject)]
pub struct Weight(
    // packed: address, bytes
    (usize, usize),
    // absmax: address, length; of u8 codes where nested, else of f32
    (usize, usize),
    // nested absmax: address, length (0: not nested); the address of 256 f32; offset; blocksize
    (usize, usize, usize, f32, usize),
    // quant_type, blocksize, the dtype that was quantised
    (String, usize, String),
);

impl Weight {
    /// # Safety
    /// Addresses and sizes are those of contiguous tensors that stay for `'a`.
    unsafe fn get<'a>(&self, elements: usize) -> Result<FourBit<'a>> {
        let (packed, bytes) = self.0;
        let (absmax, blocks) = self.1;
        let (nested, nested_len, code, offset, nested_blocksize) = self.2;
        let (quant_type, blocksize, dtype) = &self.3;
        let fits = BLOCKSIZES.contains(blocksize)
            && 2 * bytes >= elements
            && blocks == elements.div_ceil(*blocksize)
            && (nested_len == 0
                || nested_blocksize.is_power_of_two()
                    && nested_len == blocks.div_ceil(nested_blocksize));
        if !fits {
            return Err(Error::argument(
                "the parts of the 4-bit weight do not fit its shape",
            ));
        }
        // SAFETY: the caller's.
        let scales = unsafe {
            if nested_len == 0 {
                Scales::Plain(at(absmax, blocks))
            } else {
                Scales::Nested {
                    codes: at(absmax, blocks),
                    absmax: at(nested, nested_len),
                    code: at(code, 256),
                    offset,
                    blocksize: nested_blocksize,
                }
            }
        };
        Ok(FourBit {
            // SAFETY: the caller's.
            packed: unsafe { at(packed, bytes) },
            scales,
            values: &Codebook::of(QuantType::from_name(quant_type)?).values,
            blocksize: *blocksize,
            dtype: DType::from_torch_name(dtype)?,
        })
    }
}

/// The LoRA term's product: its dtype, r, the addresses of `[m, r]` and of `[n, r]` (backward `[r, k]`).
type TermAddresses = (String, usize, usize, usize);

/// # Safety
/// As [`at`].
unsafe fn dense<'a>(dtype: &str, address: usize, len: usize) -> Result<Dense<'a>> {
    // SAFETY: the caller's.
    unsafe {
        match DType::from_torch_name(dtype)? {
            DType::F32 => Ok(Dense::F32(at(address, len))),
            DType::BF16 => Ok(Dense::Bf16(at(address, len))),
            DType::F16 => Err(Error::unsupported("no products in float16 here")),
        }
    }
}

/// Whether this CPU and system have what [`cpu_product_at`] runs on.
#[pyfunction]
pub fn cpu_product_available() -> bool {
    crate::product::available()
}

/// Forward: `out` `[m, n]` = `input` `[m, k]` · Wᵀ + term + `bias` (f32 `[n]`, or address 0). Backward: `out` `[m, k]` =
/// `input` `[m, n]` · W + term. Sums are in f32 and rounded once to `dtype`, that of input and out; `accumulate` adds
/// to what `out` holds. False, with `out` unspecified, where a matrix is one that this is not exact for.
#[pyfunction]
pub fn cpu_product_at(
    py: Python<'_>,
    backward: bool,
    sizes: (usize, usize, usize),
    dtype: &str,
    input: usize,
    weight: Weight,
    term: Option<TermAddresses>,
    bias: usize,
    accumulate: bool,
    out: usize,
) -> PyResult<bool> {
    let (m, n, k) = sizes;
    if !crate::product::available() {
        return Err(Error::unsupported("this CPU has no tile unit for products").into());
    }
    let (inner, columns) = if backward { (n, k) } else { (k, n) };
    // SAFETY: `ferrotune.ops.cpu_lora` passes addresses and sizes of contiguous tensors that it holds on to during the
    // call, and a new `out` or one that it adds to.
    unsafe {
        let term = match term {
            None => None,
            Some((dtype, r, left, right)) => Some(Term {
                r,
                left: dense(&dtype, left, m * r)?,
                right: dense(&dtype, right, columns * r)?,
            }),
        };
        let product = Product {
            direction: if backward {
                Direction::Backward
            } else {
                Direction::Forward
            },
            m,
            n,
            k,
            input: dense(dtype, input, m * inner)?,
            weight: weight.get(n * k)?,
            term,
            bias: (bias != 0).then(|| at(bias, columns)),
            accumulate,
        };
        let out = match product.input {
            Dense::F32(_) => Output::F32(out as *mut f32),
            Dense::Bf16(_) => Output::Bf16(out as *mut u16),
        };
        Ok(py.detach(|| product.run(out)))
    }
}
