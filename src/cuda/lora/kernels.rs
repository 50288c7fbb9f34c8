//! The LoRA kernels' parameters, as `kernels/lora_*` lay them out, and their launches.

use super::super::device::Device;
use super::super::launch::{Address, Grid, Parameters, Stream};
use super::Float16;
use crate::error::Result;

/// Columns of a panel that are one projection's: ranks are padded to multiples of it.
pub const SEGMENT: u64 = 16;
/// Segments that one pass takes.
pub const MAX_SEGMENTS: usize = 4;
const THREADS: u32 = 256;
/// Elements by which a row of a tile in shared memory is longer than what it holds.
const PADDING: u64 = 8;

/// Sixteen columns of a panel.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Segment {
    /// Philox stream of the projection's dropout mask.
    pub stream: u64,
    /// Of its sums.
    pub scale: f32,
    /// round(p · 65536)
    pub threshold: u32,
    /// 1: another projection starts here.
    pub first: u32,
    pub reserved: u32,
}

/// Keys of the masks; seed 0: nothing is dropped.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Masks {
    pub seed: Address,
    /// Of the matrix that is masked.
    pub columns: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Down {
    pub x: Address,
    pub panel: Address,
    pub out: Address,
    pub masks: Masks,
    pub bits: Address,
    pub m: u64,
    pub k: u64,
    pub planes: u32,
    pub stages: u32,
    pub vectors: u32,
    pub reserved: u32,
    pub segments: [Segment; MAX_SEGMENTS],
}
const _: () = assert!(size_of::<Down>() == 176);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Down {}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct UpSegment {
    pub of: Segment,
    pub h_column: u32,
    pub panel_column: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Up {
    pub h: Address,
    pub panel: Address,
    pub out: Address,
    pub bias: Address,
    pub masks: Masks,
    pub m: u64,
    pub w: u64,
    pub h_stride: u32,
    pub panel_stride: u32,
    pub h_plane: u32,
    pub panel_plane: u32,
    pub planes: u32,
    pub parts: u32,
    pub rows_per_block: u32,
    pub vectors: u32,
    pub segments: [UpSegment; MAX_SEGMENTS],
}
const _: () = assert!(size_of::<Up>() == 224);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Up {}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Outer {
    pub x: Address,
    pub g: Address,
    pub partial: Address,
    pub masks: Masks,
    pub m: u64,
    pub w: u64,
    pub g_stride: u32,
    pub g_plane: u32,
    pub planes: u32,
    pub stages: u32,
    pub rows_per_range: u32,
    pub vectors: u32,
    pub early: u32,
    pub reserved: u32,
    pub segments: [Segment; MAX_SEGMENTS],
}
const _: () = assert!(size_of::<Outer>() == 184);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Outer {}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DownOuter {
    pub grad: Address,
    pub panel: Address,
    pub h: Address,
    pub g_partial: Address,
    pub panel_partial: Address,
    pub m: u64,
    pub n: u64,
    pub h_stride: u32,
    pub h_plane: u32,
    pub planes: u32,
    pub stages: u32,
    pub rows_per_range: u32,
    pub vectors: u32,
}
const _: () = assert!(size_of::<DownOuter>() == 80);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for DownOuter {}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PackJob {
    pub from: Address,
    pub more: Address,
    pub to: Address,
    pub rows: u64,
    pub row_stride: u64,
    pub column_stride: u64,
    pub columns: u32,
    pub parts: u32,
    pub to_stride: u32,
    pub to_column: u32,
    pub to_plane: u32,
    pub planes: u32,
    pub dtype: u32,
    pub more_dtype: u32,
    pub scale: f32,
    pub reserved: u32,
}
const _: () = assert!(size_of::<PackJob>() == 88);

const MAX_PACK_JOBS: usize = 12;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Pack {
    jobs: [PackJob; MAX_PACK_JOBS],
}
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Pack {}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ReduceJob {
    pub partial: Address,
    pub to: Address,
    pub rows: u64,
    pub row_stride: u64,
    pub column_stride: u64,
    pub ranges: u32,
    pub from_columns: u32,
    pub from_column: u32,
    pub columns: u32,
    pub dtype: u32,
    pub planes: u32,
    pub rows_first: u32,
    pub scale: f32,
}
const _: () = assert!(size_of::<ReduceJob>() == 72);

const MAX_REDUCE_JOBS: usize = 8;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Reduce {
    jobs: [ReduceJob; MAX_REDUCE_JOBS],
}
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for Reduce {}

/// Names of a kernel's variants: by type, then by segments.
pub type Variants = [[&'static str; MAX_SEGMENTS]; 2];

macro_rules! variants {
    ($name:literal) => {
        [
            [
                concat!($name, "_f16_r16"),
                concat!($name, "_f16_r32"),
                concat!($name, "_f16_r48"),
                concat!($name, "_f16_r64"),
            ],
            [
                concat!($name, "_bf16_r16"),
                concat!($name, "_bf16_r32"),
                concat!($name, "_bf16_r48"),
                concat!($name, "_bf16_r64"),
            ],
        ]
    };
}
pub(super) use variants;

const DOWN: Variants = variants!("lora_down");
const DOWN_FEW: Variants = variants!("lora_down_few");
const OUTER: Variants = variants!("lora_outer");
const DOWN_OUTER: Variants = variants!("lora_down_outer");
const DOWN_OUTER_SMALL: Variants = variants!("lora_down_outer_small");
const UP: [[&str; 2]; 2] = [
    ["lora_up_f16", "lora_up_bf16"],
    ["lora_up_onto_f16", "lora_up_onto_bf16"],
];
const PACK: [&str; 2] = ["lora_pack_f16", "lora_pack_bf16"];

/// Bytes of a row of `columns` elements in shared memory.
const fn row_bytes(columns: u64) -> u64 {
    2 * (columns + PADDING)
}

/// How many stages of `stage` bytes fit beside `fixed` ones in `budget`, 2 to `most`; None if not two.
fn stages(budget: u64, fixed: u64, stage: u64, most: u64) -> Option<u64> {
    let found = budget.saturating_sub(fixed) / stage;
    (found >= 2).then(|| found.min(most))
}

/// Shared memory of a block of which two share a multiprocessor, where the chip has so much.
fn shared_budget(device: &Device) -> u64 {
    u64::from(device.shared).min(112 << 10)
}

/// Into how many ranges of whole `tile`s rows are divided, and the rows of each, so that `columns` blocks for each range
/// fill `slots` places evenly; ranges cost a little, as their partial sums are added up.
pub fn divide(rows: u64, tile: u64, columns: u64, slots: u64) -> (u64, u64) {
    let steps = rows.div_ceil(tile).max(1);
    let cost = |ranges: u64| {
        let waves = (columns * ranges).div_ceil(slots);
        (waves * (steps.div_ceil(ranges) + 1)) as f64 * (1.0 + 0.01 * ranges as f64)
    };
    let best = (1..=steps.min(64)).min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
    let per_range = steps.div_ceil(best.unwrap_or(1));
    (steps.div_ceil(per_range), per_range * tile)
}

/// How [`outer`] divides its rows.
pub fn outer_ranges(device: &Device, m: u64, w: u64) -> (u64, u64) {
    divide(
        m,
        64,
        w.div_ceil(128),
        2 * u64::from(device.multiprocessors),
    )
}

/// How [`down_outer`] runs.
#[derive(Debug, Clone, Copy)]
pub struct DownOuterPlan {
    pub ranges: u64,
    pub rows_per_range: u64,
    /// Blocks along the columns: partial sums of G.
    pub column_blocks: u64,
    stages: u64,
    shared: u64,
    small: bool,
}

impl DownOuterPlan {
    /// None where a panel of this width does not fit the chip's shared memory.
    pub fn new(device: &Device, m: u64, n: u64, columns: u64, planes: u64) -> Option<Self> {
        let limit = u64::from(device.shared);
        let plan = |tile_columns: u64, tile_rows: u64, small: bool, budget: u64, per_sm: u64| {
            let panel_row = row_bytes(columns * planes);
            let sharing = 8 / (tile_rows / 16) - 1;
            let fixed = tile_columns * panel_row + 2 * sharing * tile_rows * columns * 4;
            let stage = tile_rows * (row_bytes(tile_columns) + panel_row);
            let stages = stages(budget, fixed, stage, 4)?;
            let column_blocks = n.div_ceil(tile_columns);
            let slots = per_sm * u64::from(device.multiprocessors);
            let (ranges, rows_per_range) = divide(m, tile_rows, column_blocks, slots);
            Some(Self {
                ranges,
                rows_per_range,
                column_blocks,
                stages,
                shared: fixed + stages * stage,
                small,
            })
        };
        plan(256, 64, false, shared_budget(device), 2)
            .or_else(|| plan(256, 64, false, limit, 1))
            .or_else(|| plan(128, 32, true, limit, 1))
    }
}

fn launch_grid(blocks: (u64, u64), shared: u64) -> Grid {
    Grid {
        blocks: (blocks.0 as u32, blocks.1 as u32, 1),
        threads: THREADS,
        shared: shared as u32,
    }
}

/// # Safety
/// The addresses are `device`'s, laid out as `kernels/lora_down.cuh` says, here and below.
pub unsafe fn down(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    segments: usize,
    mut p: Down,
) -> Result<()> {
    let few = p.m.div_ceil(64) < u64::from(device.multiprocessors) * 3 / 4;
    let depth = 128;
    let (variants, rows) = if few {
        (DOWN_FEW, 16)
    } else {
        (DOWN, if segments <= 2 { 32 } else { 64 })
    };
    let panel_row = row_bytes(SEGMENT * segments as u64 * u64::from(p.planes));
    let stage = rows * row_bytes(depth) + depth * panel_row;
    let blocks = p.m.div_ceil(rows);
    let budget = if blocks <= u64::from(device.multiprocessors) {
        u64::from(device.shared)
    } else {
        shared_budget(device)
    };
    let stages = stages(budget, 0, stage, 6).unwrap_or(2);
    p.stages = stages as u32;
    let grid = launch_grid((blocks, 1), stages * stage);
    let kernel = variants[dtype as usize][segments - 1];
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &p) }?)
}

