//! Element types and quantisation types, with the names their formats use.

use crate::error::{Error, Result};

/// Floating-point element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
}

impl DType {
    /// Bytes an element takes.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name torch and transformers' config.json use.
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    pub fn from_torch_name(name: &str) -> Result<Self> {
        match name {
            "float32" => Ok(Self::F32),
            "float16" => Ok(Self::F16),
            "bfloat16" => Ok(Self::BF16),
            _ => Err(Error::unsupported(format!(
                "dtype '{name}' is not supported; use float32, float16 or bfloat16"
            ))),
        }
    }
}

/// 4-bit code: which sixteen values a nibble stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    Nf4,
    Fp4,
}

impl QuantType {
    /// The name bitsandbytes uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            _ => Err(Error::argument(format!(
                "quant_type must be 'nf4' or 'fp4', not '{name}'"
            ))),
        }
    }
}
