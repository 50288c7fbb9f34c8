// The kernel of few rows by a 4-bit weight: see linear_small_parts.cuh for how its data lie.
#pragma once

#include "linear_small_parts.cuh"

namespace ferrotune {

// Floor, 14336 x 4096 nested NF4: (29.4 + 0.9) MB at an H200's 4.2 TB/s = 7.2 us; the lookups, four bytes a value in
// shared memory, take about as long.
template <typename T, bool NESTED, int TILES>
__device__ __forceinline__ void linear_small(const LinearSmall& p) {
    constexpr int ROW_TILES = SMALL_ROW_TILES;
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ Tables<NESTED> tables;
    const SmallShared<TILES> place(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;

    const uint32_t rank = blockIdx.x % p.splits, k_warp = warp % p.k_warps, row_warp = warp / p.k_warps;
    const uint32_t row_warps = WARPS / p.k_warps;
    const uint32_t row0 = blockIdx.x / p.splits * row_warps * p.groups * (16 * ROW_TILES);
    const uint32_t column0 = rank * p.block_k;
    // Nothing of this depends on the kernel before.
    if (p.r != 0 && column0 < p.k) {
        const uint32_t size = p.wide ? 4 : 2, rows = min(p.n - row0, row_warps * p.groups * (16 * ROW_TILES));
        prefetch_rows(static_cast<const unsigned char*>(p.lora_a) + static_cast<uint64_t>(column0) * size, p.r,
                      min(p.block_k, p.k - column0) * size, static_cast<uint64_t>(p.k) * size, threadIdx.x, THREADS);
        prefetch_rows(static_cast<const unsigned char*>(p.lora_b) + static_cast<uint64_t>(row0) * p.r * size, 1,
                      rows * p.r * size, 0, rank * THREADS + threadIdx.x, p.splits * THREADS);
    }
    fill_pairs<THREADS>(shared, p.quant);
    begin();

    const uint32_t depth_units = p.block_k / (SMALL_DEPTH * p.k_warps);  // of a warp and group
    const uint32_t units = depth_units * p.groups;
    const uint32_t row_chunks = p.k / 32;  // a lane's codes of a unit and row
    const AbsmaxFrom<NESTED> blocks(p.quant, 0);
    const float offset = nested_offset<NESTED>(p.quant);

    // The group and the unit of its depth that is loaded next.
    uint32_t next_group = 0, next_depth = 0;
    const auto load = [&](SmallUnit<NESTED, ROW_TILES>& unit) {
        const uint32_t chunk = min((column0 + (next_depth * p.k_warps + k_warp) * SMALL_DEPTH) / 32 + quad, row_chunks - 1);
        const uint32_t first = row0 + (next_group * row_warps + row_warp) * (16 * ROW_TILES) + lane / 4;
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t at = min(first + 16 * tile + 8 * half, p.n - 1) * row_chunks + chunk;
                unit.codes[tile][half] = load_once<uint4>(p.quant.packed + static_cast<uint64_t>(at) * 16);
                unit.absmax[tile][half].load(blocks, at >> (p.quant.block_shift - 5));
            }
        if (++next_depth == depth_units) {
            next_depth = 0;
            ++next_group;
        }
    };
    load_small_x<THREADS>(p, shared + place.x, column0, p.stage_k);  // before what there is more of
    commit_copies();
    SmallUnit<NESTED, ROW_TILES> ring[2];
    load(ring[0]);
    if (units > 1) load(ring[1]);
    tables.template fill<THREADS>(p.quant);
    float4* const my_ranks = reinterpret_cast<float4*>(shared + place.ranks) + warp * TILES * 32;
    const int rank_tiles = (p.r + 15) / 16;
    const int rank_slots = rank_tiles == 0 ? 0 : rank_tiles == 1 ? 8 : rank_tiles == 2 ? 4 : 2;  // WARPS / rank_tiles
    if (rank_tiles) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) my_ranks[t * 32 + lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }

    const uint32_t pitch = p.stage_k * 2;
    const SmallToken<TILES> token_place(p.m, pitch);
    const uint32_t mixed = quad / 2 ^ (lane / 4 & 1) << 1;
    const uint32_t pair_place = lane % SMALL_COPIES * sizeof(float2);
    uint32_t group = 0, depth = 0;
    float sums[ROW_TILES][TILES][4] = {};

    // Sums of a whole group, to shared memory.
    const auto flush = [&]() {
        const uint32_t to = lane + ((k_warp * p.groups + group) * row_warps + row_warp) * (ROW_TILES * TILES * 32);
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                float(&sum)[4] = sums[tile][t];
                *reinterpret_cast<float4*>(shared + place.sum(to + (tile * TILES + t) * 32)) =
                    make_float4(sum[0], sum[1], sum[2], sum[3]);
                sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
            }
        depth = 0;
        ++group;
    };

    // `x`: of depth 0 of this lane's columns.
    const auto multiply_unit = [&](const SmallUnit<NESTED, ROW_TILES>& unit, uint32_t x) {
        float scales[ROW_TILES][2];
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) scales[tile][half] = unit.absmax[tile][half].value(tables, offset);
        x += depth * p.k_warps * (SMALL_DEPTH * 2);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            Fragments a[ROW_TILES][2];
