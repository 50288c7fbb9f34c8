// Up to eight tokens by a 4-bit weight: a block has all of the depth, its warps a part each, so that no block waits for
// another but for its part of H, which the blocks of a cluster hand one another while the weight comes.
#pragma once

#include "linear_small_parts.cuh"

namespace ferrotune {

constexpr int FEW_THREADS = 512;
constexpr int FEW_WARPS = FEW_THREADS / 32;
constexpr int FEW_RING = 4;        // units of sixteen rows that a warp has under way
constexpr int FEW_RANK_WARPS = 8;  // that add up H

// Where the parts of a block's shared memory lie; src/cuda/lora/small.rs adds up the same. Sums lie in the table's gaps.
struct FewShared {
    static constexpr uint32_t x = SMALL_PAIRS;
    uint32_t ranks, h;
    __device__ __forceinline__ FewShared(const LinearSmall& p) {
        ranks = x + p.m * p.block_k * 2;
        h = ranks + (p.r != 0 ? p.splits * FEW_RANK_WARPS * SMALL_FRAGMENT : 0);
    }
};

// This block's sums of H to every block of the cluster, a slot for each of its warps that has some.
template <typename T>
__device__ __forceinline__ void few_ranks(const LinearSmall& p, unsigned char* shared, const FewShared& place,
                                          uint32_t rank, int rank_tiles, int slots) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t column0 = rank * p.stage_k, end = min(column0 + p.stage_k, p.block_k);
    const uint32_t units = (end - min(column0, end)) / SMALL_DEPTH;
    float sums[1][4] = {};
#pragma unroll 1
    for (uint32_t unit = warp / rank_tiles; unit < units; unit += slots) {
        small_ranks<T, 1>(p, shared + place.x + column0 * 2, p.block_k * 2, unit, column0, warp % rank_tiles, sums);
    }
    if (2u * (lane % 4) >= p.m) return;
    const uint32_t to = shared_address(shared + place.ranks) + ((rank * FEW_RANK_WARPS + warp) * 32 + lane) * 16;
    for (uint32_t other = 0; other < p.splits; ++other) store_shared_of(to, other, sums[0]);
}

// Floor, 14336 x 4096 nested NF4: (29.4 + 0.9) MB at an H200's 4.2 TB/s = 7.2 us; the lookups, four bytes a value in
// shared memory, take as long.
template <typename T, bool NESTED>
__device__ __forceinline__ void linear_few(const LinearSmall& p) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ Tables<NESTED> tables;
    const FewShared place(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
    const uint32_t rank = blockIdx.x % p.splits;
    const uint32_t row0 = blockIdx.x * p.groups * 16;
    const uint32_t rows = min(p.groups * 16, p.n - min(row0, p.n)), tiles = (rows + 15) / 16;
    const int rank_tiles = (p.r + 15) / 16;
    // Of H's sums, of each block and rank tile.
    const int slots = min(rank_tiles > 2 ? 2u : FEW_RANK_WARPS >> (rank_tiles - 1 & 3), p.stage_k / SMALL_DEPTH);

    // To L2, whoever wrote it: nothing of this depends on the kernel before.
    if (warp == 0) {
        prefetch_bulk(p.quant.packed + static_cast<uint64_t>(row0) * (p.k / 2), static_cast<uint64_t>(rows) * (p.k / 2),
                      lane, 32);
    } else if (p.r != 0) {
        const uint32_t size = p.wide ? 4 : 2, column0 = min(rank * p.stage_k, p.k);
        prefetch_rows(static_cast<const unsigned char*>(p.lora_a) + static_cast<uint64_t>(column0) * size, p.r,
                      min(p.stage_k, p.k - column0) * size, static_cast<uint64_t>(p.k) * size, threadIdx.x - 32,
                      FEW_THREADS - 32);
        prefetch_rows(static_cast<const unsigned char*>(p.lora_b) + static_cast<uint64_t>(row0) * p.r * size, 1,
                      rows * p.r * size, 0, threadIdx.x - 32, FEW_THREADS - 32);
    }
    if (p.r != 0) cluster_arrive();
    begin();

    const uint32_t depth_units = p.block_k / SMALL_DEPTH;
    const uint32_t steps = max(1u, (depth_units + FEW_WARPS - 1 - warp) / FEW_WARPS);  // of a row tile
    const uint32_t row_chunks = p.k / 32;
    const AbsmaxFrom<NESTED> blocks(p.quant, 0);
    uint32_t next_tile = 0, next_step = 0;
    const auto load = [&](SmallUnit<NESTED, 1>& unit) {
        const uint32_t chunk = min((next_step * FEW_WARPS + warp) * (SMALL_DEPTH / 32) + quad, row_chunks - 1);
        const uint32_t first = row0 + next_tile * 16 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t at = min(first + 8 * half, p.n - 1) * row_chunks + chunk;
            unit.codes[0][half] = load_once<uint4>(p.quant.packed + static_cast<uint64_t>(at) * 16);
            unit.absmax[0][half].load(blocks, at >> (p.quant.block_shift - 5));
        }
        if (++next_step == steps) {
            next_step = 0;
            ++next_tile;
        }
    };
    load_small_x<FEW_THREADS>(p, shared + place.x, 0, p.block_k);
    commit_copies();
    uint32_t left = tiles * steps;
    SmallUnit<NESTED, 1> ring[FEW_RING];
