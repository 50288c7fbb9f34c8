//! Products of few rows by 4-bit weights on PyTorch's CUDA memory, as plain integers; `ferrotune.ops.cuda_small`
//! allocates and keeps tensors alive.

use pyo3::prelude::*;

use super::cuda::Weight;
use crate::cuda::Device;
use crate::cuda::lora::Float16;
use crate::cuda::lora::small::{self, Division, Sizes, Small};
use crate::dtype::DType;
use crate::error::Result;

/// (m, n, k, r, parts of an adapter's value); r is 0 without an adapter.
type SizesOf = (u64, u64, u64, u64, u64);

/// (blocks of a cluster, warpgroups that share a block's depth, row tiles of each)
type DivisionOf = (u64, u64, u64);

fn sizes_of((m, n, k, r, planes): SizesOf) -> Sizes {
    Sizes { m, n, k, r, planes }
}

/// An adapter; addresses are 0 for what is not there.
#[derive(FromPyObject)]
pub struct SmallAdapter(
    // lora_A: [r, k], aligned to 16 bytes, and lora_B: [n, r], contiguous
    (u64, u64),
    // lora_bias and its dtype
    (u64, String),
    // scaling
    f32,
    // h: [m, stride] at the projection's columns, stride, elements between the parts of a value
    (u64, u64, u64),
);

/// How such a product is divided among blocks, or None where its kernel does not take it.
#[pyfunction]
pub fn cuda_small_division(device: usize, sizes: SizesOf) -> Result<Option<DivisionOf>> {
    let found = small::division(Device::get(device)?, &sizes_of(sizes));
    Ok(found.map(|one| (one.splits, one.k_groups, one.groups)))
}

/// Writes y, and H unless its address is 0: x and y of `dtype`, bias `[n]` or 0.
#[pyfunction]
pub fn cuda_small_linear(
    device: usize,
    stream: u64,
    dtype: &str,
    sizes: SizesOf,
    division: DivisionOf,
    x_y_bias: (u64, u64, u64),
    weight: Weight,
    adapter: Option<SmallAdapter>,
) -> Result<()> {
    let device = Device::get(device)?;
    let (x, y, bias) = x_y_bias;
    let mut small = Small {
        sizes: sizes_of(sizes),
        dtype: Float16::try_from(DType::from_torch_name(dtype)?)?,
        x,
        weight: weight.get()?,
        y,
        bias,
        lora_bias: 0,
        lora_bias_dtype: DType::F32,
        lora_a: 0,
        lora_b: 0,
        scaling: 0.0,
        h: 0,
        h_stride: 0,
        h_plane: 0,
    };
    if let Some(adapter) = &adapter {
        (small.lora_a, small.lora_b) = adapter.0;
        small.lora_bias = adapter.1.0;
        small.lora_bias_dtype = DType::from_torch_name(&adapter.1.1)?;
        small.scaling = adapter.2;
        (small.h, small.h_stride, small.h_plane) = adapter.3;
    } else {
        small.sizes.r = 0;
    }
    let (splits, k_groups, groups) = division;
    let division = Division {
        splits,
        k_groups,
        groups,
    };
    // SAFETY: `ferrotune.ops.cuda_small` allocated what is written and checked what is read.
    unsafe { small::launch(device, stream, &small, division) }
}
