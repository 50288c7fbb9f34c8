//! What a 4-bit tensor needs besides its packed codes.

use super::codebook::Codebook;
use crate::dtype::{DType, QuantType};
use crate::error::{Error, Result};

/// Elements a block may have: bitsandbytes' list.
pub const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Blocks that share one nested absmax.
pub const NESTED_BLOCKSIZE: usize = 256;

/// Largest magnitude of each block.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One f32 a block.
    Plain(Vec<f32>),
    /// Double quantisation: block b's absmax is `code[codes[b]] * absmax[b / blocksize] + offset`, each operation
    /// rounded to f32.
    Nested {
        /// One byte a block.
        codes: Vec<u8>,
        /// One f32 a `blocksize` blocks.
        absmax: Vec<f32>,
        /// 256 values in [-1, 1].
        code: Vec<f32>,
        /// Mean of the blocks' absmax.
        offset: f32,
        /// [`NESTED_BLOCKSIZE`].
        blocksize: usize,
    },
}

impl Absmax {
    /// Blocks described.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Nested { codes, .. } => codes.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How to read a tensor's packed 4-bit codes.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    pub quant_type: QuantType,
    /// Elements a block, one of [`BLOCKSIZES`].
    pub blocksize: usize,
    /// Element type of the tensor that was quantised.
    pub dtype: DType,
    /// Shape of the tensor that was quantised.
    pub shape: Vec<usize>,
    pub absmax: Absmax,
}

impl QuantState {
    /// Elements of the tensor that was quantised.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes its packed codes take: two elements a byte, an odd last one alone in its own.
    pub fn packed_len(&self) -> usize {
        self.elements().div_ceil(2)
    }

    /// Bytes held, packed codes included.
    pub fn bytes(&self) -> usize {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => 4 * absmax.len(),
            Absmax::Nested {
                codes,
                absmax,
                code,
                ..
            } => codes.len() + 4 * (absmax.len() + code.len() + 1),
        };
        self.packed_len() + absmax
    }

    /// Checks that the parts fit together and that `packed` bytes are what the shape needs. The message names the
    /// part by its checkpoint name (`absmax`, `nested_absmax`, …; the packed codes are "the packed tensor").
    pub fn check(&self, packed: usize) -> Result<()> {
        check_blocksize(self.blocksize)?;
        let elements = checked_elements(&self.shape)?;
        let wrong = |part: &str, has: usize, needs: usize, unit: &str| {
            Error::argument(format!(
                "{part} has {has} {unit}, but shape {:?} with blocksize {} needs {needs}",
                self.shape, self.blocksize
            ))
        };
        if packed != elements.div_ceil(2) {
            return Err(wrong(
                "the packed tensor",
                packed,
                elements.div_ceil(2),
                "bytes",
            ));
        }
        let blocks = elements.div_ceil(self.blocksize);
        if self.absmax.len() != blocks {
            return Err(wrong("absmax", self.absmax.len(), blocks, "values"));
        }
        if let Absmax::Nested {
            absmax,
            code,
            blocksize,
            ..
        } = &self.absmax
        {
            if *blocksize == 0 {
                return Err(Error::argument("nested_blocksize must be positive, not 0"));
            }
            let needs = blocks.div_ceil(*blocksize);
            if absmax.len() != needs {
                return Err(wrong("nested_absmax", absmax.len(), needs, "values"));
            }
            if code.len() != 256 {
                return Err(Error::argument(format!(
                    "nested_quant_map has {} values, but an 8-bit code needs 256",
                    code.len()
                )));
            }
        }
        Ok(())
    }

    /// Value of each code before scaling.
    ///
    /// FP4 has two zeros. bitsandbytes' vectorised and reference code give +0 for both, its scalar code -0 for the
    /// code with the sign bit. Its choice on a CPU with AVX-512 is followed everywhere: scalar code for an even
    /// last dimension that is no multiple of 16, unless blocks are of 2048 elements or more.
    pub(super) fn lut(&self) -> [f32; 16] {
        let mut lut = Codebook::of(self.quant_type).values;
        let last = self.shape.last().copied().unwrap_or(1);
        if self.quant_type == QuantType::Fp4
            && last % 2 == 0
            && last % 16 != 0
            && self.blocksize < 2048
        {
            lut[8] = -0.0;
        }
        lut
    }
}

/// A tensor in 4 bits an element: `packed` as `state` describes it, `state.packed_len()` bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized4bit {
    pub packed: Vec<u8>,
    pub state: QuantState,
}

pub(super) fn check_blocksize(blocksize: usize) -> Result<()> {
    if BLOCKSIZES.contains(&blocksize) {
        return Ok(());
    }
    Err(Error::argument(format!(
        "blocksize must be one of {BLOCKSIZES:?}, not {blocksize}"
    )))
}

/// Product of the dimensions, or an error where it is beyond any memory.
pub(super) fn checked_elements(shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1_usize, |product, size| product.checked_mul(*size))
        .filter(|elements| isize::try_from(*elements).is_ok())
        .ok_or_else(|| {
            Error::argument(format!("shape {shape:?} has more elements than memory can"))
        })
}
