//! 4-bit quantisation on numpy arrays. `ferrotune.quant` flattens arrays and views 16-bit floats as uint16 bits.

#![allow(clippy::needless_pass_by_value)] // pyo3 hands over what it converted

use std::collections::HashMap;

use half::{bf16, f16};
use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use safetensors::Dtype;

use crate::dtype::{DType, QuantType};
use crate::error::{Error, Result};
use crate::quant::{self, Absmax, Element, QuantState, Quantized4bit, TensorBytes};

/// What Python's `Quantized4bit` is made from, field for field.
#[derive(IntoPyObject)]
struct Fields<'py> {
    packed: Bound<'py, PyArray1<u8>>,
    absmax: Bound<'py, PyAny>,
    quant_type: &'static str,
    blocksize: usize,
    dtype: &'static str,
    shape: Vec<usize>,
    nested_absmax: Option<Bound<'py, PyArray1<f32>>>,
    nested_quant_map: Option<Bound<'py, PyArray1<f32>>>,
    nested_offset: Option<f32>,
    nested_blocksize: Option<usize>,
}

impl<'py> Fields<'py> {
    fn new(py: Python<'py>, weight: Quantized4bit) -> Self {
        let state = weight.state;
        let mut fields = Self {
            packed: PyArray1::from_vec(py, weight.packed),
            absmax: py.None().into_bound(py),
            quant_type: state.quant_type.name(),
            blocksize: state.blocksize,
            dtype: state.dtype.torch_name(),
            shape: state.shape,
            nested_absmax: None,
            nested_quant_map: None,
            nested_offset: None,
            nested_blocksize: None,
        };
        match state.absmax {
            Absmax::Plain(absmax) => fields.absmax = PyArray1::from_vec(py, absmax).into_any(),
            Absmax::Nested {
                codes,
                absmax,
                code,
                offset,
                blocksize,
            } => {
                fields.absmax = PyArray1::from_vec(py, codes).into_any();
                fields.nested_absmax = Some(PyArray1::from_vec(py, absmax));
                fields.nested_quant_map = Some(PyArray1::from_vec(py, code));
                fields.nested_offset = Some(offset);
                fields.nested_blocksize = Some(blocksize);
            }
        }
        fields
    }
}

/// Python's `Quantized4bit`, by its attributes.
#[derive(FromPyObject)]
pub(crate) struct Weight<'py> {
    packed: PyReadonlyArray1<'py, u8>,
    absmax: Bound<'py, PyAny>,
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_absmax: Option<PyReadonlyArray1<'py, f32>>,
    nested_quant_map: Option<PyReadonlyArray1<'py, f32>>,
    nested_offset: Option<f32>,
    nested_blocksize: Option<usize>,
}

impl Weight<'_> {
    fn packed(&self) -> Result<&[u8]> {
        slice(&self.packed, "packed")
    }

    fn state(&self) -> Result<QuantState> {
        let nested = (
            &self.nested_absmax,
            &self.nested_quant_map,
            self.nested_offset,
            self.nested_blocksize,
        );
        let absmax = match nested {
            (Some(absmax), Some(code), Some(offset), Some(blocksize)) => Absmax::Nested {
                codes: self.absmax::<u8>("uint8, as nested_absmax is set")?,
                absmax: slice(absmax, "nested_absmax")?.to_vec(),
                code: slice(code, "nested_quant_map")?.to_vec(),
                offset,
                blocksize,
            },
            (None, None, None, None) => {
                Absmax::Plain(self.absmax::<f32>("float32, as nested_absmax is not set")?)
            }
            _ => {
                return Err(Error::argument(
                    "nested_absmax, nested_quant_map, nested_offset and nested_blocksize go together: \
                     set all of them or none",
                ));
            }
        };
        Ok(QuantState {
            quant_type: QuantType::from_name(&self.quant_type)?,
            blocksize: self.blocksize,
            dtype: DType::from_torch_name(&self.dtype)?,
            shape: self.shape.clone(),
            absmax,
        })
    }

    fn absmax<T: numpy::Element + Copy>(&self, needs: &str) -> Result<Vec<T>> {
        let array: PyReadonlyArray1<'_, T> = self
            .absmax
            .extract()
            .map_err(|_| Error::argument(format!("absmax must be a 1-D array of {needs}")))?;
        Ok(slice(&array, "absmax")?.to_vec())
    }
}

fn slice<'a, T: numpy::Element>(array: &'a PyReadonlyArray1<'_, T>, name: &str) -> Result<&'a [T]> {
    array
        .as_slice()
        .map_err(|_| Error::argument(format!("{name} must be contiguous")))
}

/// Quantises a flat, contiguous array: float32, or uint16 holding the bits of `dtype` float16 or bfloat16.
#[pyfunction]
pub fn quantize_4bit<'py>(
    py: Python<'py>,
    values: &Bound<'py, PyAny>,
    shape: Vec<usize>,
    dtype: &str,
    quant_type: &str,
    blocksize: usize,
    double_quant: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let quant_type = QuantType::from_name(quant_type)?;
    let weight = match DType::from_torch_name(dtype)? {
        DType::F32 => {
            let values = flat::<f32>(values, dtype)?;
            let values = slice(&values, "values")?;
            encode(py, values, &shape, quant_type, blocksize, double_quant)
        }
        half => {
            let values = flat::<u16>(values, dtype)?;
            let bits = slice(&values, "values")?;
            if half == DType::F16 {
                let values: &[f16] = bytemuck::cast_slice(bits);
                encode(py, values, &shape, quant_type, blocksize, double_quant)
            } else {
                let values: &[bf16] = bytemuck::cast_slice(bits);
                encode(py, values, &shape, quant_type, blocksize, double_quant)
            }
        }
    }?;
    Ok(Fields::new(py, weight).into_pyobject(py)?.into_any())
}

