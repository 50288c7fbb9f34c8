// Few rows by a 4-bit weight: y = x W^T + scale x A^T B^T + bias, W's values made in registers; nothing of W is written.
//
// W is the operand of sixteen rows, the tokens are its columns. A lane's sixteen bytes of a row, 32 codes, are what it
// holds of eight steps of sixteen: x is taken in the same order, as it lies. A cluster of `splits` blocks takes rows of W,
// each block a range of their depth; so each also has its part of H = scale x A^T. Sums are added up in a fixed order.
#pragma once

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/lora.cuh"
#include "common/memory.cuh"
#include "common/quant.cuh"

namespace ferrotune {

struct LinearSmall {
    Quant4bit quant;        // [n, k]; packed is aligned to 16 bytes
    const void* x;          // [m, k], aligned to 16 bytes
    void* y;                // [m, n]
    const void* bias;       // [n] in x's type, or null
    const void* lora_bias;  // [n], or null
    const void* lora_a;     // [r, k], aligned to 16 bytes; null without adapter
    const void* lora_b;     // [n, r]
    void* h;                // [m, h_stride] at this projection's columns, or null
    uint64_t h_stride;
    uint32_t m;  // 1 to 8 * TILES
    uint32_t k;  // a multiple of 32
    uint32_t n;
    uint32_t r;        // 0 to 64
    uint32_t h_plane;  // elements from one part of a value to the next
    uint32_t wide;     // 1: the adapter is f32, else of x's type
    uint32_t lora_bias_type;
    float scale;
    uint32_t splits;    // blocks of a cluster
    uint32_t k_warps;   // warps of a block that share its depth: 1, 2, 4 or 8
    uint32_t groups;    // of rows, one after the other
    uint32_t block_k;   // a block's depth, a multiple of 128 * k_warps
    uint32_t stage_k;   // of x in shared memory at a time: block_k, or less with one group and room for two stages
    uint32_t reserved;
};
static_assert(sizeof(LinearSmall) == 176, "src/cuda/lora/small.rs lays it out alike");

constexpr int SMALL_DEPTH = 128;     // of a unit: what the four lanes of a row load at once
constexpr int SMALL_ROW_TILES = 2;   // of sixteen, of a unit
constexpr int SMALL_COPIES = 16;     // of the table of pairs: lanes i and i + 16 have one, in two banks of their own
constexpr int SMALL_AHEAD = 3;       // groups of rows that are on their way to L2
constexpr int SMALL_STRIDE = 256;    // bytes from one byte's copies to the next one's, which one permutation multiplies by
constexpr int SMALL_GAPS = 64;       // fragments of sums that lie in the other halves of the strides

// Where the parts of a block's shared memory lie, in bytes; src/cuda/lora/small.rs adds up the same.
template <int TILES>
struct SmallShared {
    static constexpr uint32_t PAIRS = 256 * SMALL_STRIDE;
    static constexpr uint32_t FRAGMENT = 32 * sizeof(float4);  // of 16 x 8 sums
    uint32_t x, sums, ranks, h, stage;
    __device__ __forceinline__ SmallShared(const LinearSmall& p) {
        stage = (TILES == 1 ? p.m : 8 * TILES) * p.stage_k * 2;
        x = PAIRS;
        sums = x + stage * (p.stage_k < p.block_k ? 2 : 1);
        const uint32_t fragments = WARPS * SMALL_ROW_TILES * p.groups * TILES;
        ranks = sums + (fragments - min(fragments, SMALL_GAPS)) * FRAGMENT;
        h = ranks + (p.r != 0 ? WARPS * TILES * FRAGMENT : 0);
    }
    // Of a lane's sums, counted in lanes and fragments.
    __device__ __forceinline__ uint32_t sum(uint32_t i) const {
        return i < SMALL_GAPS * 32 ? i / 8 * SMALL_STRIDE + SMALL_STRIDE / 2 + i % 8 * 16
                                   : sums + (i - SMALL_GAPS * 32) * 16;
    }
};

// Sixteen bytes a lane of shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 load_shared_of([[maybe_unused]] uint32_t address, [[maybe_unused]] uint32_t rank) {
    float4 found;
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %4, %5;\n\t"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n\t}"
        : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
        : "r"(address), "r"(rank)
        : "memory");
#else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
                 : "r"(address)
                 : "memory");
#endif
    return found;
}

__device__ __forceinline__ void splits_sync([[maybe_unused]] uint32_t splits) {
#if __CUDA_ARCH__ >= 900
    if (splits > 1) {
        cluster_sync();
        return;
    }
#endif
    __syncthreads();
}

