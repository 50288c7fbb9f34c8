//! LoRA's forward and backward of a group of projections that share their input, but for the base products.
//!
//! Forward writes `scaling · dropout(x)·Aᵀ·Bᵀ + bias` where the base product is then accumulated, and keeps
//! H = scaling · dropout(x)·Aᵀ. Backward turns the gradients into G = scaling · dY·B, dB = dYᵀ·H and
//! dA = Gᵀ·dropout(x), and writes mask ∘ (G·A) where dY·W is then accumulated. Given the weights, on Hopper, both write
//! the sums with the base products: one product carries the other ([`gemm`]). Panels, G and partial sums lie in a
//! workspace of the caller's; [`Layout`] says how large it must be.

mod backward;
mod down90;
mod forward;
mod gemm;
mod kernels;
mod outer90;
mod panels;
pub mod small;
mod tuned;

use super::device::Device;
use super::launch::{Address, Stream};
use super::quant::{self, Quantized};
use crate::dtype::DType;
use crate::error::Error;
use kernels::{DownOuterPlan, MAX_SEGMENTS, Masks, SEGMENT, Segment};

pub use backward::backward;
pub use forward::{forward, forward_gated, products};
pub use gemm::{Matrix, Product, pays, product, takes};

/// The types that the kernels take; their place among the variants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float16 {
    F16 = 0,
    BF16 = 1,
}

impl TryFrom<DType> for Float16 {
    type Error = Error;

    fn try_from(dtype: DType) -> Result<Self, Error> {
        match dtype {
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::BF16),
            DType::F32 => Err(Error::unsupported("the LoRA kernels take 16-bit inputs")),
        }
    }
}

impl From<Float16> for DType {
    fn from(dtype: Float16) -> Self {
        match dtype {
            Float16::F16 => Self::F16,
            Float16::BF16 => Self::BF16,
        }
    }
}

/// How kernels number element types.
const fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
    }
}

/// What forward does with the LoRA term of a projection whose weight is not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terms {
    /// It is written to the output, for the base product to be accumulated onto it.
    Written,
    /// It is added to what is in the output.
    Added,
    /// Nothing: [`products`] follows.
    Left,
}

/// Where kernels that only Hopper has are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hopper {
    /// Where they are the faster ones.
    Auto,
    /// Where they can run.
    Always,
    Never,
}

/// The input that a group shares.
#[derive(Debug, Clone, Copy)]
pub struct Input {
    /// `[m, k]`, contiguous.
    pub x: Address,
    pub m: u64,
    pub k: u64,
    pub dtype: Float16,
    /// Parts of an adapter's value: 1, or 3 where adapters are f32.
    pub planes: u64,
    /// Forward.
    pub terms: Terms,
    pub hopper: Hopper,
    /// Of an int64; 0 where nothing is dropped.
    pub seed: Address,
    /// `[m, planes · columns]`, every projection's H at its `h_column`.
    pub h: Address,
    /// Of H, over all projections of the forward pass.
    pub h_columns: u64,
    /// The mask of an only projection, as forward keeps it for backward: a bit an element, [`kept_bytes`] a row, aligned
    /// to 16 bytes; 0 where it does not.
    pub bits: Address,
}

/// One projection. Addresses are 0 where there is nothing, or nothing is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Projection {
    /// `[r, k]` and `[n, r]`, contiguous, of `adapter` type.
    pub lora_a: Address,
    pub lora_b: Address,
    pub adapter: DType,
    pub n: u64,
    pub r: u64,
    pub scaling: f32,
    pub p: f32,
    /// Philox stream of its mask.
    pub stream: u64,
    /// Where its H starts, in columns.
    pub h_column: u64,
    /// Forward: the output `[m, n]`. Backward: its gradient.
    pub y: Address,
    /// Forward: `[n]` in the input's type, and in `lora_bias_dtype`.
    pub bias: Address,
    pub lora_bias: Address,
    pub lora_bias_dtype: DType,
    /// Backward: gradients to be written, as the parameters but of `grad` type.
    pub grad_a: Address,
    pub grad_b: Address,
    pub grad: DType,
    /// The frozen weight in the input's type, `[n, k]` or, transposed, `[k, n]`, contiguous, of a product that
    /// the device [`takes`]; 0: its product is the caller's.
    pub weight: Address,
    pub weight_transposed: bool,
    /// What `weight`, not transposed and aligned to 16 bytes, receives first.
    pub quantized: Option<Quantized>,
}

impl Projection {
    /// Columns of its panels.
    fn columns(&self) -> u64 {
        self.r.next_multiple_of(SEGMENT)
    }

    /// Writes the weight if it is a 4-bit one; see [`quant::dequantize_4bit`] for `early`.
    ///
    /// # Safety
    /// `quantized` is of `[n, k]`, and `weight` has room for it.
    unsafe fn dequantize(
        &self,
        device: &Device,
        stream: Stream,
        input: &Input,
        early: bool,
    ) -> Result<(), Error> {
        let Some(quantized) = &self.quantized else {
            return Ok(());
        };
        let elements = self.n * input.k;
        let dtype = input.dtype.into();
        // SAFETY: the caller's promise.
        unsafe {
            quant::dequantize_4bit(
                device,
                stream,
                quantized,
                self.weight,
                dtype,
                elements,
                early,
            )
        }
    }

    fn weight_matrix(&self, k: u64) -> gemm::Matrix {
        let (rows, columns) = if self.weight_transposed {
            (k, self.n)
        } else {
            (self.n, k)
        };
        gemm::Matrix::new(self.weight, rows, columns)
    }

    fn segments(&self) -> usize {
        (self.columns() / SEGMENT) as usize
    }

