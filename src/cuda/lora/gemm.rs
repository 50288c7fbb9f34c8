//! Hopper's product that carries a LoRA term (`kernels/gemm_sm90a.cuh`): its parameters and its launch.

use cudarc::driver::sys;

use super::super::device::Device;
use super::super::error::during;
use super::super::glu::Activation;
use super::super::launch::{Address, Grid, Parameters, Stream};
use super::kernels::MAX_SEGMENTS;
use super::{Float16, tuned};
use crate::error::Result;

/// Projections whose products one launch adds up.
pub const MAX_PROJECTIONS: usize = 4;
/// Chunks of sixteen columns that one launch takes: three products of values' parts for each segment of a pass.
pub const MAX_CHUNKS: usize = 3 * MAX_SEGMENTS;
/// Of a cluster of two blocks.
const TILE: u64 = 256;
/// Tiles down that are taken together where nothing was measured.
const TOGETHER: u32 = 8;
const THREADS: u32 = 384;
/// Stages, boxes of the output, masks, barriers, and what aligns them to 1024 bytes.
const SHARED: u32 = 4 * 49_152 + 16 * 1024 + 2 * 4096 + 64 + 32 + 1024;

/// A `CUtensorMap`: where a matrix lies and which boxes of it are copied.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Default)]
pub struct TensorMap([u64; 16]);

/// How a box's rows, of so many bytes, are mixed in shared memory.
#[derive(Debug, Clone, Copy)]
pub enum Swizzle {
    Bytes32,
    Bytes64,
    Bytes128,
}

/// Sixteen columns of H times sixteen columns of a panel `[w, ..]`, or sixteen rows of an adapter `[r, w]` as it lies.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Chunk {
    pub h_column: u16,
    pub panel: u8,
    /// The first of the sixteen.
    pub place: u8,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Gemm {
    x: [TensorMap; MAX_PROJECTIONS],
    w: [TensorMap; MAX_PROJECTIONS],
    panel: [TensorMap; MAX_PROJECTIONS],
    h: TensorMap,
    out: TensorMap,
    up: TensorMap,
    hidden: TensorMap,
    bias: Address,
    bits: Address,
    m: u64,
    w_columns: u64,
    steps: [u32; MAX_PROJECTIONS],
    projections: u32,
    lower: u32,
    chunks: u32,
    rows_together: u32,
    adapters: u32,
    activation: u32,
    chunk: [Chunk; MAX_CHUNKS],
}
const _: () = assert!(size_of::<Gemm>() == 2176);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Gemm {}

/// A matrix of 16-bit elements, row-major, contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    pub address: Address,
    pub rows: u64,
    pub columns: u64,
}

impl Matrix {
    pub fn new(address: Address, rows: u64, columns: u64) -> Self {
        Self {
            address,
            rows,
            columns,
        }
    }

    /// How boxes of so many columns and rows are copied; what lies outside the matrix is zero.
    pub fn map(
        self,
        dtype: Float16,
        columns: u32,
        rows: u32,
        swizzle: Swizzle,
    ) -> Result<TensorMap> {
        let mut map = TensorMap::default();
        let kind = match dtype {
            Float16::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Float16::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let swizzle = match swizzle {
            Swizzle::Bytes32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let sizes = [self.columns, self.rows];
        let strides = [2 * self.columns];
        // SAFETY: writes the 128 bytes of `map` from the arrays, each of the rank's length.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                kind,
                2,
                self.address as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                [columns, rows].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(during("describing a matrix to the device"))?;
        Ok(map)
    }
}

/// A frozen weight's product with what shares its rows.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// `[m, depth]`
    pub x: Matrix,
    /// `[w, depth]`, or `[depth, w]`.
    pub w: Matrix,
}

/// What is written beside `out` where that is a gate: of the same shape.
#[derive(Debug, Clone, Copy)]
pub struct Gated {
    pub up: Matrix,
    /// `activation(out) · up`, of both as they are written.
    pub hidden: Matrix,
    /// Not [`Activation::Gelu`].
    pub activation: Activation,
}

/// `out = mask(h · panelᵀ) + Σ x·W + bias`. Gated: the first product's and panel's are `out`, the second ones' `up`; W are
/// `[w, depth]`, of one x, and there are no masks and no bias.
#[derive(Debug)]
pub struct Carried<'a> {
    /// At most [`MAX_PROJECTIONS`]; every W is laid out alike.
    pub products: &'a [Product],
    /// W are `[depth, w]`.
    pub down_rows: bool,
    pub h: Matrix,
    /// At most [`MAX_PROJECTIONS`].
    pub panels: &'a [Matrix],
    /// Panels are adapters `[r, w]`.
    pub adapters: bool,
    /// At most [`MAX_CHUNKS`]: first those of values' lower parts.
    pub chunks: &'a [Chunk],
    pub lower: usize,
    /// The mask, as `kernels/common/lora.cuh` says it is kept, or 0.
    pub bits: Address,
    /// f32 `[w]`, or 0.
    pub bias: Address,
    pub out: Matrix,
    pub gated: Option<Gated>,
    /// Tiles of 256 rows that are taken together; 0: as was measured to be best.
    pub together: u32,
}