// Has a multiple of sixteen bytes brought to L2, which holds for whoever writes there later, too.
__device__ __forceinline__ void prefetch_row([[maybe_unused]] const void* from, [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// A place of a row of x in shared memory: pieces of sixteen bytes are mixed so that two rows and the four lanes of each,
// 64 bytes apart, hit other banks.
__device__ __forceinline__ uint32_t small_place(uint32_t row, uint32_t piece) {
    return (piece ^ (piece >> 3 & 1u) ^ (row & 1u) << 1) * 16;
}

// Depth `column0`.. of x, `columns` of it, to shared memory; zeros from k on.
__device__ __forceinline__ void load_small_x(const LinearSmall& p, unsigned char* to, uint32_t column0,
                                             uint32_t columns) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t row = warp; row < p.m; row += WARPS) {
        const unsigned char* from =
            static_cast<const unsigned char*>(p.x) + (static_cast<uint64_t>(row) * p.k + column0) * 2;
        for (uint32_t piece = lane; piece < columns / 8; piece += 32) {
            const bool inside = column0 + piece * 8 < p.k;
            copy16_async(to + row * columns * 2 + small_place(row, piece), inside ? from + piece * 16 : p.x, inside);
        }
    }
}

// Where a lane's token of each tile lies in shared memory. Of tokens from m on the sums are of no use, whatever is there;
// with a few at most they are the last one's again, which costs no bandwidth.
template <int TILES>
struct SmallToken {
    uint32_t first, step;
    __device__ __forceinline__ SmallToken(uint32_t m, uint32_t pitch) : step(8 * pitch) {
        const uint32_t token = threadIdx.x % 32 / 4;
        first = (TILES == 1 ? min(token, m - 1) : token) * pitch;
    }
    __device__ __forceinline__ uint32_t operator()(int tile) const { return first + tile * step; }
};

// What a lane loads of a unit: of rows lane / 4 + 8i of each row tile.
template <bool NESTED>
struct SmallUnit {
    uint4 codes[SMALL_ROW_TILES][2];
    Absmax<NESTED> absmax[SMALL_ROW_TILES][2];
};

// Two values from a byte's codes.
template <typename T>
__device__ __forceinline__ uint32_t small_pair(const unsigned char* pairs, uint32_t word, int byte, uint32_t lane_place,
                                               float scale) {
    const uint32_t place = __byte_perm(word, lane_place, 0x7704 | byte << 4);
    const float2 two = *reinterpret_cast<const float2*>(pairs + place);
    return pack2<T>(mul_ftz(two.x, scale), mul_ftz(two.y, scale));
}

// Two elements of an adapter's row from `column` on, in the first `parts` parts of x's type; zeros from `columns` on.
template <typename T, int PARTS_LEFT>
__device__ __forceinline__ void split_parts(uint32_t (&parts)[PARTS_LEFT], float first, float second) {
#pragma unroll
    for (int i = 0; i < PARTS_LEFT; ++i) {
        parts[i] = pack2<T>(first, second);
        first = low_part<T>(first);
        second = low_part<T>(second);
    }
}

__device__ __forceinline__ uint4 load_small_piece(const unsigned char* x, uint32_t place) {
    return *reinterpret_cast<const uint4*>(x + place);
}

// The rank's sums over one unit's depth of x in shared memory, onto those in `ranks`: one tile of sixteen ranks.
template <typename T, int TILES>
__device__ __forceinline__ void small_ranks(const LinearSmall& p, const unsigned char* x, uint32_t pitch,
                                            uint32_t unit, uint32_t column0, int tile, float4* ranks) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
    const uint32_t column = column0 + unit * SMALL_DEPTH + 32 * quad;
    const uint32_t row = tile * 16 + lane / 4;
    const bool inside[2] = {row < p.r && column < p.k, row + 8 < p.r && column < p.k};
    const uint32_t mixed = quad / 2 ^ (lane / 4 & 1) << 1;
    const uint32_t first[2] = {row * p.k + column, (row + 8) * p.k + column};
    const uint32_t x_place = unit * (SMALL_DEPTH * 2) + quad * 64;
    const SmallToken<TILES> token_place(p.m, pitch);
    float sums[TILES][4] = {};
    if (!p.wide) {
#pragma unroll 1
        for (int piece = 0; piece < 4; ++piece) {
            uint4 raw[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                raw[i] = inside[i] ? __ldg(static_cast<const uint4*>(p.lora_a) + (first[i] / 8 + piece))
                                   : make_uint4(0, 0, 0, 0);
            }
            const Fragments low = {{raw[0].x, raw[1].x, raw[0].y, raw[1].y}};
            const Fragments high = {{raw[0].z, raw[1].z, raw[0].w, raw[1].w}};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const uint4 b = load_small_piece(x, token_place(t) + x_place + (piece ^ mixed) * 16);
                multiply<T>(sums[t], low, b.x, b.y);
                multiply<T>(sums[t], high, b.z, b.w);
            }
        }
    } else {
#pragma unroll 1
        for (int four = 0; four < 8; ++four) {
            uint32_t parts[2][2][3];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float4 raw = inside[i] ? __ldg(static_cast<const float4*>(p.lora_a) + (first[i] / 4 + four))
                                             : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                split_parts<T>(parts[i][0], raw.x, raw.y);
                split_parts<T>(parts[i][1], raw.z, raw.w);
            }
            // Tensor cores cut their sums off: those of the parts are kept apart for sixteen products.
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const uint2 b = *reinterpret_cast<const uint2*>(x + token_place(t) + x_place + (four / 2 ^ mixed) * 16 +
                                                                four % 2 * 8);
                float few[4] = {};
#pragma unroll
                for (int part = 2; part >= 0; --part) {
                    const Fragments a = {{parts[0][0][part], parts[1][0][part], parts[0][1][part], parts[1][1][part]}};
                    float now[4] = {};
                    multiply<T>(now, a, b.x, b.y);
#pragma unroll
                    for (int i = 0; i < 4; ++i) few[i] = few[i] * (1.0f / PART_SCALE<T>) + now[i];
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[t][i] += few[i];
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        float4 sum = ranks[t * 32 + lane];
        sum.x += sums[t][0], sum.y += sums[t][1], sum.z += sums[t][2], sum.w += sums[t][3];
        ranks[t * 32 + lane] = sum;
    }
}

