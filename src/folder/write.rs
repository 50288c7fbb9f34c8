//! Writing safetensors: the header first, then one tensor after another, never all of them in memory.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::header::{MAX_HEADER, PREFIX};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::file::write_atomic;

type Produce<'a> = Box<dyn FnOnce() -> Result<Cow<'a, [u8]>> + 'a>;

/// A tensor to be written. Its bytes (little-endian, row-major) are asked for when its turn comes and dropped after.
pub struct Tensor<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    bytes: Produce<'a>,
}

impl<'a> Tensor<'a> {
    pub fn from_bytes(
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        bytes: &'a [u8],
    ) -> Self {
        Self::lazy(name, dtype, shape, move || Ok(Cow::Borrowed(bytes)))
    }

    /// `values` rounded to `dtype` (to nearest, ties to even).
    pub fn from_f32(
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        values: &'a [f32],
    ) -> Self {
        Self::lazy(name, file_dtype(dtype), shape, move || {
            Ok(encode(values, dtype))
        })
    }

    /// A tensor whose bytes `produce` computes at the moment of writing.
    pub fn lazy(
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        produce: impl FnOnce() -> Result<Cow<'a, [u8]>> + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
            bytes: Box::new(produce),
        }
    }

    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Bytes in the file.
    pub fn size(&self) -> u64 {
        (self.elements() * self.dtype.bitsize() as u64).div_ceil(8)
    }
}

/// The safetensors type of a floating-point type.
pub fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// The bytes of `values` in `dtype`; borrowed for f32.
pub fn encode(values: &[f32], dtype: DType) -> Cow<'_, [u8]> {
    match dtype {
        DType::F32 => Cow::Borrowed(bytemuck::cast_slice(values)),
        DType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            Cow::Owned(bytemuck::cast_slice(&halves).to_vec())
        }
        DType::BF16 => {
            let mut halves = vec![bf16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            Cow::Owned(bytemuck::cast_slice(&halves).to_vec())
        }
    }
}

/// Writes a safetensors file aside and renames it over `path`.
///
/// # Errors
/// `Argument` if two tensors have one name or a tensor's bytes do not fit its shape; `Io` if the file cannot be
/// written (the old file stays); whatever a lazy tensor returns.
pub fn write_safetensors(
    path: &Path,
    tensors: Vec<Tensor>,
    metadata: &[(&str, &str)],
) -> Result<()> {
    // `write_atomic` speaks io::Error: an error of another kind waits here and takes its place.
    let mut failure = None;
    let written = write_atomic(path, |out| {
        stream(out, tensors, metadata).map_err(|error| match error {
            Failure::Io(error) => error,
            Failure::Other(error) => {
                failure = Some(error);
                std::io::Error::other("")
            }
        })
    });
    match failure {
        Some(error) => Err(error),
        None => written,
    }
}

pub(super) enum Failure {
    Io(std::io::Error),
    Other(Error),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// Header and tensors, widest type first and then by name, as the safetensors crate orders them for alignment.
pub(super) fn stream(
    out: &mut impl Write,
    mut tensors: Vec<Tensor>,
    metadata: &[(&str, &str)],
) -> std::result::Result<(), Failure> {
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let header = header(&tensors, metadata).map_err(Failure::Other)?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for tensor in tensors {
        let size = tensor.size();
        let bytes = (tensor.bytes)().map_err(Failure::Other)?;
        if bytes.len() as u64 != size {
            return Err(Failure::Other(Error::argument(format!(
                "tensor '{}' of shape {:?} and type {} takes {size} bytes, not {}",
                tensor.name,
                tensor.shape,
                tensor.dtype,
                bytes.len()
            ))));
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

fn header(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Result<Vec<u8>> {
    if let Some(pair) = {
        let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        names.sort_unstable();
        names
            .windows(2)
            .find(|pair| pair[0] == pair[1])
            .map(|pair| pair[0].to_owned())
    } {
        return Err(Error::argument(format!("two tensors are named '{pair}'")));
    }
    let pairs: HashMap<String, String> = metadata
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let mut offset = 0;
    let infos = tensors
        .iter()
        .map(|tensor| {
            let begin = offset;
            offset += usize::try_from(tensor.size()).unwrap_or(usize::MAX - begin);
            let info = TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                data_offsets: (begin, offset),
            };
            (tensor.name.clone(), info)
        })
        .collect();
    let mut text = Metadata::new((!pairs.is_empty()).then_some(pairs), infos)
        .map_err(|error| error.to_string())
        .and_then(|metadata| serde_json::to_vec(&metadata).map_err(|error| error.to_string()))
        .map_err(|error| {
            Error::argument(format!(
                "these tensors do not make a safetensors file: {error}"
            ))
        })?;
    // Spaces up to a multiple of eight keep the tensors aligned.
    text.resize(text.len().next_multiple_of(PREFIX), b' ');
    if text.len() > MAX_HEADER {
        return Err(Error::argument(format!(
            "{} tensors need a header of {} bytes; safetensors allows {MAX_HEADER}",
            tensors.len(),
            text.len()
        )));
    }
    Ok(text)
}