#pragma unroll
    for (int i = 0; i < FEW_RING; ++i) {
        if (i < left) load(ring[i]);
    }
    fill_pairs<FEW_THREADS>(shared, p.quant);
    if (NESTED && threadIdx.x < 256) tables.nested_code[threadIdx.x] = __ldg(p.quant.nested_code + threadIdx.x);
    const float offset = nested_offset<NESTED>(p.quant);
    wait_copies(0);
    __syncthreads();
    if (p.r != 0) {
        cluster_wait();  // the others are there
        if (warp < rank_tiles * slots) few_ranks<T>(p, shared, place, rank, rank_tiles, slots);
        __syncwarp();
        cluster_arrive();
    }

    const int h_width = (p.wide ? 3 : 1) * 16 * rank_tiles + 8;
    T* const h_tile = reinterpret_cast<T*>(shared + place.h);  // [8][h_width]
    const SmallToken<1> token_place(p.m, p.block_k * 2);
    const uint32_t mixed = quad / 2 ^ (lane / 4 & 1) << 1;
    const uint32_t pair_place = lane % SMALL_COPIES * sizeof(float2);
    const uint32_t x = place.x + token_place(0) + warp * (SMALL_DEPTH * 2) + quad * 64;
    uint32_t tile = 0, step = 0;
    float sums[4] = {};

    // `from`: this lane's columns of x.
    const auto multiply_unit = [&](const SmallUnit<NESTED, 1>& unit, uint32_t from) {
        float scales[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) scales[half] = unit.absmax[0][half].value(tables, offset);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            Fragments a[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t eight = small_word(unit.codes[0][half], word);
#pragma unroll
                for (int byte = 0; byte < 4; ++byte) {
                    a[byte / 2].part[byte % 2 * 2 + half] = small_pair<T>(shared, eight, byte, pair_place, scales[half]);
                }
            }
            const uint4 b = load_small_piece(shared, from + (word ^ mixed) * 16);
            multiply<T>(sums, a[0], b.x, b.y);
            multiply<T>(sums, a[1], b.z, b.w);
        }
    };

    // Sums of a row tile to shared memory, which has room for four: two are written while two are read.
    const auto flush = [&]() {
        *reinterpret_cast<float4*>(shared + small_gap(((tile % 4) * FEW_WARPS + warp) * 32 + lane)) =
            make_float4(sums[0], sums[1], sums[2], sums[3]);
        sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
        step = 0;
        if (tile++ % 2 == 0 && tile < tiles) return;
        if (tile <= 2 && rank_tiles) {
            cluster_wait();
            if (threadIdx.x < rank_tiles * 32) {
                // Slot `slot` of tile t is warp slot * rank_tiles + t.
                const float4* from = reinterpret_cast<const float4*>(shared + place.ranks) + threadIdx.x;
                float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                for (uint32_t other = 0; other < p.splits; ++other) {
#pragma unroll 4
                    for (int slot = 0; slot < slots; ++slot) {
                        add(total, from[(other * FEW_RANK_WARPS + slot * rank_tiles) * 32]);
                    }
                }
                small_h<T>(p, total, threadIdx.x / 32, 0, rank_tiles, h_tile, h_width);
            }
        }
        __syncthreads();
        // Warps take the tiles in turn.
        const uint32_t first = tile - 1 & ~1u, mine = first + (warp - first) % FEW_WARPS;
        if (mine >= tile) return;
        const uint32_t row = row0 + mine * 16;
        Fragments b[2];
        if (rank_tiles) load_small_b<T>(b, p, row, 0);
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < FEW_WARPS; ++w) {
            add(total, *reinterpret_cast<const float4*>(shared + small_gap((mine % 4 * FEW_WARPS + w) * 32 + lane)));
        }
        small_finish<T>(p, row, 0, total, b, rank_tiles, h_tile, h_width);
    };

#pragma unroll 1
    while (left) {
#pragma unroll
        for (int turn = 0; turn < FEW_RING; ++turn) {
            if (left) {
                multiply_unit(ring[turn], x + step * (FEW_WARPS * SMALL_DEPTH * 2));
                if (left > FEW_RING) load(ring[turn]);
                --left;
                if (++step == steps) flush();
            }
        }
    }
    if (tiles == 0 && p.r != 0) cluster_wait();
}

}  // namespace ferrotune