__device__ __forceinline__ float small_element(const void* from, uint32_t type, uint64_t at) {
    switch (type) {
        case F32: return __ldg(static_cast<const float*>(from) + at);
        case F16: return to_float(static_cast<const f16*>(from)[at]);
        default: return to_float(static_cast<const bf16*>(from)[at]);
    }
}

// Sixteen rows and ranks of B as fragments of its parts.
template <typename T, int PARTS_LEFT>
__device__ __forceinline__ void load_small_b(Fragments (&found)[PARTS_LEFT], const LinearSmall& p, uint32_t row0,
                                             uint32_t column0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = row0 + lane / 4 + i % 2 * 8, column = column0 + 2 * (lane % 4) + i / 2 * 8;
        const uint64_t at = static_cast<uint64_t>(row) * p.r + column;
        float values[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const bool inside = row < p.n && column + j < p.r;
            values[j] = !inside    ? 0.0f
                        : p.wide ? __ldg(static_cast<const float*>(p.lora_b) + at + j)
                                 : to_float(static_cast<const T*>(p.lora_b)[at + j]);
        }
        uint32_t parts[PARTS_LEFT];
        split_parts<T>(parts, values[0], values[1]);
#pragma unroll
        for (int part = 0; part < PARTS_LEFT; ++part) found[part].part[i] = parts[part];
    }
}

// Sums of a fragment over the cluster, in the order of its blocks.
__device__ __forceinline__ float4 small_total(uint32_t address, uint32_t splits) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (uint32_t rank = 0; rank < splits; ++rank) {
        const float4 more = load_shared_of(address, rank);
        total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    return total;
}

