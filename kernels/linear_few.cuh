// Up to eight tokens by a 4-bit weight: a block has all of the depth, its warps a part each, so that no block waits for
// another but for its part of H, which the blocks of a cluster hand one another while the weight comes: what is due with
// H waits until the end.
#pragma once

#include "linear_small_lora.cuh"

namespace ferrotune {

// Where the table of pairs begins: on 64 KiB of the block's shared memory. x lies after it, H's sums and tile before it.
__device__ __forceinline__ unsigned char* few_table() {
    return small_shared + (0x10000 - (shared_address(small_shared) & 0xFFFF));
}

// A place of a row of x in shared memory: pieces of sixteen bytes are mixed so that two rows and the four lanes of each,
// 64 bytes apart, hit other banks.
__device__ __forceinline__ uint32_t few_place(uint32_t row, uint32_t piece) {
    return (piece ^ (piece >> 3 & 1u) ^ (row & 1u) << 1) * 16;
}

// x to shared memory, `columns` of it: zeros from k on.
__device__ __forceinline__ void load_few_x(const LinearSmall& p, unsigned char* to, uint32_t columns) {
#pragma unroll 1
    for (uint32_t row = 0; row < p.m; ++row) {
        const unsigned char* from = static_cast<const unsigned char*>(p.x) + static_cast<uint64_t>(row) * p.k * 2;
#pragma unroll 1
        for (uint32_t piece = threadIdx.x; piece < columns / 8; piece += SMALL_THREADS) {
            const bool inside = piece * 8 < p.k;
            copy16_async(to + row * columns * 2 + few_place(row, piece), inside ? from + piece * 16 : p.x, inside);
        }
    }
}

// Where this lane's columns of a unit at 0 lie, of its token. Sums of tokens from m on are of no use, whatever is there:
// they are the last one's again, which costs no bandwidth.
__device__ __forceinline__ uint32_t few_lane(const LinearSmall& p) {
    const uint32_t lane = threadIdx.x % 32;
    return SMALL_PAIRS + min(lane / 4, p.m - 1) * p.block_k * 2 + lane % 4 * 64;
}
// Eight columns of those that begin at `from`.
__device__ __forceinline__ Fragments load_few_piece(const unsigned char* table, uint32_t from, int piece) {
    const uint32_t lane = threadIdx.x % 32, mixed = lane % 4 / 2 ^ (lane / 4 & 1) << 1;
    const uint4 found = *reinterpret_cast<const uint4*>(table + from + (piece ^ mixed) * 16);
    return {{found.x, found.y, found.z, found.w}};
}

// Sixteen bytes of a row tile's sums, counted over its warps: in the table's gaps, where two tiles are added up while two
// others are read.
__device__ __forceinline__ unsigned char* few_sum(uint32_t tile, uint32_t i) {
    static_assert(4 * SMALL_WARPS == SMALL_GAPS, "four tiles");
    return few_table() + small_gap(tile % 4 * SMALL_WARPS * 32 + i);
}

// A unit of this block's depth of H, which a warp takes whole: its quarters are neighbours in memory.
template <bool WIDE>
struct FewRanks {
    RankPiece<WIDE> quarters[4];

    __device__ __forceinline__ void load(const LinearSmall& p, uint32_t column0, uint32_t unit, uint32_t tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            quarters[i].load(p, column0 + unit * SMALL_DEPTH, min(column0 + p.stage_k, p.k), i, tile);
        }
    }
};

// A warp's sums of H, by every sixteenth unit, to shared memory. `ranks`: loaded, of unit `warp`.
template <typename T, bool WIDE>
__device__ __forceinline__ void few_ranks(const LinearSmall& p, uint32_t column0, FewRanks<WIDE>& ranks) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank_tiles = (p.r + 15) / 16;
    const uint32_t units = (min(column0 + p.stage_k, p.block_k) - min(column0, p.block_k)) / SMALL_DEPTH;
    uint32_t tile = 0, unit = warp;
    float sums[1][4] = {};
#pragma unroll 1
    while (true) {
        if (unit < units) {
            const uint32_t from = few_lane(p) + (column0 + unit * SMALL_DEPTH) * 2;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const auto x = [&](int) { return load_few_piece(few_table(), from, i); };
                ranks.quarters[i].template multiply_by<T, 1>(x, sums);
            }
        }
        unit += SMALL_WARPS;
        if (unit >= units) {
            if (2 * (lane % 4) < p.m) {
                float4* const to = reinterpret_cast<float4*>(small_shared + p.ranks) + (tile * SMALL_WARPS + warp) * 32;
                to[lane] = make_float4(sums[0][0], sums[0][1], sums[0][2], sums[0][3]);
            }
            sums[0][0] = sums[0][1] = sums[0][2] = sums[0][3] = 0.0f;
            unit = warp;
            if (++tile >= rank_tiles) break;
        }
        ranks.load(p, column0, unit, tile);
    }
}

