//! Few rows by a 4-bit weight that is dequantised within the product (`kernels/linear_few.cuh`, `linear_small.cuh`):
//! its parameters, how it is divided among blocks, its launch.

use super::super::device::Device;
use super::super::launch::{Address, Grid, Parameters, Stream};
use super::super::quant::{Quant4bit, Quantized};
use super::kernels::SEGMENT;
use super::{Float16, type_number};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Rows of x that one launch takes.
pub const MOST_ROWS: u64 = 64;
const MOST_RANK: u64 = 64;
/// Most tokens of a kernel's variants.
const TOKENS: [u64; 4] = [8, 16, 32, 64];
/// Blocks of a variant that a multiprocessor has registers for.
const BLOCKS: [u64; 4] = [2, 2, 1, 1];
const THREADS: u32 = 256;
const WARPS: u64 = 8;
/// The first variant, which has a kernel of its own.
const FEW_THREADS: u32 = 512;
const FEW_WARPS: u64 = 16;
const FEW_RANK_WARPS: u64 = 8;
const TILE_ROWS: u64 = 16;
/// Rows and depth of what a warp multiplies at a time.
const UNIT_ROWS: u64 = 32;
const UNIT_DEPTH: u64 = 128;
/// Bytes of the table of pairs, and of 16 x 8 sums.
const PAIRS: u64 = 256 * 256;
const FRAGMENT: u64 = 512;
/// Sums that the table has room for.
const GAPS: u64 = 64;
/// What a block has beside its dynamic shared memory.
const STATIC: u64 = 2048;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct LinearSmall {
    quant: Quant4bit,
    x: Address,
    y: Address,
    bias: Address,
    lora_bias: Address,
    lora_a: Address,
    lora_b: Address,
    h: Address,
    h_stride: u64,
    m: u32,
    k: u32,
    n: u32,
    r: u32,
    h_plane: u32,
    wide: u32,
    lora_bias_type: u32,
    scale: f32,
    splits: u32,
    k_warps: u32,
    groups: u32,
    block_k: u32,
    stage_k: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<LinearSmall>() == 176);
// SAFETY: the kernel's structure, field for field.
unsafe impl Parameters for LinearSmall {}

/// What is multiplied; addresses are 0 where there is nothing.
#[derive(Debug, Clone, Copy)]
pub struct Small {
    pub sizes: Sizes,
    pub dtype: Float16,
    /// `[m, k]`, aligned to 16 bytes.
    pub x: Address,
    /// `[n, k]`, aligned to 16 bytes.
    pub weight: Quantized,
    /// `[m, n]`
    pub y: Address,
    /// `[n]` in x's type, and in `lora_bias_dtype`.
    pub bias: Address,
    pub lora_bias: Address,
    pub lora_bias_dtype: DType,
    /// `[r, k]`, aligned to 16 bytes, and `[n, r]`.
    pub lora_a: Address,
    pub lora_b: Address,
    pub scaling: f32,
    /// `[m, h_stride]` at the projection's columns, the parts of a value `h_plane` apart.
    pub h: Address,
    pub h_stride: u64,
    pub h_plane: u64,
}

#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub m: u64,
    pub n: u64,
    pub k: u64,
    /// 0 without an adapter.
    pub r: u64,
    /// Parts of an adapter's value: 1, or 3 where it is f32.
    pub planes: u64,
}

/// How the work is divided: blocks of a cluster and warps of a block share the depth; a block has so many groups of rows.
/// With few tokens the blocks of a cluster share H's depth alone, and a group is a row tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Division {
    pub splits: u64,
    pub k_warps: u64,
    pub groups: u64,
}

/// A division's consequences.
#[derive(Debug, Clone, Copy)]
struct Placed {
    block_k: u64,
    stage_k: u64,
    shared: u64,
    blocks: u64,
    per_multiprocessor: u64,
    threads: u32,
}

impl Placed {
    fn grid(&self) -> Grid {
        Grid {
            blocks: (self.blocks as u32, 1, 1),
            threads: self.threads,
            shared: self.shared as u32,
        }
    }
}

impl Sizes {
    fn take(&self) -> bool {
        (1..=MOST_ROWS).contains(&self.m)
            && self.n > 0
            && self.k > 0
            && self.k.is_multiple_of(32)
            && self.r <= MOST_RANK
            && matches!(self.planes, 1 | 3)
            && self.n.max(self.k) < 1 << 31
            && self.n * (self.k / 32) < 1 << 32
    }

    fn rank_tiles(&self) -> u64 {
        self.r.div_ceil(SEGMENT)
    }

    /// The first whose tokens suffice; of few tokens all the depth is in shared memory.
    fn variant(&self, device: &Device) -> usize {
        let found = TOKENS.iter().position(|&most| self.m <= most).unwrap_or(0);
        if found == 0 && self.few(device, 8, 1).is_none() {
            1
        } else {
            found
        }
    }

