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
/// Most tokens of a kernel's variants, the first of which is for few.
const TOKENS: [u64; 4] = [8, 16, 32, 64];
const THREADS: u32 = 512;
const WARPS: u64 = 16;
const GROUPS: u64 = 4;
/// Rows of a warp's products and of a warpgroup's; depth of what a warp loads at a time.
const TILE_ROWS: u64 = 16;
const GROUP_ROWS: u64 = 64;
const UNIT_DEPTH: u64 = 128;
/// Bytes of the table of pairs, and of 16 x 8 sums.
const PAIRS: u64 = 256 * 256;
const FRAGMENT: u64 = 512;
/// Sums that the table has room for.
const GAPS: u64 = 64;
/// Where the table of few tokens begins in a block's shared memory, and the least that precedes the dynamic part there.
const FEW_TABLE: u64 = 1 << 16;
const RESERVED: u64 = 1024;
/// What a block has beside its dynamic shared memory, and the part of that which alignment may take.
const STATIC: u64 = 2048;
/// Blocks that follow one another on a multiprocessor.
const MOST_ROUNDS: u64 = 256;

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
    k_groups: u32,
    tile_rows: u32,
    groups: u32,
    block_k: u32,
    stage_k: u32,
    sums: u32,
    ranks: u32,
    received: u32,
    shifts: u32,
}
const _: () = assert!(size_of::<LinearSmall>() == 192);
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

/// How the work is divided: `splits` blocks of a cluster and `k_groups` warpgroups of each share the depth; a cluster has
/// so many row tiles in turn. With few tokens the blocks of a cluster share H's depth alone, and each has its row tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Division {
    pub splits: u64,
    pub k_groups: u64,
    pub groups: u64,
}

/// A division's consequences; see `kernels/linear_small_parts.cuh`.
#[derive(Debug, Clone, Copy)]
struct Placed {
    tile_rows: u64,
    block_k: u64,
    stage_k: u64,
    sums: u64,
    ranks: u64,
    received: u64,
    shared: u64,
    blocks: u64,
}