// The block's sums of a rank tile to every block of the cluster.
__device__ __forceinline__ void few_send(const LinearSmall& p, uint32_t rank, uint32_t tile, uint32_t gathered) {
    const uint32_t lane = threadIdx.x % 32;
    if (2 * (lane % 4) >= p.m) return;
    const float4* const from = reinterpret_cast<const float4*>(small_shared + p.ranks) + tile * SMALL_WARPS * 32 + lane;
    const float4 total = add_fragments(from, SMALL_WARPS, 1);
    const uint32_t to = shared_address(small_shared + p.received) + ((tile * p.splits + rank) * 32 + lane) * 16;
#pragma unroll 1
    for (uint32_t other = 0; other < p.splits; ++other) send_shared(to, other, gathered, total);
}

// Floor, 14336 x 4096 nested NF4: (29.4 + 0.9) MB at an H200's 4.2 TB/s = 7.2 us; the lookups, four bytes a value in
// shared memory, take as long.
template <typename T, bool NESTED>
__device__ __forceinline__ void linear_few(const LinearSmall& p) {
    unsigned char* const table = few_table();
    __shared__ Tables<NESTED> tables;
    __shared__ float offset;
    __shared__ uint64_t barriers[2];
    // The block's sums of H are there; all the cluster's are.
    const uint32_t summed = shared_address(barriers), gathered = shared_address(barriers + 1);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
    const uint32_t row0 = blockIdx.x * p.groups * 16;
    const uint32_t rows = min(p.groups * 16, p.n - min(row0, p.n));
    const uint32_t rank_tiles = (p.r + 15) / 16, rank = blockIdx.x & (p.splits - 1), rank_column0 = rank * p.stage_k;
    const uint32_t tiles = max((rows + 15) / 16, 1u);  // one that fills a cluster shares H's depth, too

    // Two row tiles from `tile` on, to L2.
    const auto prefetch_tiles = [&](uint32_t tile) {
        if (threadIdx.x + 1 < SMALL_THREADS || tile * 16 >= rows) return;
        const uint64_t row_bytes = p.k / 2;
        prefetch_bulk(p.quant.packed + (row0 + tile * 16) * row_bytes, min(rows - tile * 16, 32u) * p.k / 2);
    };

    // To L2, whoever wrote it: nothing of this depends on the kernel before.
    prefetch_absmax<NESTED>(p, row0, rows, 0, p.k, SMALL_THREADS);
    if (p.r != 0) {
        const uint32_t size = p.wide ? 4 : 2, column0 = min(rank_column0, p.k);
        prefetch_rows(static_cast<const unsigned char*>(p.lora_a) + static_cast<uint64_t>(column0) * size, p.r,
                      min(p.stage_k, p.k - column0) * size, static_cast<uint64_t>(p.k) * size, SMALL_THREADS);
        prefetch(static_cast<const unsigned char*>(p.lora_b) + static_cast<uint64_t>(row0) * p.r * size,
                 rows * p.r * size, threadIdx.x, SMALL_THREADS);
        if (threadIdx.x == 0) {
            barrier_init(summed, SMALL_WARPS);
            barrier_init(gathered, 1);
            barriers_visible();
            barrier_expect(gathered, p.splits * rank_tiles * ((p.m + 1) / 2 * 128));
        }
        __syncwarp();
        cluster_arrive();
    }
    begin();

    // A lane's sixteen bytes are counted over the whole weight: rows from n on and columns from k on are any others.
    const uint32_t row_chunks = p.k / 32, last = p.n * row_chunks - 1;
    const uint32_t depth_units = p.block_k / SMALL_DEPTH;
    const uint32_t steps = (depth_units + SMALL_WARPS - 1 - min(warp, depth_units)) / SMALL_WARPS;  // of two row tiles
    const AbsmaxFrom<NESTED> blocks(p.quant, 0);
    uint32_t next_chunk = (row0 + lane / 4) * row_chunks + warp * (SMALL_DEPTH / 32) + quad, next_step = 0;
    const auto load = [&](SmallUnit<NESTED> (&units)[2]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t at = min(next_chunk + i * 8 * row_chunks, last);
            units[i / 2].codes[i % 2] = load_once<uint4>(p.quant.packed + static_cast<uint64_t>(at) * 16);
            units[i / 2].absmax[i % 2].load(blocks, at >> (p.quant.block_shift - 5));
        }
        next_chunk += SMALL_WARPS * (SMALL_DEPTH / 32);
        if (++next_step == steps) {
            next_chunk += 32 * row_chunks - steps * SMALL_WARPS * (SMALL_DEPTH / 32);
            next_step = 0;
        }
    };
    load_few_x(p, table + SMALL_PAIRS, p.block_k);
    commit_copies();
    FewRanks<false> ranks;
    if (p.r != 0 && !p.wide) ranks.load(p, rank_column0, warp, 0);
    uint32_t left = (tiles + 1) / 2 * steps;  // units of two row tiles
    SmallUnit<NESTED> ring[2][2];
    if (left > 0) load(ring[0]);
    if (left > 1) load(ring[1]);
    const NestedScales<NESTED> nested(p.quant);
    fill_pairs<SMALL_THREADS>(table, p.quant);
    nested.put(tables, offset);
    wait_copies(0);
    __syncthreads();
    prefetch_tiles(2);  // which would have delayed x
    if (p.r != 0) {
        if (!p.wide) {
            few_ranks<T, false>(p, rank_column0, ranks);
        } else {
            FewRanks<true> wide;
            wide.load(p, rank_column0, warp, 0);
            few_ranks<T, true>(p, rank_column0, wide);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(summed);
        cluster_wait();  // the others are there
        if (SMALL_WARPS - 1 - warp < rank_tiles) {
            barrier_wait(summed, 0);
            few_send(p, rank, SMALL_WARPS - 1 - warp, gathered);
        }
        __syncwarp();
    }

    // The table starts on 64 KiB, so that a byte of codes is a byte of the address.
    const uint32_t copy = shared_address(table) + lane % SMALL_COPIES * sizeof(float2);
    const uint32_t x = few_lane(p) + warp * (SMALL_DEPTH * 2);
    uint32_t tile = 0, step = 0;
    float sums[2][4] = {};

    // `from`: this lane's columns of x. There may be no second row tile.
    const auto multiply_units = [&](const SmallUnit<NESTED> (&units)[2], uint32_t from) {
        float scales[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i] = units[i / 2].absmax[i % 2].value(tables, offset);
        Fragments b[4];
#pragma unroll
        for (int word = 0; word < 4; ++word) b[word] = load_few_piece(table, from, word);
#pragma unroll
        for (int of = 0; of < 2; ++of) {
            if (of == 1 && tile + 1 >= tiles) break;
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                Fragments a[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t eight = small_word(units[of].codes[half], word);
#pragma unroll
                    for (int byte = 0; byte < 4; ++byte) {
                        const uint32_t address = __byte_perm(eight, copy, 0x7604 | byte << 4);
                        a[byte / 2].part[byte % 2 * 2 + half] = small_pair<T>(address, scales[of * 2 + half]);
                    }
                }
                multiply<T>(sums[of], a[0], b[word].part[0], b[word].part[1]);
                multiply<T>(sums[of], a[1], b[word].part[2], b[word].part[3]);
            }
        }
    };

    const auto next = [&](SmallUnit<NESTED> (&units)[2]) {
        multiply_units(units, x + step * (SMALL_WARPS * SMALL_DEPTH * 2));
        if (left > 2) load(units);
        --left;
    };
    uint32_t turn = 0;  // which of the ring is next