fn encode<T: Element>(
    py: Python<'_>,
    values: &[T],
    shape: &[usize],
    quant_type: QuantType,
    blocksize: usize,
    double_quant: bool,
) -> Result<Quantized4bit> {
    py.detach(|| quant::quantize_4bit(values, shape, quant_type, blocksize, double_quant))
}

fn flat<'py, T: numpy::Element>(
    array: &Bound<'py, PyAny>,
    dtype: &str,
) -> PyResult<PyReadonlyArray1<'py, T>> {
    array.extract().map_err(|_| wrong_array("values", dtype))
}

fn wrong_array(name: &str, dtype: &str) -> PyErr {
    let holds = if dtype == "float32" {
        "float32".to_owned()
    } else {
        format!("uint16 with the bits of {dtype}")
    };
    PyTypeError::new_err(format!("{name} must be a 1-D array of {holds}"))
}

/// Dequantises the elements of `weight` from `start` on into all of `out`, a flat, contiguous, writable array of
/// float32, or of uint16 for the bits of `dtype` float16 or bfloat16.
#[pyfunction]
pub fn dequantize_4bit(
    py: Python<'_>,
    weight: Weight<'_>,
    dtype: &str,
    out: &Bound<'_, PyAny>,
    start: usize,
) -> PyResult<()> {
    let state = weight.state()?;
    let packed = weight.packed()?;
    let dtype = DType::from_torch_name(dtype)?;
    let wrong = |_| wrong_array("out", dtype.torch_name());
    if dtype == DType::F32 {
        let mut out: PyReadwriteArray1<'_, f32> = out.extract().map_err(wrong)?;
        return decode(py, packed, &state, start, writable(&mut out)?);
    }
    let mut out: PyReadwriteArray1<'_, u16> = out.extract().map_err(wrong)?;
    let bits = writable(&mut out)?;
    if dtype == DType::F16 {
        decode::<f16>(py, packed, &state, start, bytemuck::cast_slice_mut(bits))
    } else {
        decode::<bf16>(py, packed, &state, start, bytemuck::cast_slice_mut(bits))
    }
}

fn decode<T: Element>(
    py: Python<'_>,
    packed: &[u8],
    state: &QuantState,
    start: usize,
    out: &mut [T],
) -> PyResult<()> {
    Ok(py.detach(|| quant::dequantize_4bit_range(packed, state, start, out))?)
}

fn writable<'a, T: numpy::Element>(array: &'a mut PyReadwriteArray1<'_, T>) -> Result<&'a mut [T]> {
    array
        .as_slice_mut()
        .map_err(|_| Error::argument("out must be contiguous"))
}

/// The tensors under which bitsandbytes stores `weight` as `name`: {name: array}.
#[pyfunction]
pub fn quant_state_to_tensors<'py>(
    py: Python<'py>,
    name: &str,
    weight: Weight<'_>,
) -> PyResult<Vec<(String, Bound<'py, PyAny>)>> {
    let weight = Quantized4bit {
        packed: weight.packed()?.to_vec(),
        state: weight.state()?,
    };
    quant::to_tensors(name, &weight)?
        .into_iter()
        .map(|tensor| {
            let array = PyArray1::from_vec(py, tensor.bytes);
            let dtype = if tensor.dtype == Dtype::F32 {
                "<f4"
            } else {
                "u1"
            };
            let array = array.call_method1("view", (dtype,))?;
            Ok((tensor.name, array.call_method1("reshape", (tensor.shape,))?))
        })
        .collect()
}

/// Reads the weight that bitsandbytes stored as `name` from {name: (dtype, shape, bytes as uint8)}, dtypes by
/// numpy's names; None if it is not there in 4 bits.
#[pyfunction]
pub fn quant_state_from_tensors<'py>(
    py: Python<'py>,
    name: &str,
    tensors: HashMap<String, (String, Vec<usize>, PyReadonlyArray1<'py, u8>)>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let find = |full: &str| {
        let (dtype, shape, bytes) = tensors.get(full)?;
        Some(TensorBytes {
            dtype: match dtype.as_str() {
                "float32" => Dtype::F32,
                "float16" => Dtype::F16,
                "bfloat16" => Dtype::BF16,
                "uint8" => Dtype::U8,
                // Any other type is no one's absmax: the reader refuses it where it matters.
                _ => Dtype::BOOL,
            },
            shape,
            bytes: bytes.as_slice().ok()?,
        })
    };
    quant::from_tensors("state_dict".as_ref(), name, find)?
        .map(|weight| Ok(Fields::new(py, weight).into_pyobject(py)?.into_any()))
        .transpose()
}

/// The 256 values of the 8-bit type that holds the absmax of double-quantised weights.
#[pyfunction]
pub fn dynamic_map(py: Python<'_>) -> Bound<'_, PyArray1<f32>> {
    PyArray1::from_slice(py, quant::dynamic_map())
}