    fn few(&self, device: &Device, splits: u64, groups: u64) -> Option<Placed> {
        let block_k = self
            .k
            .next_multiple_of(UNIT_DEPTH)
            .max(UNIT_DEPTH * FEW_WARPS);
        let mut shared = PAIRS + 2 * self.m * block_k;
        if self.r > 0 {
            shared += splits * FEW_RANK_WARPS * FRAGMENT + 2 * TOKENS[0] * self.h_width();
        }
        (shared + STATIC <= u64::from(device.shared)).then_some(Placed {
            block_k,
            stage_k: self.k.div_ceil(UNIT_DEPTH * splits) * UNIT_DEPTH,
            shared,
            blocks: self.n.div_ceil(TILE_ROWS * groups).next_multiple_of(splits),
            per_multiprocessor: 1,
            threads: FEW_THREADS,
        })
    }

    /// Elements of a row of the tile of H.
    fn h_width(&self) -> u64 {
        self.planes * SEGMENT * self.rank_tiles() + 8
    }

    /// The same as [`division`], of few tokens.
    fn few_division(&self, device: &Device, kernel: &str) -> Option<Division> {
        const UNIT: u64 = 80; // cycles of a unit of a row tile, bound by shared memory
        const BYTES: u64 = 40; // of the adapter, a cycle
        let tiles = self.n.div_ceil(TILE_ROWS);
        let most = if self.r > 0 { 3 } else { 0 };
        let all = (0..=most).rev().filter_map(|log| {
            let splits = 1 << log;
            let places = if splits > 1 {
                let one = self.few(device, splits, 1)?.grid();
                u64::from(device.clusters(kernel, one, splits as u32).ok()?) * splits
            } else {
                u64::from(device.multiprocessors)
            };
            let groups = tiles.div_ceil(places.min(tiles.next_multiple_of(splits)).max(1));
            let placed = self.few(device, splits, groups)?;
            let rows =
                placed.blocks.div_ceil(places.max(1)) * groups * placed.block_k / UNIT_DEPTH * UNIT;
            let adapter = 2 * self.planes * SEGMENT * self.rank_tiles() * placed.stage_k / BYTES;
            (places > 0).then_some((
                rows + adapter,
                Division {
                    splits,
                    k_warps: 1,
                    groups,
                },
            ))
        });
        all.min_by_key(|one| one.0).map(|found| found.1)
    }

    fn place(&self, device: &Device, division: Division) -> Option<Placed> {
        let Division {
            splits,
            k_warps,
            groups,
        } = division;
        let variant = self.variant(device);
        if variant == 0 {
            return self.few(device, splits, groups).filter(|_| k_warps == 1);
        }
        let depth = UNIT_DEPTH * k_warps;
        let block_k = self.k.div_ceil(depth * splits) * depth;
        if (splits - 1) * block_k >= self.k {
            return None;
        }
        let tokens = TOKENS[variant];
        let tiles = tokens / 8;
        let mut fixed = PAIRS;
        if self.r > 0 {
            fixed += WARPS * tiles * FRAGMENT + 2 * tokens * self.h_width();
        }
        let sums = WARPS * (UNIT_ROWS / 16) * groups * tiles;
        fixed += sums.saturating_sub(GAPS) * FRAGMENT;
        let limit = u64::from(device.shared).saturating_sub(STATIC);
        // A multiprocessor has 1 KiB more than the most of a block, and takes as much for each.
        let fits = |blocks: u64| (u64::from(device.shared) + 1024) / blocks - 1024 - STATIC;
        let row = 2 * tokens;
        let whole = fixed + row * block_k;
        let (stage_k, shared) = if whole <= limit {
            (block_k, whole)
        } else {
            if groups > 1 {
                return None;
            }
            let step = 2 * depth;
            let stage_k = limit.checked_sub(fixed)? / (2 * row) / step * step;
            if stage_k == 0 {
                return None;
            }
            let stage_k = stage_k.min(1024.max(step));
            (stage_k, fixed + 2 * row * stage_k)
        };
        let most = BLOCKS[variant];
        let rows = WARPS / k_warps * UNIT_ROWS * groups;
        Some(Placed {
            block_k,
            stage_k,
            shared,
            blocks: self.n.div_ceil(rows) * splits,
            per_multiprocessor: if shared <= fits(most) { most } else { 1 },
            threads: THREADS,
        })
    }