/// Whether a product `[m, w]` over `depth` can run here: on Hopper, where rows start on 16 bytes.
pub fn takes(device: &Device, m: u64, w: u64, depth: u64) -> bool {
    device.capability == (9, 0)
        && w.is_multiple_of(8)
        && depth.is_multiple_of(8)
        && (1..1 << 31).contains(&m.max(w).max(depth))
        && m.min(w).min(depth) > 0
}

/// Whether that is expected to be faster than cuBLAS beside the LoRA term's own kernel: by what was measured of the
/// shape, or because its tiles come in whole waves, while cuBLAS has smaller ones for what does not fill the device. The
/// rates are an H100's; only their ratios count.
pub fn pays(device: &Device, m: u64, w: u64, depth: u64, down_rows: bool) -> bool {
    const OURS: f64 = 790e6; // operations a microsecond
    const CUBLAS: f64 = 760e6;
    const BYTES: f64 = 2.2e6; // a microsecond, of the term that cuBLAS accumulates onto
    const LAUNCH: f64 = 3.0; // microseconds
    let operations = (2 * m * w * depth) as f64;
    let (ours, theirs) = if let Some(one) = tuned::found(m, w, depth, down_rows) {
        (f64::from(one.ours), f64::from(one.cublas))
    } else {
        let clusters = u64::from(device.multiprocessors) / 2;
        let waves = (m.div_ceil(TILE) * w.div_ceil(TILE)).div_ceil(clusters);
        let tiled = (waves * clusters * 2 * TILE * TILE * depth) as f64;
        (tiled / OURS, operations / CUBLAS)
    };
    ours < theirs + (2 * m * w) as f64 / BYTES + LAUNCH
}

/// What is multiplied for columns of H and of the panel, 16 each, whose values' parts lie `h_plane` and `panel_plane`
/// apart: the products that f32 keeps, and how many of them are of lower parts.
pub fn chunks(
    planes: u64,
    columns: &[(u64, u64)],
    h_plane: u64,
    panel_plane: u64,
) -> (Vec<Chunk>, usize) {
    let mut found = Vec::with_capacity(3 * columns.len());
    let mut add = |h_part: u64, panel_part: u64| {
        found.extend(columns.iter().map(|&(h, panel)| Chunk {
            h_column: (h + h_part * h_plane) as u16,
            panel: 0,
            place: (panel + panel_part * panel_plane) as u8,
        }));
    };
    if planes > 1 {
        add(0, 1);
        add(1, 0);
    }
    add(0, 0);
    let lower = found.len() - columns.len();
    (found, lower)
}

const GATED: [&str; 2] = ["gemm_gated_f16", "gemm_gated_bf16"];
const KERNELS: [[&str; 2]; 2] = [
    ["gemm_nt_f16", "gemm_nt_bf16"],
    ["gemm_nn_f16", "gemm_nn_bf16"],
];

