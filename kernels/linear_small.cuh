// Nine to sixty-four tokens by a 4-bit weight, with a warpgroup's products: W's values are their first operand, in
// registers; x is the second one, in shared memory. A cluster of `splits` blocks takes tiles of rows, each block a range of
// their depth; so each also has its part of H = scale x A^T, which it sends while the weight comes to those that write
// rows of the same tokens.
//
// x lies as a warpgroup reads it: of each 128 columns two boxes of 64, of which a token has 128 swizzled bytes; columns
// are taken in the order that W's sixteen bytes a lane give. Element 32q + 4s + 2h + e of them is 16s + 8h + 2q + e of the
// boxes.
#pragma once

#include "linear_small_lora.cuh"

namespace ferrotune {

// Of sixteen bytes of sums, counted.
__device__ __forceinline__ uint32_t small_sum(const LinearSmall& p, uint32_t i) {
    return i < SMALL_GAPS * 32 ? small_gap(i) : p.sums + (i - SMALL_GAPS * 32) * 16;
}

// Sixteen bytes of a box of x.
__device__ __forceinline__ uint32_t small_box(uint32_t token, uint32_t piece) {
    return token * 128 + (piece ^ token % 8) * 16;
}

// `columns` of x from column0 on to shared memory; zeros from k and m on.
template <int TILES, int TOGETHER>
__device__ __forceinline__ void load_boxes(const LinearSmall& p, unsigned char* to, uint32_t column0, uint32_t columns) {
    constexpr uint32_t BOX = 8 * TILES * 128;
    const uint32_t warp = thread_again() / 32, lane = thread_again() % 32;
    const uint32_t part = lane % 2 + lane / 16 * 2;  // of the 32 columns of each quarter
#pragma unroll TOGETHER
    for (uint32_t i = warp; i < columns / SMALL_DEPTH * TILES; i += SMALL_WARPS) {
        const uint32_t unit = i / TILES, token = i % TILES * 8 + lane / 2 % 8;
        const uint32_t column = column0 + unit * SMALL_DEPTH;
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(p.x) +
                                                           (static_cast<uint64_t>(token) * p.k + column) * 2);
        uint4 raw[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            raw[q] = token < p.m && column + 32 * q < p.k ? __ldg(from + 4 * q + part) : make_uint4(0, 0, 0, 0);
        }
        unsigned char* box = to + (2 * unit + part / 2) * BOX;
        const uint32_t piece = part % 2 * 4;
        *reinterpret_cast<uint4*>(box + small_box(token, piece)) = make_uint4(raw[0].x, raw[1].x, raw[2].x, raw[3].x);
        *reinterpret_cast<uint4*>(box + small_box(token, piece + 1)) = make_uint4(raw[0].y, raw[1].y, raw[2].y, raw[3].y);
        *reinterpret_cast<uint4*>(box + small_box(token, piece + 2)) = make_uint4(raw[0].z, raw[1].z, raw[2].z, raw[3].z);
        *reinterpret_cast<uint4*>(box + small_box(token, piece + 3)) = make_uint4(raw[0].w, raw[1].w, raw[2].w, raw[3].w);
    }
}

// Until at most PENDING committed groups of products are under way.
template <int PENDING>
__device__ __forceinline__ void products_wait_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// H's sums over a stage, to the table's gaps: [slot][rank tile][token tile]. A warp fills a slot, of most tokens two do a
// half each, by every so many halves of a unit.
template <int TILES>
constexpr uint32_t SMALL_SHARE = TILES < 8 ? 1 : 2;
template <int TILES>
__device__ __forceinline__ uint32_t small_slots(const LinearSmall& p) {
    constexpr uint32_t most = SMALL_WARPS / SMALL_SHARE<TILES>;
    static_assert(most * TILES <= SMALL_GAPS, "they have room there");
    return p.r > 32 ? most / 4 : p.r > 16 ? most / 2 : most;
}
template <typename T, int TILES, bool WIDE>
__device__ __forceinline__ void add_ranks(const LinearSmall& p, unsigned char* shared, uint32_t column0, uint32_t columns,
                                          bool first_stage) {
    constexpr int SOME = TILES / SMALL_SHARE<TILES>;  // token tiles of a warp
    constexpr uint32_t BOX = 8 * TILES * 128;
    const uint32_t thread = thread_again(), lane = thread % 32, warp = thread / 32, share = warp / SMALL_SHARE<TILES>;
    const uint32_t rank_tiles = (p.r + 15) / 16, slots = small_slots<TILES>(p);
    const uint32_t slot = share & (slots - 1), rank_tile = over(share, slots), first = warp % SMALL_SHARE<TILES> * SOME;
    if (rank_tile >= rank_tiles) return;
    const uint32_t place = ((slot * rank_tiles + rank_tile) * TILES + first) * 32 + lane;
    float4* const gap = reinterpret_cast<float4*>(shared + small_gap(place));
    const uint32_t x0 = shared_address(shared + SMALL_PAIRS) + first * 1024, end = columns / (SMALL_DEPTH / 4);
    constexpr int TOGETHER = WIDE ? 1 : 2;  // quarters of a unit, as registers allow
    if (first_stage) {
#pragma unroll
        for (int t = 0; t < SOME; ++t) gap[t * 64] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll 1
    for (uint32_t quarter = 2 * slot; quarter < end;) {
        RankPiece<WIDE> a[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            a[i].load(p, column0 + quarter / 4 * SMALL_DEPTH, p.k, quarter % 4 + i, rank_tile);
        }
#pragma unroll 1
        for (int t = 0; t < SOME; ++t) {
            float4& there = gap[t * 64];
            const float4 before = there;
            float sums[1][4] = {{before.x, before.y, before.z, before.w}};
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const uint32_t x = x0 + (quarter + i) / 2 * BOX + t * 1024;
                const uint32_t row = small_box(lane % 8, (quarter + i) % 2 * 4 + lane / 8);
                const auto of_token_tile = [&](int) { return load_matrices_at<false>(x + row); };
                a[i].template multiply_by<T, 1>(of_token_tile, sums);
            }
            there = make_float4(sums[0][0], sums[0][1], sums[0][2], sums[0][3]);
        }
        quarter += TOGETHER;
        if (quarter % 2 == 0) quarter += 2 * (slots - 1);
    }
}