/// # Safety
/// As [`down`], for `kernels/lora_up.cuh`; with `onto`, `p.out` is added to.
pub unsafe fn up(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    onto: bool,
    mut p: Up,
) -> Result<()> {
    let column_blocks = p.w.div_ceil(128);
    let steps = p.m.div_ceil(64);
    let wanted = 8 * u64::from(device.multiprocessors);
    let per_block = (steps * column_blocks / wanted).clamp(1, steps);
    p.rows_per_block = (per_block * 64) as u32;
    let row = row_bytes(SEGMENT * u64::from(p.parts * p.planes));
    let grid = launch_grid((column_blocks, steps.div_ceil(per_block)), 256 * row);
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(UP[usize::from(onto)][dtype as usize], grid, stream, &p) }?)
}

/// # Safety
/// As [`down`], for `kernels/lora_outer.cuh`.
pub unsafe fn outer(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    segments: usize,
    mut p: Outer,
) -> Result<()> {
    let (ranges, rows) = outer_ranges(device, p.m, p.w);
    p.rows_per_range = rows as u32;
    let g_row = row_bytes(SEGMENT * segments as u64 * u64::from(p.planes));
    let stage = 64 * (row_bytes(128) + g_row);
    let stages = stages(shared_budget(device), 0, stage, 6).unwrap_or(2);
    p.stages = stages as u32;
    let grid = launch_grid((p.w.div_ceil(128), ranges), stages * stage);
    let kernel = OUTER[dtype as usize][segments - 1];
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &p) }?)
}

