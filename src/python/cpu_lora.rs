//! Products with 4-bit weights on the CPU memory of tensors: addresses and sizes in, the caller allocates.

use pyo3::prelude::*;

use super::memory::at;
use crate::dtype::{DType, QuantType};
use crate::error::{Error, Result};
use crate::product::{
    Adapter, Dense, Direction, FourBit, Outer, Output, Product, Scales, Term, Unit,
};
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

/// What [`cpu_product_at`] can run on here, the fastest first: "tiles" (AMX), "wide" (AVX-512) and "vectors" (AVX2).
#[pyfunction]
pub fn cpu_product_units() -> Vec<&'static str> {
    Unit::available().map(Unit::name).collect()
}

/// Forward: `out` `[m, n]` = `input` `[m, k]` · Wᵀ + term + `bias` (f32 `[n]`, or address 0). Backward: `out` `[m, k]` =
/// `input` `[m, n]` · W + term. Sums are in f32 and rounded once to `dtype`, that of input and out; `accumulate` adds
/// to what `out` holds. False, with `out` unspecified, where a matrix is one that this is not exact for.
#[pyfunction]
pub fn cpu_product_at(
    py: Python<'_>,
    unit: &str,
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
    let unit = find_unit(unit)?;
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
            direction: direction(backward),
            m,
            n,
            k,
            input: dense(dtype, input, m * inner)?,
            weight: weight.get(n * k)?,
            term,
            bias: (bias != 0).then(|| at(bias, columns)),
            accumulate,
        };
        let out = output(&product, out);
        Ok(py.detach(|| product.run(unit, out)))
    }
}

fn find_unit(name: &str) -> Result<Unit> {
    Unit::available()
        .find(|unit| unit.name() == name)
        .ok_or_else(|| Error::unsupported(format!("this CPU has no {name} for products")))
}

const fn direction(backward: bool) -> Direction {
    if backward {
        Direction::Backward
    } else {
        Direction::Forward
    }
}

const fn output(product: &Product<'_>, address: usize) -> Output {
    match product.input {
        Dense::F32(_) => Output::F32(address as *mut f32),
        Dense::Bf16(_) => Output::Bf16(address as *mut u16),
    }
}

/// An adapter in f32: r, the addresses of `[m, r]`, of the term's `[n, r]` (backward `[r, k]`) and of what makes its other
/// side, forward A, backward B; the scaling.
type AdapterAddresses = (usize, usize, usize, usize, f32);

/// A sum over rows, `leftᵀ·right`: the addresses of `left`, f32 `[m, r]`, and of `right` `[m, columns]`; the columns; the
/// address of f32 `[r, columns]`, or `[columns, r]` if the last is true.
type OuterAddresses = (usize, usize, usize, usize, bool);

/// As [`cpu_product_at`], where the term's `[m, r]` is written, not read: `scaling · input · by`, forward `byᵀ`. `outer` are
/// computed beside it, of matrices in `dtype`. At address 0 there is no `out`. Where it returns false, `out` alone is
/// unspecified.
#[pyfunction]
pub fn cpu_lora_at(
    py: Python<'_>,
    unit: &str,
    backward: bool,
    sizes: (usize, usize, usize),
    dtype: &str,
    input: usize,
    weight: Weight,
    adapter: AdapterAddresses,
    outer: Vec<OuterAddresses>,
    bias: usize,
    accumulate: bool,
    out: usize,
) -> PyResult<bool> {
    let (m, n, k) = sizes;
    let unit = find_unit(unit)?;
    let (inner, columns) = if backward { (n, k) } else { (k, n) };
    let (r, narrow, right, by, scaling) = adapter;
    // SAFETY: as in `cpu_product_at`; what is written is new.
    unsafe {
        let product = Product {
            direction: direction(backward),
            m,
            n,
            k,
            input: dense(dtype, input, m * inner)?,
            weight: weight.get(n * k)?,
            term: Some(Term {
                r,
                left: Dense::F32(&[]), // made
                right: Dense::F32(at(right, columns * r)),
            }),
            bias: (bias != 0).then(|| at(bias, columns)),
            accumulate,
        };
        let outer = outer
            .into_iter()
            .map(|(left, right, columns, out, across)| {
                Ok(Outer {
                    left: left as *const f32,
                    right: dense(dtype, right, m * columns)?,
                    columns,
                    out: out as *mut f32,
                    across,
                })
            });
        let adapter = Adapter {
            by: at(by, inner * r),
            scaling,
            narrow: narrow as *mut f32,
            outer: outer.collect::<Result<_>>()?,
        };
        let out = (out != 0).then(|| output(&product, out));
        Ok(py.detach(|| product.run_with(unit, &adapter, out)))
    }
}