// Sums of H over the block's depth, of each token tile to those blocks of the cluster that write its rows of y: slots
// [token tile of the block][rank tile][block].
template <int TILES>
__device__ __forceinline__ void send_ranks(const LinearSmall& p, unsigned char* shared, uint32_t gathered) {
    const uint32_t thread = thread_again(), lane = thread % 32, rank = block_again() & (p.splits - 1);
    const uint32_t fragments = (p.r + 15) / 16 * TILES;
#pragma unroll 1
    for (uint32_t i = thread / 32; i < fragments; i += SMALL_WARPS) {
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (uint32_t from = i; from < small_slots<TILES>(p) * fragments; from += fragments) {
            add(total, *reinterpret_cast<const float4*>(shared + small_gap(from * 32 + lane)));
        }
        const uint32_t tile = i % TILES, rank_tile = i / TILES;
        const uint32_t slot = (over_splits(p, tile) * (fragments / TILES) + rank_tile) * p.splits + rank;
        unsigned char* const to = shared + p.received + (slot * 32 + lane) * 16;
        if (p.splits == 1) *reinterpret_cast<float4*>(to) = total;  // no cluster, no sending
#pragma unroll 1
        for (uint32_t other = tile & (p.splits - 1); p.splits > 1 && other < p.splits; other += TILES) {
            send_shared(shared_address(to), other, gathered, total);
        }
    }
}

// A warp's fragments of sums from `first` of the block's on, whose number is a multiple of theirs: to there; ADDS: from
// there onto its own.
template <int TILES, bool ADDS>
__device__ __forceinline__ void put_sums(const LinearSmall& p, unsigned char* shared, float (&sums)[4 * TILES],
                                         uint32_t first) {
    static_assert(SMALL_GAPS % TILES == 0, "a warp's are all in the gaps or none");
    const uint32_t step = first < SMALL_GAPS ? small_gap(32) - small_gap(0) : SMALL_FRAGMENT;
    unsigned char* const place = shared + small_sum(p, first * 32 + thread_again() % 32);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        float4& there = *reinterpret_cast<float4*>(place + t * step);
        float* const own = sums + 4 * t;
        if (ADDS) {
            own[0] += there.x, own[1] += there.y, own[2] += there.z, own[3] += there.w;
        } else {
            there = make_float4(own[0], own[1], own[2], own[3]);
        }
    }
}

