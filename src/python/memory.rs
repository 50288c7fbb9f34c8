//! Operations on the CPU memory of tensors: addresses and sizes in, the caller allocates.

use half::{bf16, f16};
use pyo3::prelude::*;

use crate::dtype::{DType, QuantType};
use crate::error::{Error, Result};
use crate::lora::Dropout;
use crate::quant::{self, Absmax, Element, QuantState};

/// A slice of `len` elements at an address that Python got from a tensor's `data_ptr()`.
///
/// # Safety
/// The address is 0 only if `len` is, is aligned for T, and `len` elements there stay valid and unwritten for `'a`.
pub(super) unsafe fn at<'a, T>(address: usize, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

/// # Safety
/// As [`at`], and nothing else reads or writes the elements for `'a`.
unsafe fn at_mut<'a, T>(address: usize, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, len) }
}

/// Dequantises a whole weight into `elements` elements of `dtype` at `out`. `nested_code` is the address of 256 f32 and
/// `nested_absmax` of `nested_len` f32 where the absmax are codes (`nested_len` > 0), else `absmax` is of f32.
#[pyfunction]
pub fn dequantize_4bit_at(
    py: Python<'_>,
    packed: usize,
    packed_len: usize,
    absmax: usize,
    absmax_len: usize,
    nested_absmax: usize,
    nested_len: usize,
    nested_code: usize,
    nested_offset: f32,
    quant_type: &str,
    blocksize: usize,
    nested_blocksize: usize,
    out: usize,
    elements: usize,
    dtype: &str,
) -> PyResult<()> {
    // SAFETY: `ferrotune.ops` passes addresses and sizes of contiguous tensors that it holds on to during the call.
    let (packed, absmax) = unsafe {
        let absmax = if nested_len == 0 {
            Absmax::Plain(at::<f32>(absmax, absmax_len).to_vec())
        } else {
            Absmax::Nested {
                codes: at::<u8>(absmax, absmax_len).to_vec(),
                absmax: at::<f32>(nested_absmax, nested_len).to_vec(),
                code: at::<f32>(nested_code, 256).to_vec(),
                offset: nested_offset,
                blocksize: nested_blocksize,
            }
        };
        (at::<u8>(packed, packed_len), absmax)
    };
    // A storage type wider than a byte rounds the size of the packed tensor up.
    let packed = &packed[..packed_len.min(elements.div_ceil(2))];
    let dtype = DType::from_torch_name(dtype)?;
    let state = QuantState {
        quant_type: QuantType::from_name(quant_type)?,
        blocksize,
        dtype,
        shape: vec![elements],
        absmax,
    };
    // SAFETY: as above; `out` was allocated for this call.
    py.detach(|| unsafe {
        match dtype {
            DType::F32 => decode::<f32>(packed, &state, out, elements),
            DType::F16 => decode::<f16>(packed, &state, out, elements),
            DType::BF16 => decode::<bf16>(packed, &state, out, elements),
        }
    })?;
    Ok(())
}

/// # Safety
/// `out` is the address of `elements` elements of T that nothing else uses.
unsafe fn decode<T: Element>(
    packed: &[u8],
    state: &QuantState,
    out: usize,
    elements: usize,
) -> Result<()> {
    // SAFETY: the caller's.
    quant::dequantize_4bit(packed, state, unsafe { at_mut::<T>(out, elements) })
}

/// `out = mask · values / (1 − p)` over `len` f32 at these addresses, by the mask of `seed` and `stream`.
#[pyfunction]
pub fn dropout_at(
    py: Python<'_>,
    values: usize,
    out: usize,
    len: usize,
    p: f32,
    seed: u64,
    stream: u64,
) -> PyResult<()> {
    if !(0.0..=1.0).contains(&p) {
        return Err(Error::argument(format!("dropout_p must be in [0, 1], not {p}")).into());
    }
    // SAFETY: `ferrotune.ops` passes two contiguous f32 tensors of `len` elements, the second of them new.
    let (values, out) = unsafe { (at::<f32>(values, len), at_mut::<f32>(out, len)) };
    py.detach(|| Dropout { p, seed, stream }.apply(values, out));
    Ok(())
}
