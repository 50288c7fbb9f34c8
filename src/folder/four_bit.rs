//! bitsandbytes' 4-bit weights in a folder: one packed tensor and its companions, named after it.

use safetensors::Dtype;

use super::weights::{TensorView, Weights};
use crate::dtype::QuantType;
use crate::error::{Error, Result};

/// The tensors that bitsandbytes saves for one 4-bit weight `<name>`.
///
/// Plain: `absmax` f32. Double-quantised: `absmax` u8, and `nested_absmax` f32 with `nested_quant_map` f32\[256\].
#[derive(Debug, Clone, Copy)]
pub struct FourBitParts<'a> {
    pub quant_type: QuantType,
    /// Two elements a byte; its type may be any storage type of bitsandbytes, the bytes are the same.
    pub packed: TensorView<'a>,
    /// `<name>.absmax`
    pub absmax: TensorView<'a>,
    /// `<name>.quant_map`, f32\[16\]
    pub quant_map: TensorView<'a>,
    /// `<name>.nested_absmax` and `<name>.nested_quant_map`
    pub nested: Option<(TensorView<'a>, TensorView<'a>)>,
    /// `<name>.quant_state.bitsandbytes__nf4` or `__fp4`: JSON with `quant_type`, `blocksize`, `dtype`, `shape` and,
    /// where nested, `nested_blocksize`, `nested_dtype`, `nested_offset`.
    pub quant_state: &'a [u8],
}

impl Weights {
    /// The parts of the 4-bit weight `name`; `None` if it is not 4-bit.
    ///
    /// # Errors
    /// `Format` if some parts are there and others missing, or one has the wrong type.
    pub fn four_bit_parts(&self, name: &str) -> Result<Option<FourBitParts<'_>>> {
        let state = [QuantType::Nf4, QuantType::Fp4]
            .into_iter()
            .find_map(|quant_type| {
                let key = format!("{name}.quant_state.bitsandbytes__{}", quant_type.name());
                Some((quant_type, self.find(&key)?))
            });
        let Some((quant_type, quant_state)) = state else {
            return match self.find(&format!("{name}.absmax")) {
                None => Ok(None),
                Some(_) => Err(Error::format(
                    self.file_of(name),
                    format!(
                        "'{name}' has an absmax but no '{name}.quant_state.bitsandbytes__nf4' (or __fp4): \
                         not a 4-bit weight as bitsandbytes saves it"
                    ),
                )),
            };
        };
        let part = |suffix: &str, dtype: &[Dtype]| -> Result<TensorView<'_>> {
            let key = format!("{name}{suffix}");
            let view = self.get(&key)?;
            if dtype.is_empty() || dtype.contains(&view.dtype) {
                Ok(view)
            } else {
                Err(Error::format(
                    self.file_of(&key),
                    format!("tensor '{key}' has type {}, not {}", view.dtype, dtype[0]),
                ))
            }
        };
        let absmax = part(".absmax", &[Dtype::F32, Dtype::U8])?;
        let nested = if absmax.dtype == Dtype::U8 {
            Some((
                part(".nested_absmax", &[Dtype::F32])?,
                part(".nested_quant_map", &[Dtype::F32])?,
            ))
        } else {
            None
        };
        Ok(Some(FourBitParts {
            quant_type,
            packed: part("", &[])?,
            absmax,
            quant_map: part(".quant_map", &[Dtype::F32])?,
            nested,
            quant_state: quant_state.bytes,
        }))
    }
}