// Floor, 4096 x 4096, 64 tokens: a step of 64 rows takes 32 cycles of lookups and 16 of x, so (4096 / 64) * (4096 / 16) *
// 48 / 132 cycles = 3.4 us.
template <typename T, bool NESTED, int TILES>
__device__ __forceinline__ void linear_small(const LinearSmall& p) {
    constexpr uint32_t UNIT_BYTES = 8 * TILES * SMALL_DEPTH * 2;  // of x
    unsigned char* const shared = small_shared;
    __shared__ Tables<NESTED> tables;
    __shared__ float offset;
    __shared__ uint64_t barrier;  // all the cluster's sums of H that this block needs are there
    const uint32_t gathered = shared_address(&barrier), rank_tiles = (p.r + 15) / 16;

    const uint32_t rank = blockIdx.x & (p.splits - 1), column0 = rank * p.block_k;
    const uint32_t row0 = over_splits(p, blockIdx.x) * p.groups * p.tile_rows;
    const uint32_t rows = min(p.groups * p.tile_rows, p.n - row0), row_tiles = over(rows + p.tile_rows - 1, p.tile_rows);

    // To L2, whoever wrote it: nothing of this depends on the kernel before.
    const uint32_t columns = min(p.block_k, p.k - column0);
    prefetch_rows(p.quant.packed + (static_cast<uint64_t>(row0) * p.k + column0) / 2, rows, columns / 2, p.k / 2,
                  SMALL_THREADS);
    prefetch_absmax<NESTED>(p, row0, rows, column0, columns, SMALL_THREADS);
    if (p.r != 0) {
        const uint32_t size = p.wide ? 4 : 2;
        prefetch_rows(static_cast<const unsigned char*>(p.lora_a) + static_cast<uint64_t>(column0) * size, p.r,
                      columns * size, static_cast<uint64_t>(p.k) * size, SMALL_THREADS);
        prefetch(static_cast<const unsigned char*>(p.lora_b) + static_cast<uint64_t>(row0) * p.r * size,
                 rows * p.r * size, rank * SMALL_THREADS + threadIdx.x, p.splits * SMALL_THREADS);
    }
    if (p.r != 0 && p.splits > 1) {
        if (threadIdx.x == 0) {
            barrier_init(gathered, 1);
            barriers_visible();
            barrier_expect(gathered, max(p.splits, static_cast<uint32_t>(TILES)) * rank_tiles * SMALL_FRAGMENT);
        }
        __syncwarp();
        cluster_arrive();
    }
    fill_pairs<SMALL_THREADS>(shared, p.quant);
    begin();

    const uint32_t row_chunks = p.k / 32;
    const AbsmaxFrom<NESTED> blocks(p.quant, 0);
    // Of the unit that is loaded next: its row and this lane's sixteen bytes of it.
    uint32_t next_row, next_chunk;
    const auto start = [&] {
        const uint32_t thread = thread_again(), block = block_again(), quad = thread % 4;
        const uint32_t k_group = thread / 128 & (p.k_groups - 1), row_group = over_k_groups(p, thread / 128);
        const uint32_t first = (block & (p.splits - 1)) * p.block_k / 32;
        next_row = over_splits(p, block) * p.groups * p.tile_rows + row_group * 64;
        next_row += thread / 32 % 4 * 16 + thread % 32 / 4;
        next_chunk = first + k_group * (SMALL_DEPTH / 32) + quad;
    };
    const auto load = [&](SmallUnit<NESTED>& unit) {
        const uint32_t chunk = min(next_chunk, row_chunks - 1);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t at = min(next_row + 8 * half, p.n - 1) * row_chunks + chunk;
            unit.codes[half] = load_once<uint4>(p.quant.packed + static_cast<uint64_t>(at) * 16);
            unit.absmax[half].load(blocks, at >> (p.quant.block_shift - 5));
        }
        next_chunk += p.k_groups * (SMALL_DEPTH / 32);
        if (next_chunk >= ((block_again() & (p.splits - 1)) + 1) * p.block_k / 32) {
            next_chunk -= p.block_k / 32;
            next_row += p.tile_rows;
        }
    };
    const NestedScales<NESTED> nested(p.quant);
    uint32_t left = row_tiles * over_k_groups(p, p.block_k / SMALL_DEPTH);  // units
    SmallUnit<NESTED> ring[2];
    start();
    if (TILES < 8) load(ring[0]);  // else later, as registers allow
    load_boxes<TILES, 2>(p, shared + SMALL_PAIRS, column0, min(p.stage_k, p.block_k));
    nested.put(tables, offset);
    fence_async();
    if (TILES == 8) load(ring[0]);
    if (left > 1) load(ring[1]);
    __syncthreads();

    const uint32_t pairs = shared_address(shared), copy = thread_again() % SMALL_COPIES * sizeof(float2);
    const auto pair = [&](uint32_t word, int byte, float scale) {
        return small_pair<T>(pairs + __byte_perm(word, copy, 0x7704 | byte << 4), scale);
    };
    float sums[4 * TILES];

    const auto multiply_unit = [&](const SmallUnit<NESTED>& unit, uint32_t x) {
        float scales[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) scales[half] = unit.absmax[half].value(tables, offset);
        // Products of a step or two are under way while the next values are made.
        constexpr int TOGETHER = 2;
#pragma unroll
        for (int first = 0; first < 8; first += TOGETHER) {
            Fragments a[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int byte = (first + i) % 2 * 2;
                    const uint32_t eight = small_word(unit.codes[half], (first + i) / 2);
                    a[i].part[half] = pair(eight, byte, scales[half]);
                    a[i].part[2 + half] = pair(eight, byte + 1, scales[half]);
                }
            products_begin();
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const uint32_t at = x + (first + i) / 4 * (UNIT_BYTES / 2) + (first + i) % 4 * 32;
                multiply_narrow<T, 8 * TILES, 0, 0>(sums, a[i], operand(at, Swizzle::BYTES_128, 1024), 1);
            }
            products_commit();
            products_wait_but<1>();
        }
    };

