//! bitsandbytes' checkpoint form of a 4-bit tensor: the packed weight and its quant state as named tensors.
//!
//! | tensor | dtype, shape | holds |
//! |---|---|---|
//! | `<name>` | any, 2 codes a byte | packed codes; uint8 `[bytes, 1]` unless another `quant_storage` was chosen |
//! | `<name>.absmax` | float32 or uint8 `[blocks]` | plain, or double-quantised absmax |
//! | `<name>.quant_map` | float32 `[16]` | the codebook |
//! | `<name>.nested_absmax` | float32 `[blocks / 256]` | with double quantisation only |
//! | `<name>.nested_quant_map` | float32 `[256]` | with double quantisation only |
//! | `<name>.quant_state.bitsandbytes__<type>` | uint8 | JSON: quant_type, blocksize, dtype, shape, nested_… |

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::codebook::Codebook;
use super::state::{Absmax, QuantState, Quantized4bit};
use crate::dtype::{DType, QuantType};
use crate::error::{Error, Result};

/// Largest difference bitsandbytes tolerates between two codebooks it calls equal.
const MAP_TOLERANCE: f32 = 1e-6;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Little-endian, row-major.
    pub bytes: Vec<u8>,
}

/// A tensor that was read; `bytes` need not be aligned.
#[derive(Debug, Clone, Copy)]
pub struct TensorBytes<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    /// Little-endian, row-major.
    pub bytes: &'a [u8],
}

/// The JSON of the quant_state tensor, its keys in bitsandbytes' order.
#[derive(Debug, Serialize, Deserialize)]
struct Packed {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f64>,
}

/// The tensors under which bitsandbytes stores `weight` as `name`.
pub fn to_tensors(name: &str, weight: &Quantized4bit) -> Result<Vec<NamedTensor>> {
    let state = &weight.state;
    state.check(weight.packed.len())?;
    let tensor = |suffix: &str, dtype, shape: &[usize], bytes: Vec<u8>| NamedTensor {
        name: format!("{name}{suffix}"),
        dtype,
        shape: shape.to_vec(),
        bytes,
    };
    let floats = |suffix: &str, values: &[f32]| {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensor(suffix, Dtype::F32, &[values.len()], bytes)
    };
    let mut packed = Packed {
        quant_type: state.quant_type.name().to_owned(),
        blocksize: state.blocksize,
        dtype: state.dtype.torch_name().to_owned(),
        shape: state.shape.clone(),
        nested_blocksize: None,
        nested_dtype: None,
        nested_offset: None,
    };
    let mut tensors = vec![tensor(
        "",
        Dtype::U8,
        &[weight.packed.len(), 1],
        weight.packed.clone(),
    )];
    match &state.absmax {
        Absmax::Plain(absmax) => tensors.push(floats(".absmax", absmax)),
        Absmax::Nested {
            codes,
            absmax,
            code,
            offset,
            blocksize,
        } => {
            packed.nested_blocksize = Some(*blocksize);
            packed.nested_dtype = Some(DType::F32.torch_name().to_owned());
            packed.nested_offset = Some(f64::from(*offset));
            tensors.push(tensor(".absmax", Dtype::U8, &[codes.len()], codes.clone()));
            tensors.push(floats(".nested_absmax", absmax));
            tensors.push(floats(".nested_quant_map", code));
        }
    }
    tensors.push(floats(".quant_map", &Codebook::of(state.quant_type).values));
    let json = serde_json::to_vec(&packed)
        .map_err(|error| Error::run(format!("quant state of '{name}': {error}")))?;
    tensors.push(tensor(
        &state_suffix(state.quant_type),
        Dtype::U8,
        &[json.len()],
        json,
    ));
    Ok(tensors)
}

/// Reads the 4-bit tensor that bitsandbytes stored as `name`, or None if `find` has no quant state of that name.
/// `find` looks a tensor up by its full name; `path` is for the messages.
///
/// # Errors
/// `Format`, naming the tensor: one that is missing, has the wrong type or size for the shape, a JSON that does not
/// parse, a block size out of bitsandbytes' list, a `quant_map` that is not the type's codebook.
pub fn from_tensors<'a>(
    path: &Path,
    name: &str,
    find: impl Fn(&str) -> Option<TensorBytes<'a>>,
) -> Result<Option<Quantized4bit>> {
    let reader = Reader { path, name, find };
    let found = [QuantType::Nf4, QuantType::Fp4]
        .into_iter()
        .find_map(|kind| Some((kind, (reader.find)(&reader.full(&state_suffix(kind)))?)));
    match found {
        Some((kind, json)) => reader.read(kind, json).map(Some),
        None => Ok(None),
    }
}

