//! LoRA on PyTorch's CUDA memory, as plain integers; `ferrotune.ops.cuda_lora` allocates and keeps tensors alive.

use pyo3::prelude::*;

use super::cuda::Weight;
use crate::cuda::glu::Activation;
use crate::cuda::lora::{self, Float16, Hopper, Input, Layout, Projection, Terms};
use crate::cuda::{Address, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The input that a group of projections shares.
#[derive(FromPyObject)]
pub struct GroupInput(
    u64,    // x: [m, k], contiguous
    u64,    // m
    u64,    // k
    String, // dtype
    u64,    // planes: 3 where adapters are wider than x
    u64,    // seed: of an int64; 0 without dropout
    u64,    // h: [m, planes * h_columns]
    u64,    // h_columns
    u64, // bits: the mask that forward of a projection alone keeps, of `cuda_lora_kept_bytes` a row, or 0
    String, // Hopper's kernels: "auto", "always" or "never"
    String, // forward: LoRA terms without a weight are "written", "added" to the outputs, or "left"
);

impl GroupInput {
    fn get(&self) -> Result<Input> {
        if !(1..=3).contains(&self.4) {
            return Err(Error::argument(format!(
                "planes must be 1 to 3, not {}",
                self.4
            )));
        }
        Ok(Input {
            x: self.0,
            m: self.1,
            k: self.2,
            dtype: Float16::try_from(DType::from_torch_name(&self.3)?)?,
            planes: self.4,
            seed: self.5,
            h: self.6,
            h_columns: self.7,
            bits: self.8,
            hopper: used(&self.9)?,
            terms: match self.10.as_str() {
                "written" => Terms::Written,
                "added" => Terms::Added,
                "left" => Terms::Left,
                other => {
                    return Err(Error::argument(format!(
                        "LoRA terms must be 'written', 'added' or 'left', not '{other}'"
                    )));
                }
            },
        })
    }
}

/// Where Hopper's kernels are used.
fn used(name: &str) -> Result<Hopper> {
    match name {
        "auto" => Ok(Hopper::Auto),
        "always" => Ok(Hopper::Always),
        "never" => Ok(Hopper::Never),
        other => Err(Error::argument(format!(
            "Hopper's kernels are used 'auto', 'always' or 'never', not '{other}'"
        ))),
    }
}

/// One projection; addresses are 0 for what is not there or not asked for.
#[derive(FromPyObject)]
pub struct GroupProjection(
    // lora_A: [r, k] and lora_B: [n, r], contiguous, the dtype of both, n, r
    (u64, u64, String, u64, u64),
    // scaling, dropout_p, stream, h_column
    (f32, f32, u64, u64),
    // y: forward's output [m, n] or backward's gradient, bias, lora_bias, the dtype of lora_bias
    (u64, u64, u64, String),
    // gradients of lora_A and lora_B, the dtype of both
    (u64, u64, String),
    // the frozen weight: 0, or [n, k], or transposed [k, n], contiguous, in x's dtype; the 4-bit one that it receives
    (u64, bool, Option<Weight>),
);

impl GroupProjection {
    fn get(&self) -> Result<Projection> {
        let (lora_a, lora_b, ref adapter, n, r) = self.0;
        let (scaling, p, stream, h_column) = self.1;
        let (y, bias, lora_bias, ref lora_bias_dtype) = self.2;
        let (grad_a, grad_b, ref grad) = self.3;
        let (weight, weight_transposed, ref quantized) = self.4;
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::argument(format!(
                "dropout_p must be in [0, 1], not {p}"
            )));
        }
        Ok(Projection {
            lora_a,
            lora_b,
            adapter: DType::from_torch_name(adapter)?,
            n,
            r,
            scaling,
            p,
            stream,
            h_column,
            y,
            bias,
            lora_bias,
            lora_bias_dtype: DType::from_torch_name(lora_bias_dtype)?,
            grad_a,
            grad_b,
            grad: DType::from_torch_name(grad)?,
            weight,
            weight_transposed,
            quantized: quantized.as_ref().map(Weight::get).transpose()?,
        })
    }
}