// Floor, 14336 x 4096 nested NF4: (29.4 + 0.9) MB at an H200's 4.2 TB/s = 7.2 us; a lookup of 4 bytes a value in shared
// memory takes as long.
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
    // A lane has one of the rows of its warp's group brought: the part of its depth that falls to this warp.
    const auto prefetch = [&](uint32_t group) {
        const uint32_t row = row0 + (group * row_warps + row_warp) * (16 * ROW_TILES) + lane;
        const uint32_t columns = p.block_k / p.k_warps;
        const uint32_t column = blockIdx.x % p.splits * p.block_k + threadIdx.x / 32 % p.k_warps * columns;
        if (group < p.groups && row < p.n && column < p.k) {
            prefetch_row(p.quant.packed + (static_cast<uint64_t>(row) * p.k + column) / 2, min(columns, p.k - column) / 2);
        }
    };

    // Nothing of this depends on the kernel before.
    for (uint32_t group = 0; group < SMALL_AHEAD; ++group) prefetch(group);
    for (int i = threadIdx.x; i < 256 * SMALL_COPIES / 2; i += THREADS) {
        const int byte = i / (SMALL_COPIES / 2), copy = i % (SMALL_COPIES / 2);
        const float high = CODEBOOKS[p.quant.fp4][byte / 16], low = CODEBOOKS[p.quant.fp4][byte % 16];
        reinterpret_cast<float4*>(shared + byte * SMALL_STRIDE)[copy] = make_float4(high, low, high, low);
    }
    begin();

    const uint32_t depth_units = p.block_k / (SMALL_DEPTH * p.k_warps);  // of a warp and group
    const uint32_t units = depth_units * p.groups;
    const uint32_t row_chunks = p.k / 32;  // a lane's codes of a unit and row
    const AbsmaxFrom<NESTED> blocks(p.quant, 0);
    const float offset = nested_offset<NESTED>(p.quant);

    // The group and the unit of its depth that is loaded next.
    uint32_t next_group = 0, next_depth = 0;
    const auto load = [&](SmallUnit<NESTED>& unit) {
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
    SmallUnit<NESTED> ring[2];
    load(ring[0]);
    if (units > 1) load(ring[1]);

    load_small_x(p, shared + place.x, column0, p.stage_k);
    commit_copies();
    tables.template fill<THREADS>(p.quant);
    float4* const my_ranks = reinterpret_cast<float4*>(shared + place.ranks) + warp * TILES * 32;
    const int rank_tiles = (p.r + 15) / 16;
    const int rank_slots = rank_tiles ? WARPS / rank_tiles : 0;
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
        prefetch(group + SMALL_AHEAD);
        ++group;
    };

    // `x`: of depth 0 of this lane's columns.
    const auto multiply_unit = [&](const SmallUnit<NESTED>& unit, uint32_t x) {
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
                    const uint4 codes = unit.codes[tile][half];
                    const uint32_t eight = word == 0 ? codes.x : word == 1 ? codes.y : word == 2 ? codes.z : codes.w;
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
            load_small_x(p, shared + place.x + (~stage & 1) * place.stage, column0 + begins + p.stage_k, p.stage_k);
            commit_copies();
        }
        if (warp < rank_tiles * rank_slots) {
            const uint32_t of_x = min(p.stage_k, p.block_k - begins) / SMALL_DEPTH;
#pragma unroll 1
            for (uint32_t unit = warp / rank_tiles; unit < of_x; unit += rank_slots) {
                small_ranks<T, TILES>(p, shared + x, pitch, unit, column0 + begins, warp % rank_tiles, my_ranks);
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

    const int planes = p.wide ? 3 : 1, columns = 16 * rank_tiles, h_width = planes * columns + 8;
    T* const h_tile = reinterpret_cast<T*>(shared + place.h);  // [8 * TILES][h_width]
    if (rank_tiles) {
        for (uint32_t i = threadIdx.x; i < rank_sums; i += THREADS) {
            const float4 total = small_total(shared_address(block_ranks + i), p.splits);
            const float values[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t token = i / 32 % TILES * 8 + 2 * (i % 4) + j % 2;
                const uint32_t column = i / (32 * TILES) * 16 + i % 32 / 4 + j / 2 * 8;
                float value = values[j] * p.scale;
                for (int plane = 0; plane < planes; ++plane) {
                    const T part = from_float<T>(value);
                    h_tile[token * h_width + plane * columns + column] = part;
                    if (p.h != nullptr && blockIdx.x == 0 && token < p.m) {
                        static_cast<T*>(p.h)[token * p.h_stride + plane * p.h_plane + column] = part;
                    }
                    value = low_part<T>(value);
                }
            }
        }
        __syncthreads();
    }

    // Each block writes some of the cluster's rows.
    T* const y = static_cast<T*>(p.y);
    for (uint32_t i = rank + p.splits * warp; i < fragments; i += p.splits * WARPS) {
        const uint32_t row = row0 + i / TILES * 16, token0 = i % TILES * 8;
        const float4 total = small_total(shared_address(shared + place.sum(i * 32 + lane)), p.splits);
        float out[4] = {total.x, total.y, total.z, total.w};
        for (int segment = 0; segment < rank_tiles; ++segment) {
            const uint32_t* h = reinterpret_cast<const uint32_t*>(h_tile + (token0 + lane / 4) * h_width + segment * 16) + quad;
            if (p.wide) {
                Fragments b[2];
                load_small_b<T>(b, p, row, segment * 16);
                float lower[4] = {};
                multiply<T>(lower, b[1], h[0], h[4]);
                multiply<T>(lower, b[0], h[columns / 2], h[columns / 2 + 4]);
#pragma unroll
                for (int j = 0; j < 4; ++j) out[j] += lower[j] * (1.0f / PART_SCALE<T>);
                multiply<T>(out, b[0], h[0], h[4]);
            } else {
                Fragments b[1];
                load_small_b<T>(b, p, row, segment * 16);
                multiply<T>(out, b[0], h[0], h[4]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t column = row + lane / 4 + 8 * half;
            if (column >= p.n) continue;
            float bias = p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[column]) : 0.0f;
            if (p.lora_bias != nullptr) bias += p.scale * small_element(p.lora_bias, p.lora_bias_type, column);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t token = token0 + 2 * quad + j;
                if (token < p.m) y[static_cast<uint64_t>(token) * p.n + column] = from_float<T>(out[2 * half + j] + bias);
            }
        }
    }
    // No block leaves while another reads its sums.
    __syncwarp();
    if (p.splits > 1) splits_sync(p.splits);
}

}  // namespace ferrotune