    /// What dropout scales what it leaves by. With p = 1 nothing is kept, and nothing must be infinite.
    fn left(&self) -> f32 {
        if self.p < 1.0 {
            1.0 / (1.0 - self.p)
        } else {
            0.0
        }
    }

    /// Its segments, whose sums are scaled by `scale`.
    fn masked(&self, scale: f32) -> impl Iterator<Item = Segment> {
        let segment = Segment {
            stream: self.stream,
            scale,
            threshold: (f64::from(self.p) * 65_536.0).round() as u32,
            first: 0,
            reserved: 0,
        };
        (0..self.segments()).map(move |i| Segment {
            first: u32::from(i == 0),
            ..segment
        })
    }
}

/// Which columns of a pass over `x` are whose.
fn segments_of(
    projections: &[Projection],
    scale: impl Fn(&Projection) -> f32,
) -> ([Segment; MAX_SEGMENTS], usize) {
    let mut found = [Segment::default(); MAX_SEGMENTS];
    let mut count = 0;
    for segment in projections.iter().flat_map(|one| one.masked(scale(one))) {
        found[count] = segment;
        count += 1;
    }
    (found, count)
}

fn masks(input: &Input, projections: &[Projection]) -> Masks {
    let dropped = projections.iter().any(|projection| projection.p > 0.0);
    Masks {
        seed: if dropped { input.seed } else { 0 },
        columns: input.k,
    }
}

/// Whether Hopper's passes over x can make its masks: their counters have one word.
fn few_calls(input: &Input) -> bool {
    input.seed == 0 || u128::from(input.m) * u128::from(input.k) <= 1 << 35
}

/// Where the parts of a workspace lie, in bytes from its start.
#[derive(Debug)]
pub struct Layout {
    /// A of all projections: `[k, planes · columns]`.
    panel_a: u64,
    /// B of each: `[n, planes · columns]`.
    panel_b: Vec<u64>,
    /// f32 `[n]` of each; forward alone, as what follows is backward's.
    bias: Vec<u64>,
    /// `[m, planes · columns]`
    g: u64,
    g_partial: Vec<u64>,
    b_partial: Vec<u64>,
    a_partial: u64,
    plans: Vec<DownOuterPlan>,
    pub bytes: u64,
}

/// What of a projection decides the workspace.
pub type Size = (u64, u64); // n, r

impl Layout {
    /// # Errors
    /// More columns than one pass takes: [`max_columns`].
    pub fn new(
        device: &Device,
        m: u64,
        k: u64,
        planes: u64,
        sizes: &[Size],
        backward: bool,
    ) -> Result<Self, Error> {
        let padded = |r: u64| r.next_multiple_of(SEGMENT);
        let columns: u64 = sizes.iter().map(|size| padded(size.1)).sum();
        if columns == 0 || columns > SEGMENT * MAX_SEGMENTS as u64 {
            return Err(Error::argument(format!(
                "ranks of a group must add up to between 1 and {}, padded to 16",
                SEGMENT * MAX_SEGMENTS as u64
            )));
        }
        let mut bytes = 0;
        let mut take = |size: u64| {
            let start = bytes;
            bytes += size.next_multiple_of(256);
            start
        };
        let panel_a = take(2 * k * planes * columns);
        let panel_b = sizes
            .iter()
            .map(|&(n, r)| take(2 * n * planes * padded(r)))
            .collect();
        let mut layout = Self {
            panel_a,
            panel_b,
            bias: Vec::new(),
            g: 0,
            g_partial: Vec::new(),
            b_partial: Vec::new(),
            a_partial: 0,
            plans: Vec::new(),
            bytes: 0,
        };
        if backward {
            layout.g = take(2 * m * planes * columns);
            for &(n, r) in sizes {
                let plan = DownOuterPlan::new(device, m, n, padded(r), planes)
                    .ok_or_else(|| Error::unsupported("rank too large for this device"))?;
                layout
                    .g_partial
                    .push(take(4 * plan.column_blocks * m * padded(r)));
                let ranges = plan.ranges.max(outer90::ranges(device, m, n).0);
                layout.b_partial.push(take(4 * ranges * n * padded(r)));
                layout.plans.push(plan);
            }
            let (ranges, _) = kernels::outer_ranges(device, m, k);
            let ranges = ranges.max(outer90::ranges(device, m, k).0);
            layout.a_partial = take(4 * ranges * k * columns);
        } else {
            layout.bias = sizes.iter().map(|&(n, _)| take(4 * n)).collect();
        }
        layout.bytes = bytes;
        Ok(layout)
    }
}

/// The largest sum of ranks, each padded to 16, that one pass takes on this device.
pub fn max_columns(device: &Device, planes: u64) -> u64 {
    (1..=MAX_SEGMENTS as u64)
        .map(|segments| segments * SEGMENT)
        .filter(|&columns| DownOuterPlan::new(device, 1, 1, columns, planes).is_some())
        .max()
        .unwrap_or(0)
}

/// Bytes of a row of the mask that forward of a projection alone keeps, where backward has kernels that take it.
pub fn kept_bytes(device: &Device, k: u64, planes: u64, hopper: Hopper) -> Option<u64> {
    let used = hopper != Hopper::Never
        && device.capability == (9, 0)
        && matches!(planes, 1 | 3)
        && k.is_multiple_of(8);
    used.then(|| kept_row(k))
}

/// Bytes of a row of such a mask: `kernels/common/lora.cuh`'s `kept_words`.
const fn kept_row(k: u64) -> u64 {
    16 * k.div_ceil(128)
}

/// Whether rows of `columns` 16-bit elements at `address` start on 16 bytes.
fn vectors(address: Address, columns: u64) -> u32 {
    u32::from(address.is_multiple_of(16) && columns.is_multiple_of(8))
}