/// A call's arguments, and where the parts of its workspace lie.
fn group(
    device: &Device,
    input: &GroupInput,
    projections: &[GroupProjection],
    backward: bool,
) -> Result<(Input, Vec<Projection>, Layout)> {
    let input = input.get()?;
    let projections = projections
        .iter()
        .map(GroupProjection::get)
        .collect::<Result<Vec<_>>>()?;
    let sizes: Vec<_> = projections.iter().map(|one| (one.n, one.r)).collect();
    let (m, k, planes) = (input.m, input.k, input.planes);
    if input.bits != 0 && (projections.len() > 1 || input.seed == 0) {
        let what = "a mask is kept of one projection alone, whose input is dropped";
        return Err(Error::argument(what));
    }
    if backward
        && input.bits == 0
        && input.seed != 0
        && projections.iter().any(|one| one.weight != 0)
    {
        let what = "the product of a weight takes a mask that was kept, or none";
        return Err(Error::argument(what));
    }
    let layout = Layout::new(device, m, k, planes, &sizes, backward)?;
    Ok((input, projections, layout))
}

/// The largest sum of ranks, each padded to 16, that a group may have on this device.
#[pyfunction]
pub fn cuda_lora_max_columns(device: usize, planes: u64) -> Result<u64> {
    Ok(lora::max_columns(Device::get(device)?, planes))
}

/// Whether a base product [m, w] over `depth` of 16-bit types, W as `[depth, w]` with `down_rows`, can carry its LoRA term
/// on this device, and whether that is the faster way.
#[pyfunction]
pub fn cuda_lora_carries(
    device: usize,
    m: u64,
    w: u64,
    depth: u64,
    down_rows: bool,
) -> Result<(bool, bool)> {
    let device = Device::get(device)?;
    Ok((
        lora::takes(device, m, w, depth),
        lora::pays(device, m, w, depth, down_rows),
    ))
}

/// `out [m, w] = x [m, depth] · Wᵀ` of W `[w, depth]`, or with `down_rows` `x · W` of W `[depth, w]`, by Hopper's product
/// of ours. `together`: tiles of 256 rows that are taken together, 0 for the measured best.
#[pyfunction]
pub fn cuda_product(
    device: usize,
    stream: u64,
    dtype: &str,
    x: Address,
    w: Address,
    out: Address,
    sizes: (u64, u64, u64),
    down_rows: bool,
    together: u32,
) -> Result<()> {
    let device = Device::get(device)?;
    let dtype = Float16::try_from(DType::from_torch_name(dtype)?)?;
    let (m, columns, depth) = sizes;
    if !lora::takes(device, m, columns, depth) || [x, w, out].iter().any(|at| at % 16 != 0) {
        return Err(Error::argument(format!(
            "no product of ours on this device, or not of [{m}, {columns}] over {depth}: it takes multiples of 8 that \
             lie on 16 bytes, on Hopper"
        )));
    }
    let (rows, across) = if down_rows {
        (depth, columns)
    } else {
        (columns, depth)
    };
    let of = lora::Product {
        x: lora::Matrix::new(x, m, depth),
        w: lora::Matrix::new(w, rows, across),
    };
    let out = lora::Matrix::new(out, m, columns);
    // SAFETY: as above.
    unsafe { lora::product(device, stream, dtype, of, down_rows, out, together) }?;
    Ok(())
}

/// Bytes a row of the mask that forward keeps of a projection alone for its backward; None where that makes it again.
#[pyfunction]
pub fn cuda_lora_kept_bytes(
    device: usize,
    k: u64,
    planes: u64,
    hopper: &str,
) -> Result<Option<u64>> {
    Ok(lora::kept_bytes(
        Device::get(device)?,
        k,
        planes,
        used(hopper)?,
    ))
}