#pragma unroll 1
    for (uint32_t tile = 0; left > 0; ++tile) {
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) sums[i] = 0.0f;
#pragma unroll 1
        for (uint32_t begins = 0; begins < p.block_k; begins += p.stage_k) {
            const uint32_t columns = min(p.stage_k, p.block_k - begins);
            const uint32_t column0 = (block_again() & (p.splits - 1)) * p.block_k + begins;
            if (begins + tile > 0 && p.stage_k < p.block_k) {
                __syncthreads();  // all have read what was there
                load_boxes<TILES, 1>(p, shared + SMALL_PAIRS, column0, columns);
                fence_async();
                __syncthreads();
            }
            if (tile == 0 && p.r != 0) {
                if (p.wide) {
                    add_ranks<T, TILES, true>(p, shared, column0, columns, begins == 0);
                } else {
                    add_ranks<T, TILES, false>(p, shared, column0, columns, begins == 0);
                }
                if (begins + p.stage_k >= p.block_k) {
                    __syncthreads();
                    if (p.splits > 1) cluster_wait();  // the others are there
                    send_ranks<TILES>(p, shared, gathered);
                }
            }
            uint32_t x = shared_address(shared + SMALL_PAIRS) + (thread_again() / 128 & (p.k_groups - 1)) * UNIT_BYTES;
            const uint32_t end = x + columns / SMALL_DEPTH * UNIT_BYTES;
#pragma unroll 1
            for (; x < end; x += p.k_groups * UNIT_BYTES, --left) {
                multiply_unit(ring[0], x);
                ring[0] = ring[1];
                if (left > 2) load(ring[1]);
            }
            products_wait_all();
        }
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) asm volatile("" : "+f"(sums[i]));  // no use of them moves up from here

        const uint32_t thread = thread_again(), block = block_again();
        const uint32_t own = thread % 32, group = thread / 128;
        // All have read the sums before.
        if (tile > 0 && p.splits > 1) {
            cluster_wait();
        } else if (tile > 0 || p.r != 0) {
            __syncthreads();
        }
        // Of the block's groups of depth all but the first one put their sums down, and the first one adds them to its own.
        const uint32_t row_fragments = p.tile_rows / 16 * TILES;
        const uint32_t of_depth = group & (p.k_groups - 1);
        const uint32_t of_warp = (over_k_groups(p, group) * 4 + thread / 32 % 4) * TILES;
#pragma unroll 1
        for (uint32_t turn = p.k_groups > 1 ? 0 : 1; turn < 2; ++turn) {
            if ((of_depth == 0) == (turn == 1)) {
#pragma unroll 1
                for (uint32_t other = 1; turn == 1 && other < p.k_groups; ++other) {
                    put_sums<TILES, true>(p, shared, sums, (other - 1) * row_fragments + of_warp);
                }
                put_sums<TILES, false>(p, shared, sums, (max(of_depth, 1u) - 1) * row_fragments + of_warp);
            }
            if (turn == 0) __syncthreads();
        }
        splits_sync(p.splits);
        if (p.r != 0 && p.splits > 1) barrier_wait(gathered, 0);  // and who leaves sooner is written to
        // Each block writes some of the cluster's rows.
        const uint32_t first = (over_splits(p, block) * p.groups + tile) * p.tile_rows;
        const uint32_t mine = (block & (p.splits - 1)) + p.splits * (thread / 32);
#pragma unroll 1
        for (uint32_t i = mine; i < row_fragments; i += p.splits * SMALL_WARPS) {
            const uint32_t row = first + i / TILES * 16, token0 = i % TILES * 8;
            if (row >= p.n || token0 >= p.m) continue;
            const auto total = [&] { return small_total(shared_address(shared + small_sum(p, i * 32 + own)), p.splits); };
            const auto h = [&](uint32_t rank_tile) {
                const uint32_t slot = (over_splits(p, i % TILES) * ((p.r + 15) / 16) + rank_tile) * p.splits;
                return add_fragments(reinterpret_cast<const float4*>(shared + p.received) + slot * 32 + own, p.splits, 1);
            };
            small_finish<T>(p, row, token0, total, h, i < TILES && tile == 0 && block < min(p.splits, TILES));
        }
        __syncwarp();
        if (p.splits > 1) cluster_arrive();
    }
    if (p.splits > 1) cluster_wait();  // no block leaves while another reads its sums
}

}  // namespace ferrotune