impl Placed {
    fn grid(&self) -> Grid {
        Grid {
            blocks: (self.blocks as u32, 1, 1),
            threads: THREADS,
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
            && (self.n + 2 * GROUP_ROWS) * (self.k / 32) < 1 << 32
    }

    fn rank_tiles(&self) -> u64 {
        self.r.div_ceil(SEGMENT)
    }

    /// The first whose tokens suffice; of few tokens all the depth is in shared memory.
    fn variant(&self, device: &Device) -> usize {
        let found = TOKENS.iter().position(|&most| self.m <= most).unwrap_or(0);
        if found == 0
            && self
                .few(device, if self.r > 0 { 8 } else { 1 }, 1)
                .is_none()
        {
            1
        } else {
            found
        }
    }

    /// A cluster is there for H alone.
    fn few(&self, device: &Device, splits: u64, groups: u64) -> Option<Placed> {
        if (self.r > 0) != (splits > 1) {
            return None;
        }
        let block_k = self.k.next_multiple_of(UNIT_DEPTH);
        let stage_k = self.k.div_ceil(UNIT_DEPTH * splits) * UNIT_DEPTH;
        // What precedes the table: sums of row tiles, which warps have by turns, and of H's tiles by warps and by blocks.
        let sums = groups.next_multiple_of(WARPS) * FRAGMENT;
        let ranks = self.rank_tiles() * WARPS * FRAGMENT;
        let before = sums + ranks + self.rank_tiles() * splits * FRAGMENT;
        let shared = FEW_TABLE - RESERVED + PAIRS + 2 * self.m * block_k;
        let fits =
            before + STATIC + RESERVED <= FEW_TABLE && shared + STATIC <= u64::from(device.shared);
        fits.then_some(Placed {
            tile_rows: TILE_ROWS,
            block_k,
            stage_k,
            sums: 0,
            ranks: sums,
            received: sums + ranks,
            shared,
            blocks: self.n.div_ceil(TILE_ROWS * groups).next_multiple_of(splits),
        })
    }

    fn place(&self, device: &Device, division: Division) -> Option<Placed> {
        let Division {
            splits,
            k_groups,
            groups,
        } = division;
        let variant = self.variant(device);
        if variant == 0 {
            return self.few(device, splits, groups).filter(|_| k_groups == 1);
        }
        let depth = UNIT_DEPTH * k_groups;
        let block_k = self.k.div_ceil(depth * splits) * depth;
        if k_groups > GROUPS || (splits - 1) * block_k >= self.k {
            return None;
        }
        let (tokens, row_groups) = (TOKENS[variant], GROUPS / k_groups);
        let tiles = tokens / 8;
        let sums = tiles * GROUP_ROWS / TILE_ROWS * row_groups * (k_groups - 1).max(1);
        let sums = sums.saturating_sub(GAPS) * FRAGMENT;
        let received = self.rank_tiles() * tiles.max(splits) * FRAGMENT;
        let fixed = PAIRS + sums + received;
        let room =
            (u64::from(device.shared) - STATIC).checked_sub(fixed)? / (2 * tokens) / depth * depth;
        if room == 0 {
            return None;
        }
        let stages = block_k.div_ceil(room);
        let stage_k = block_k.div_ceil(stages * depth) * depth;
        let x = PAIRS + 2 * tokens * stage_k;
        let tile_rows = GROUP_ROWS * row_groups;
        Some(Placed {
            tile_rows,
            block_k,
            stage_k,
            sums: x,
            ranks: 0,
            received: x + sums,
            shared: fixed + 2 * tokens * stage_k,
            blocks: self.n.div_ceil(tile_rows * groups) * splits,
        })
    }

    /// Clock cycles, roughly: only comparisons of divisions count. `places`: blocks that run at a time.
    fn cost(&self, device: &Device, division: Division, placed: &Placed, places: u64) -> u64 {
        const START: u64 = 2500;
        const ADAPTER: u64 = 40; // bytes a cycle
        const FEW_UNIT: u64 = 80; // bound by shared memory
        const X: u64 = 24; // bytes a cycle
        const STAGE: u64 = 1500;
        const FLUSH: u64 = 4000;
        const REMOTE: u64 = 24; // bytes a cycle
        let rounds = placed.blocks.div_ceil(places.max(1));
        let units = placed.block_k / UNIT_DEPTH * division.groups;
        let variant = self.variant(device);
        if variant == 0 {
            let adapter = 2 * self.planes * SEGMENT * self.rank_tiles() * placed.stage_k / ADAPTER;
            return rounds * (START + units * FEW_UNIT + adapter);
        }
        let tokens = TOKENS[variant];
        let row_groups = GROUPS / division.k_groups;
        // A step of a warpgroup: lookups, and x by its products.
        let work = units * row_groups * 8 * (40 + tokens / 4);
        let loads = if placed.stage_k < placed.block_k {
            division.groups
        } else {
            1
        };
        let stages = placed.block_k.div_ceil(placed.stage_k);
        let x = loads * (2 * tokens * placed.block_k / X + stages * STAGE);
        let sums = FLUSH + placed.tile_rows * tokens * 4 / REMOTE;
        let ranks = self.rank_tiles() * self.planes * placed.block_k / UNIT_DEPTH * tokens * 2;
        rounds * (START + work + x + division.groups * sums + ranks)
    }
}

/// How a product of these sizes is divided here; None where the kernel does not take it, and on any chip but Hopper.
pub fn division(device: &Device, sizes: &Sizes) -> Option<Division> {
    if device.capability != (9, 0) || !sizes.take() {
        return None;
    }
    let variant = sizes.variant(device);
    let kernel = KERNELS[1][1][variant]; // all of so many tokens take the same
    let mut found: Option<(u64, Division)> = None;
    for splits in [8, 4, 2, 1] {
        for k_groups in [1, 2, 4] {
            let with = |groups| Division {
                splits,
                k_groups,
                groups,
            };
            let Some(one) = sizes.place(device, with(1)) else {
                continue;
            };
            let places = match splits {
                1 => u64::from(device.multiprocessors),
                // Clusters are of one of the chip's groups of multiprocessors, which they may not fill.
                _ => device
                    .clusters(kernel, one.grid(), splits as u32)
                    .map_or(0, |clusters| u64::from(clusters) * splits),
            };
            if places == 0 {
                continue;
            }
            // As few rounds of blocks as there is room for their row tiles.
            let Some((how, placed)) = (1..=MOST_ROUNDS).find_map(|rounds| {
                let how = with(one.blocks.div_ceil(places * rounds));
                sizes.place(device, how).map(|placed| (how, placed))
            }) else {
                continue;
            };
            let cost = sizes.cost(device, how, &placed, places);
            if found.is_none_or(|(least, _)| cost < least) {
                found = Some((cost, how));
            }
        }
    }
    found.map(|(_, how)| how)
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
    let powers = [division.splits, division.k_groups]
        .iter()
        .all(|count| count.is_power_of_two() && *count <= 8);
    let placed = (sizes.take() && powers && (1..=1 << 24).contains(&division.groups))
        .then(|| sizes.place(device, division))
        .flatten()
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
        wide: u32::from(sizes.r > 0 && sizes.planes > 1),
        lora_bias_type: type_number(small.lora_bias_dtype),
        scale: small.scaling,
        splits: division.splits as u32,
        k_groups: division.k_groups as u32,
        tile_rows: placed.tile_rows as u32,
        groups: division.groups as u32,
        block_k: placed.block_k as u32,
        stage_k: placed.stage_k as u32,
        sums: placed.sums as u32,
        ranks: placed.ranks as u32,
        received: placed.received as u32,
        shifts: division.splits.trailing_zeros() | division.k_groups.trailing_zeros() << 8,
    };
    let grid = placed.grid();
    let nested = usize::from(small.weight.nested.is_some());
    let kernel = KERNELS[nested][small.dtype as usize][sizes.variant(device)];
    let cluster = division.splits as u32;
    // SAFETY: the caller's promise.
    Ok(unsafe { device.launch_clusters(kernel, grid, cluster, stream, &p) }?)
}