/// # Safety
/// As [`down`], for `kernels/lora_down_outer.cuh`.
pub unsafe fn down_outer(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    segments: usize,
    plan: &DownOuterPlan,
    mut p: DownOuter,
) -> Result<()> {
    p.stages = plan.stages as u32;
    p.rows_per_range = plan.rows_per_range as u32;
    let grid = launch_grid((plan.column_blocks, plan.ranges), plan.shared);
    let variants = if plan.small {
        DOWN_OUTER_SMALL
    } else {
        DOWN_OUTER
    };
    let kernel = variants[dtype as usize][segments - 1];
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(kernel, grid, stream, &p) }?)
}

/// A thread for each of the largest job's items, but no more than fill the device a few times.
fn jobs_grid(device: &Device, items: u64, jobs: usize) -> Grid {
    let blocks = items.div_ceil(u64::from(THREADS));
    let most = 16 * u64::from(device.multiprocessors);
    launch_grid((blocks.clamp(1, most), jobs as u64), 0)
}

/// # Safety
/// As [`down`], for `kernels/lora_pack.cu`.
pub unsafe fn pack(
    device: &Device,
    stream: Stream,
    dtype: Float16,
    jobs: &[PackJob],
) -> Result<()> {
    if jobs.is_empty() {
        return Ok(());
    }
    let mut p = Pack {
        jobs: [PackJob::default(); MAX_PACK_JOBS],
    };
    p.jobs[..jobs.len()].copy_from_slice(jobs);
    let items = jobs
        .iter()
        .map(|job| job.rows * 2 * u64::from(job.parts.max(1)));
    let grid = jobs_grid(device, items.max().unwrap_or(0), jobs.len());
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch(PACK[dtype as usize], grid, stream, &p) }?)
}

/// # Safety
/// As [`down`], for `kernels/lora_reduce.cu`.
pub unsafe fn reduce(device: &Device, stream: Stream, jobs: &[ReduceJob]) -> Result<()> {
    if jobs.is_empty() {
        return Ok(());
    }
    let mut p = Reduce {
        jobs: [ReduceJob::default(); MAX_REDUCE_JOBS],
    };
    p.jobs[..jobs.len()].copy_from_slice(jobs);
    let items = jobs
        .iter()
        .map(|job| job.rows * u64::from(job.columns.div_ceil(4)));
    let grid = jobs_grid(device, items.max().unwrap_or(0), jobs.len());
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch("lora_reduce", grid, stream, &p) }?)
}
