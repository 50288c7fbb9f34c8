//! Gated linear units: an activation of one tensor times another.

use super::device::Device;
use super::error::Result;
use super::launch::{Address, Grid, Parameters, Stream, aligned};
use crate::dtype::DType;
use crate::error::Error;

const THREADS: u32 = 256;
/// Vectors of 16 bytes that a thread takes.
const VECTORS: u32 = 2;

/// `kernels/glu.cuh`'s `Activation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    GeluTanh,
    Gelu,
}

impl Activation {
    pub fn from_name(name: &str) -> std::result::Result<Self, Error> {
        match name {
            "silu" => Ok(Self::Silu),
            "gelu_tanh" => Ok(Self::GeluTanh),
            "gelu" => Ok(Self::Gelu),
            _ => Err(Error::unsupported(format!(
                "activation '{name}' is not supported; use silu, gelu_tanh or gelu"
            ))),
        }
    }
}

/// `gate` and `up`, `[rows, columns]`, whose rows lie `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Operands {
    pub gate: Address,
    pub up: Address,
    pub rows: u64,
    pub columns: u32,
    pub stride: u64,
    pub dtype: DType,
    pub activation: Activation,
}

/// `kernels/glu.cuh`'s `Glu`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Glu {
    gate: Address,
    up: Address,
    out: Address,
    grad: Address,
    grad_gate: Address,
    grad_up: Address,
    stride: u64,
    grad_stride: u64,
    columns: u32,
    tiles: u32,
    activation: u32,
    vectors: u32,
}

// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Glu {}
const _: () = assert!(size_of::<Glu>() == 80);

/// Writes `activation(gate) * up` to `out`, `[rows, columns]`, contiguous.
///
/// # Safety
/// The addresses are `device`'s and hold, or have room for, what [`Operands`] says; `out` overlaps neither operand.
///
/// # Errors
/// The launch failed.
pub unsafe fn forward(
    device: &Device,
    stream: Stream,
    given: &Operands,
    out: Address,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { launch(device, stream, given, out, 0, (0, 0), given.stride) }
}

/// Writes the gradients of both operands, their rows `grad_stride` elements apart, and `out` again unless it is 0.
///
/// # Safety
/// As [`forward`]; `grad` is that of `out`, contiguous. A gradient may lie where `grad` does, row on row.
///
/// # Errors
/// The launch failed.
pub unsafe fn backward(
    device: &Device,
    stream: Stream,
    given: &Operands,
    grad: Address,
    out: Address,
    grads: (Address, Address),
    grad_stride: u64,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { launch(device, stream, given, out, grad, grads, grad_stride) }
}

unsafe fn launch(
    device: &Device,
    stream: Stream,
    given: &Operands,
    out: Address,
    grad: Address,
    grads: (Address, Address),
    grad_stride: u64,
) -> Result<()> {
    if given.rows == 0 || given.columns == 0 {
        return Ok(());
    }
    let lanes = 16 / given.dtype.size() as u32;
    let size = given.dtype.size() as u64;
    let tiles = given.columns.div_ceil(THREADS * VECTORS * lanes);
    let parameters = Glu {
        gate: given.gate,
        up: given.up,
        out,
        grad,
        grad_gate: grads.0,
        grad_up: grads.1,
        stride: given.stride,
        grad_stride,
        columns: given.columns,
        tiles,
        activation: given.activation as u32,
        vectors: u32::from(aligned(&[
            given.gate,
            given.up,
            out,
            grad,
            grads.0,
            grads.1,
            given.stride * size,
            grad_stride * size,
            u64::from(given.columns) * size,
        ])),
    };
    let kernel = match (given.dtype, grad == 0) {
        (DType::F32, true) => "glu_f32",
        (DType::F16, true) => "glu_f16",
        (DType::BF16, true) => "glu_bf16",
        (DType::F32, false) => "glu_backward_f32",
        (DType::F16, false) => "glu_backward_f16",
        (DType::BF16, false) => "glu_backward_bf16",
    };
    let grid = Grid::cover(given.rows * u64::from(tiles), 1, THREADS);
    // SAFETY: the caller's promise.
    unsafe { device.launch(kernel, grid, stream, &parameters) }
}