/// Bytes of workspace that a group needs; `sizes` are (n, r) of its projections.
#[pyfunction]
pub fn cuda_lora_workspace(
    device: usize,
    m: u64,
    k: u64,
    planes: u64,
    sizes: Vec<(u64, u64)>,
    backward: bool,
) -> Result<u64> {
    let device = Device::get(device)?;
    Ok(Layout::new(device, m, k, planes, &sizes, backward)?.bytes)
}

/// Writes H and every projection's LoRA term with its biases, and with its weight's product if that is given.
#[pyfunction]
pub fn cuda_lora_forward(
    device: usize,
    stream: u64,
    input: GroupInput,
    projections: Vec<GroupProjection>,
    workspace: Address,
) -> Result<()> {
    let device = Device::get(device)?;
    let (input, projections, layout) = group(device, &input, &projections, false)?;
    // SAFETY: `ferrotune.ops.cuda_lora` allocated what is written and checked what is read.
    unsafe { lora::forward(device, stream, &input, &projections, &layout, workspace) }?;
    Ok(())
}

/// Writes H and the outputs of gate and up, whose weights are given, and `activation(gate) * up` to `hidden`: of Hopper's
/// product, without biases, by a silu or gelu_tanh.
#[pyfunction]
pub fn cuda_lora_forward_gated(
    device: usize,
    stream: u64,
    input: GroupInput,
    projections: Vec<GroupProjection>,
    workspace: Address,
    hidden: Address,
    activation: &str,
) -> Result<()> {
    let device = Device::get(device)?;
    let activation = Activation::from_name(activation)?;
    let (input, projections, layout) = group(device, &input, &projections, false)?;
    let Ok(projections) = <[Projection; 2]>::try_from(projections) else {
        return Err(Error::argument("gate and up are two projections"));
    };
    let plain = |one: &Projection| {
        one.n == projections[0].n
            && one.weight != 0
            && one.bias == 0
            && one.lora_bias == 0
            && !one.weight_transposed
    };
    let taken = lora::takes(device, input.m.max(1), projections[0].n, input.k);
    if activation == Activation::Gelu || !taken || !projections.iter().all(plain) {
        return Err(Error::argument(
            "gate and up go by one product on Hopper, with weights [n, k] of one n, a multiple of 8 as k is, without \
             biases, and silu or gelu_tanh",
        ));
    }
    // SAFETY: `ferrotune.ops.cuda_lora` allocated what is written and checked what is read, here and below.
    unsafe {
        lora::forward_gated(
            device,
            stream,
            &input,
            &projections,
            &layout,
            workspace,
            hidden,
            activation,
        )
    }?;
    Ok(())
}

/// Writes the outputs of the projections whose weights are given, after `cuda_lora_forward` of the group with the same
/// workspace.
#[pyfunction]
pub fn cuda_lora_products(
    device: usize,
    stream: u64,
    input: GroupInput,
    projections: Vec<GroupProjection>,
    workspace: Address,
) -> Result<()> {
    let device = Device::get(device)?;
    let (input, projections, layout) = group(device, &input, &projections, false)?;
    // SAFETY: as above.
    unsafe { lora::products(device, stream, &input, &projections, &layout, workspace) }?;
    Ok(())
}

/// Writes the adapters' gradients that are asked for, and to `grad_x`, unless 0, the LoRA terms' part of x's gradient
/// with the products of the weights that are given.
#[pyfunction]
pub fn cuda_lora_backward(
    device: usize,
    stream: u64,
    input: GroupInput,
    projections: Vec<GroupProjection>,
    workspace: Address,
    grad_x: Address,
) -> Result<()> {
    let device = Device::get(device)?;
    let (input, projections, layout) = group(device, &input, &projections, true)?;
    // SAFETY: as above.
    unsafe {
        lora::backward(
            device,
            stream,
            &input,
            &projections,
            &layout,
            workspace,
            grad_x,
        )
    }?;
    Ok(())
}