#pragma unroll
            for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t eight = small_word(unit.codes[tile][half], word);
#pragma unroll
                    for (int byte = 0; byte < 4; ++byte) {
                        a[tile][byte / 2].part[byte % 2 * 2 + half] =
                            small_pair<T>(shared, eight, byte, pair_place, scales[tile][half]);
                    }
                }
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const uint4 b = load_small_piece(shared, x + token_place(t) + (word ^ mixed) * 16);
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; ++tile) multiply<T>(sums[tile][t], a[tile][0], b.x, b.y);
#pragma unroll
                for (int tile = 0; tile < ROW_TILES; ++tile) multiply<T>(sums[tile][t], a[tile][1], b.z, b.w);
            }
        }
        if (++depth == depth_units) flush();
    };

    // With several stages there is one group; a stage is an even number of units.
    const uint32_t stage_units = p.stage_k / (SMALL_DEPTH * p.k_warps);
    uint32_t left = units;
#pragma unroll 1
    for (uint32_t stage = 0, begins = 0; begins < p.block_k; ++stage, begins += p.stage_k) {
        // The stage has come for all, and all have left the other one.
        wait_copies(0);
        __syncthreads();
        uint32_t x = place.x + (stage & 1) * place.stage;
        if (begins + p.stage_k < p.block_k) {
            load_small_x<THREADS>(p, shared + place.x + (~stage & 1) * place.stage, column0 + begins + p.stage_k, p.stage_k);
            commit_copies();
        }
        if (warp < rank_tiles * rank_slots) {
            const uint32_t of_x = min(p.stage_k, p.block_k - begins) / SMALL_DEPTH;
#pragma unroll 1
            for (uint32_t unit = warp / rank_tiles; unit < of_x; unit += rank_slots) {
                float more[TILES][4] = {};
                small_ranks<T, TILES>(p, shared + x, pitch, unit, column0 + begins, warp % rank_tiles, more);
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    add(my_ranks[t * 32 + lane], make_float4(more[t][0], more[t][1], more[t][2], more[t][3]));
                }
            }
        }
        x += k_warp * (SMALL_DEPTH * 2) + quad * 64 - begins * 2;
        const uint32_t after = p.stage_k < p.block_k ? left - min(left, stage_units) : 0;
#pragma unroll 1
        while (left > after) {
#pragma unroll
            for (int turn = 0; turn < 2; ++turn) {
                if (left > after) {
                    multiply_unit(ring[turn], x);
                    if (left > 2) load(ring[turn]);
                    --left;
                }
            }
        }
    }
    __syncthreads();

    // The block's own sums, over the warps that share its depth.
    const uint32_t fragments = p.groups * row_warps * ROW_TILES * TILES;
    if (p.k_warps > 1) {
        for (uint32_t i = threadIdx.x; i < fragments * 32; i += THREADS) {
            float4 sum = *reinterpret_cast<const float4*>(shared + place.sum(i));
            for (uint32_t j = 1; j < p.k_warps; ++j) {
                const float4 more = *reinterpret_cast<const float4*>(shared + place.sum(j * fragments * 32 + i));
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            *reinterpret_cast<float4*>(shared + place.sum(i)) = sum;
        }
    }
    float4* const block_ranks = reinterpret_cast<float4*>(shared + place.ranks);
    const uint32_t rank_sums = rank_tiles * TILES * 32;
    for (uint32_t i = threadIdx.x; i < rank_sums; i += THREADS) {
        float4 sum = block_ranks[i];
        for (int j = 1; j < rank_slots; ++j) {
            const float4 more = block_ranks[j * rank_sums + i];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        block_ranks[i] = sum;
    }
    splits_sync(p.splits);

    const int h_width = (p.wide ? 3 : 1) * 16 * rank_tiles + 8;
    T* const h_tile = reinterpret_cast<T*>(shared + place.h);  // [8 * TILES][h_width]
    if (rank_tiles) {
        for (uint32_t i = threadIdx.x; i < rank_sums; i += THREADS) {
            small_h<T>(p, small_total(shared_address(block_ranks + i), p.splits), i / (32 * TILES), i / 32 % TILES * 8,
                       rank_tiles, h_tile, h_width);
        }
        __syncthreads();
    }

    // Each block writes some of the cluster's rows.
    uint32_t block;  // asked for again: what follows from it need not be kept in registers until here
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const uint32_t last_row0 = block / p.splits * row_warps * p.groups * (16 * ROW_TILES);
    for (uint32_t i = block % p.splits + p.splits * warp; i < fragments; i += p.splits * WARPS) {
        const uint32_t row = last_row0 + i / TILES * 16, token0 = i % TILES * 8;
        Fragments b[2];
        if (rank_tiles) load_small_b<T>(b, p, row, 0);
        const float4 total = small_total(shared_address(shared + place.sum(i * 32 + lane)), p.splits);
        small_finish<T>(p, row, token0, total, b, rank_tiles, h_tile, h_width);
    }
    // No block leaves while another reads its sums.
    __syncwarp();
    if (p.splits > 1) splits_sync(p.splits);
}

}  // namespace ferrotune