/// # Safety
/// [`takes`] said yes for every product; the addresses are `device`'s, aligned to 16 bytes (`bias`: 8), and hold what
/// [`Carried`] says.
///
/// # Errors
/// A launch that failed.
pub unsafe fn launch(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    carried: &Carried,
) -> Result<()> {
    let (rows, columns) = (carried.out.rows, carried.out.columns);
    let each = |one: &Product| one.x.columns;
    let depth = match carried.gated {
        Some(_) => carried.products.first().map_or(0, each),
        None => carried.products.iter().map(each).sum(),
    };
    let together = match carried.together {
        0 => tuned::found(rows, columns, depth, carried.down_rows)
            .map_or(TOGETHER, |one| one.together),
        given => given,
    };
    let mut p = Gemm {
        x: [TensorMap::default(); MAX_PROJECTIONS],
        w: [TensorMap::default(); MAX_PROJECTIONS],
        h: TensorMap::default(),
        panel: [TensorMap::default(); MAX_PROJECTIONS],
        out: carried.out.map(dtype, 32, 16, Swizzle::Bytes64)?,
        up: TensorMap::default(),
        hidden: TensorMap::default(),
        bias: carried.bias,
        bits: carried.bits,
        m: carried.out.rows,
        w_columns: carried.out.columns,
        steps: [0; MAX_PROJECTIONS],
        projections: carried.products.len() as u32,
        lower: match dtype {
            Float16::F16 => carried.lower as u32,
            Float16::BF16 => 0, // its parts are not scaled: one sum
        },
        chunks: carried.chunks.len() as u32,
        rows_together: together,
        adapters: u32::from(carried.adapters),
        activation: 0,
        chunk: [Chunk::default(); MAX_CHUNKS],
    };
    let w_rows = if carried.down_rows { 64 } else { 128 };
    for (i, product) in carried.products.iter().enumerate() {
        p.x[i] = product.x.map(dtype, 64, 128, Swizzle::Bytes128)?;
        p.w[i] = product.w.map(dtype, 64, w_rows, Swizzle::Bytes128)?;
        p.steps[i] = product.x.columns.div_ceil(64) as u32;
    }
    if !carried.chunks.is_empty() {
        p.h = carried.h.map(dtype, 16, 128, Swizzle::Bytes32)?;
        for (map, panel) in p.panel.iter_mut().zip(carried.panels) {
            *map = if carried.adapters {
                panel.map(dtype, 64, 16, Swizzle::Bytes128)?
            } else {
                panel.map(dtype, 16, 128, Swizzle::Bytes32)?
            };
        }
        p.chunk[..carried.chunks.len()].copy_from_slice(carried.chunks);
    }
    let mut kernel = KERNELS[usize::from(carried.down_rows)][dtype as usize];
    let mut across = TILE;
    if let Some(gated) = carried.gated {
        p.up = gated.up.map(dtype, 32, 16, Swizzle::Bytes64)?;
        p.hidden = gated.hidden.map(dtype, 32, 16, Swizzle::Bytes64)?;
        p.activation = gated.activation as u32;
        p.projections = 1; // of x
        kernel = GATED[dtype as usize];
        across = TILE / 2;
    }
    let tiles = p.m.div_ceil(TILE) * p.w_columns.div_ceil(across);
    let clusters = tiles.min(u64::from(device.multiprocessors) / 2);
    let grid = Grid {
        blocks: (2 * clusters as u32, 1, 1),
        threads: THREADS,
        shared: SHARED,
    };
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &p) }?)
}

/// `out = x Wᵀ`, or `x W`, alone.
///
/// # Safety
/// As [`launch`].
///
/// # Errors
/// A launch that failed.
pub unsafe fn product(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    product: Product,
    down_rows: bool,
    out: Matrix,
    together: u32,
) -> Result<()> {
    let _context = device.enter()?; // matrices are described to the current one's device
    let nothing = Matrix::new(0, 0, 0);
    let carried = Carried {
        products: &[product],
        down_rows,
        h: nothing,
        panels: &[],
        adapters: false,
        chunks: &[],
        lower: 0,
        bits: 0,
        bias: 0,
        out,
        gated: None,
        together,
    };
    // SAFETY: the caller's promise.
    unsafe { launch(device, stream, dtype, &carried) }
}