    /// Clock cycles, roughly: only comparisons of divisions count.
    fn cost(&self, device: &Device, kernel: &str, division: Division, placed: &Placed) -> f64 {
        const ISSUE: f64 = 530.0; // of a unit with few tokens
        const LATENCY: f64 = 1200.0; // of a unit, where few warps run
        const START: f64 = 2500.0;
        const ONE_BLOCK: f64 = 0.8; // of what more than one gets out of a multiprocessor
        let tiles = TOKENS[self.variant(device)] / 8;
        let multiprocessors = u64::from(device.multiprocessors);
        let units = (division.groups * placed.block_k / (UNIT_DEPTH * division.k_warps)) as f64;
        let issue = ISSUE + 60.0 * tiles as f64;
        let ranks = self.rank_tiles() as f64 * placed.block_k as f64 / (UNIT_DEPTH * WARPS) as f64;
        let rows = (self.m * placed.block_k * 2) as f64 / 48.0;
        let start = START + if division.splits > 1 { 700.0 } else { 0.0 };
        let wave = |blocks: u64| {
            let each = blocks.div_ceil(multiprocessors) as f64;
            let busy = if each > 1.0 { 1.0 } else { ONE_BLOCK };
            let work = (each * WARPS as f64 / 4.0 * issue / busy).max(LATENCY) * units;
            let ranks = ranks * (150.0 + 60.0 * tiles as f64) * self.planes as f64 * each * 2.0;
            start + work + ranks + rows * each
        };
        let places = if division.splits > 1 {
            // Clusters are of one of the chip's groups of multiprocessors, which they may not fill.
            let cluster = division.splits as u32;
            match device.clusters(kernel, placed.grid(), cluster) {
                Ok(clusters) if clusters > 0 => u64::from(clusters) * division.splits,
                _ => return f64::INFINITY,
            }
        } else {
            multiprocessors * placed.per_multiprocessor
        };
        let (full, last) = (placed.blocks / places, placed.blocks % places);
        full as f64 * wave(places) + if last > 0 { wave(last) } else { 0.0 }
    }
}

/// How a product of these sizes is divided here; None where the kernel does not take it, and on any chip but Hopper.
pub fn division(device: &Device, sizes: &Sizes) -> Option<Division> {
    if device.capability != (9, 0) || !sizes.take() {
        return None;
    }
    let variant = sizes.variant(device);
    let kernel = KERNELS[1][1][variant]; // all of so many tokens take the same
    if variant == 0 {
        return sizes.few_division(device, kernel);
    }
    let all = (0..4).flat_map(|splits| {
        (0..4).flat_map(move |k_warps| {
            (1..=8).map(move |groups| Division {
                splits: 1 << splits,
                k_warps: 1 << k_warps,
                groups,
            })
        })
    });
    all.filter_map(|one| {
        Some((
            one,
            sizes.cost(device, kernel, one, &sizes.place(device, one)?),
        ))
    })
    .min_by(|one, other| one.1.total_cmp(&other.1))
    .map(|found| found.0)
}

const KERNELS: [[[&str; 4]; 2]; 2] = [
    [
        [
            "linear_small_f16_8",
            "linear_small_f16_16",
            "linear_small_f16_32",
            "linear_small_f16_64",
        ],
        [
            "linear_small_bf16_8",
            "linear_small_bf16_16",
            "linear_small_bf16_32",
            "linear_small_bf16_64",
        ],
    ],
    [
        [
            "linear_small_nested_f16_8",
            "linear_small_nested_f16_16",
            "linear_small_nested_f16_32",
            "linear_small_nested_f16_64",
        ],
        [
            "linear_small_nested_bf16_8",
            "linear_small_nested_bf16_16",
            "linear_small_nested_bf16_32",
            "linear_small_nested_bf16_64",
        ],
    ],
];

/// Writes y, and H unless `h` is 0.
///
/// # Safety
/// The addresses are `device`'s and hold, or have room for, what [`Small`] says.
///
/// # Errors
/// Sizes or a division that the kernel does not take; a launch that failed.
pub unsafe fn launch(
    device: &Device,
    stream: Stream,
    small: &Small,
    division: Division,
) -> Result<()> {
    let sizes = &small.sizes;
    let powers = [division.splits, division.k_warps]
        .iter()
        .all(|count| count.is_power_of_two() && *count <= 8);
    let placed = (sizes.take() && powers && (1..=1 << 24).contains(&division.groups))
        .then(|| sizes.place(device, division))
        .flatten()
        .filter(|placed| placed.shared <= u64::from(device.shared))
        .ok_or_else(|| Error::unsupported("no product of few rows is divided so"))?;
    let p = LinearSmall {
        quant: Quant4bit::new(&small.weight)?,
        x: small.x,
        y: small.y,
        bias: small.bias,
        lora_bias: small.lora_bias,
        lora_a: small.lora_a,
        lora_b: small.lora_b,
        h: small.h,
        h_stride: small.h_stride,
        m: sizes.m as u32,
        k: sizes.k as u32,
        n: sizes.n as u32,
        r: sizes.r as u32,
        h_plane: small.h_plane as u32,
        wide: u32::from(sizes.planes > 1),
        lora_bias_type: type_number(small.lora_bias_dtype),
        scale: small.scaling,
        splits: division.splits as u32,
        k_warps: division.k_warps as u32,
        groups: division.groups as u32,
        block_k: placed.block_k as u32,
        stage_k: placed.stage_k as u32,
        reserved: 0,
    };
    let grid = placed.grid();
    let nested = usize::from(small.weight.nested.is_some());
    let kernel = KERNELS[nested][small.dtype as usize][sizes.variant(device)];
    let cluster = division.splits as u32;
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch_clusters(kernel, grid, cluster, stream, &p) }?)
}