#pragma unroll 1
    while (tile < tiles) {
        if (steps > 0) {  // a warp without a part of the depth has sums, too
            if (turn == 0) {
                next(ring[0]);
            } else {
                next(ring[1]);
            }
            turn ^= 1;
            if (++step < steps) continue;
            step = 0;
        }
        prefetch_tiles(tile + 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float(&of)[4] = sums[i];
            *reinterpret_cast<float4*>(few_sum(tile + i, warp * 32 + lane)) = make_float4(of[0], of[1], of[2], of[3]);
            of[0] = of[1] = of[2] = of[3] = 0.0f;
        }
        // The sums over the warps, which take the tiles in turn.
        const uint32_t mine = tile + (warp - tile) % SMALL_WARPS;
        tile += 2;
        __syncthreads();
        if (mine >= min(tile, tiles)) continue;
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (uint32_t i = lane; i < SMALL_WARPS * 32; i += 32) {
            add(total, *reinterpret_cast<const float4*>(few_sum(mine, i)));
        }
        reinterpret_cast<float4*>(small_shared + p.sums)[mine * 32 + lane] = total;
    }

    const uint32_t own = thread_again() % 32;
#pragma unroll 1
    for (uint32_t mine = thread_again() / 32; mine < tiles; mine += SMALL_WARPS) {
        const uint32_t row = (block_again() * p.groups + mine) * 16;
        const auto total = [&] { return reinterpret_cast<const float4*>(small_shared + p.sums)[mine * 32 + own]; };
        const auto h = [&](uint32_t rank_tile) {
            barrier_wait(gathered, 0);  // and who leaves sooner is written to
            const float4* const from = reinterpret_cast<const float4*>(small_shared + p.received);
            return add_fragments(from + rank_tile * p.splits * 32 + own, p.splits, 1);
        };
        small_finish<T>(p, row, 0, total, h, block_again() + mine == 0);
    }
}

}  // namespace ferrotune