fn state_suffix(quant_type: QuantType) -> String {
    format!(".quant_state.bitsandbytes__{}", quant_type.name())
}

struct Reader<'p, F> {
    path: &'p Path,
    name: &'p str,
    find: F,
}

impl<'a, F: Fn(&str) -> Option<TensorBytes<'a>>> Reader<'_, F> {
    fn full(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.name)
    }

    fn wrong(&self, suffix: &str, message: impl std::fmt::Display) -> Error {
        Error::format(
            self.path,
            format!("tensor '{}': {message}", self.full(suffix)),
        )
    }

    fn get(&self, suffix: &str) -> Result<TensorBytes<'a>> {
        (self.find)(&self.full(suffix))
            .ok_or_else(|| self.wrong(suffix, "missing, but the weight is stored in 4 bits"))
    }

    /// Any of float32, float16 and bfloat16 as f32.
    fn floats(&self, suffix: &str) -> Result<Vec<f32>> {
        let tensor = self.get(suffix)?;
        let values: Vec<f32> = match tensor.dtype {
            Dtype::F32 => words(tensor.bytes, f32::from_le_bytes),
            Dtype::F16 => words(tensor.bytes, |b| half::f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => words(tensor.bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
            other => return Err(self.wrong(suffix, format!("dtype {other:?}, not float32"))),
        };
        match values.iter().position(|x| !x.is_finite()) {
            Some(i) => Err(self.wrong(suffix, format!("value {i} is {}", values[i]))),
            None => Ok(values),
        }
    }

    fn read(&self, kind: QuantType, json: TensorBytes<'a>) -> Result<Quantized4bit> {
        let suffix = state_suffix(kind);
        let packed: Packed = serde_json::from_slice(json.bytes)
            .map_err(|error| self.wrong(&suffix, format!("its JSON does not parse: {error}")))?;
        if packed.quant_type != kind.name() {
            let message = format!("says quant_type '{}'", packed.quant_type);
            return Err(self.wrong(&suffix, message));
        }
        let dtype =
            DType::from_torch_name(&packed.dtype).map_err(|error| self.wrong(&suffix, error))?;
        self.check_map(kind)?;
        let state = QuantState {
            quant_type: kind,
            blocksize: packed.blocksize,
            dtype,
            absmax: self.absmax(&packed, &suffix)?,
            shape: packed.shape,
        };
        let weight = self.get("")?;
        // The check's message begins with the part: a checkpoint suffix, or the packed tensor itself.
        state
            .check(weight.bytes.len())
            .map_err(|error| self.wrong("", error))?;
        Ok(Quantized4bit {
            packed: weight.bytes.to_vec(),
            state,
        })
    }

    fn check_map(&self, kind: QuantType) -> Result<()> {
        let map = self.floats(".quant_map")?;
        let values = &Codebook::of(kind).values;
        let same = map.len() == values.len()
            && map
                .iter()
                .zip(values)
                .all(|(a, b)| (a - b).abs() <= MAP_TOLERANCE);
        if same {
            return Ok(());
        }
        let message = format!("is not the codebook of {}: {map:?}", kind.name());
        Err(self.wrong(".quant_map", message))
    }

    fn absmax(&self, packed: &Packed, suffix: &str) -> Result<Absmax> {
        let codes = self.get(".absmax")?;
        if codes.dtype != Dtype::U8 {
            return Ok(Absmax::Plain(self.floats(".absmax")?));
        }
        let missing = |key: &str| {
            self.wrong(
                suffix,
                format!("'{key}' is missing, but absmax is stored in 8 bits"),
            )
        };
        let offset = packed
            .nested_offset
            .ok_or_else(|| missing("nested_offset"))? as f32;
        if !offset.is_finite() {
            return Err(self.wrong(suffix, format!("nested_offset is {offset}")));
        }
        Ok(Absmax::Nested {
            codes: codes.bytes.to_vec(),
            absmax: self.floats(".nested_absmax")?,
            code: self.floats(".nested_quant_map")?,
            offset,
            blocksize: packed
                .nested_blocksize
                .ok_or_else(|| missing("nested_blocksize"))?,
        })
    }
}

fn words<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (words, _) = bytes.as_chunks::<N>();
    words.iter().copied().map(read).collect()
}
