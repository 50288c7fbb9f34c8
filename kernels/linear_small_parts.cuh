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
constexpr int SMALL_STRIDE = 256;    // bytes from one byte's copies to the next one's, which one permutation multiplies by
constexpr int SMALL_GAPS = 64;       // fragments of sums that lie in the other halves of the strides
constexpr uint32_t SMALL_PAIRS = 256 * SMALL_STRIDE;
constexpr uint32_t SMALL_FRAGMENT = 32 * sizeof(float4);  // of 16 x 8 sums

// Of sixteen bytes of those, counted.
__device__ __forceinline__ uint32_t small_gap(uint32_t i) {
    return i / 8 * SMALL_STRIDE + SMALL_STRIDE / 2 + i * 16 % 128;
}

// Where the parts of a block's shared memory lie, in bytes; src/cuda/lora/small.rs adds up the same.
template <int TILES>
struct SmallShared {
    uint32_t x, sums, ranks, h, stage;
    __device__ __forceinline__ SmallShared(const LinearSmall& p) {
        stage = (TILES == 1 ? p.m : 8 * TILES) * p.stage_k * 2;
        x = SMALL_PAIRS;
        sums = x + stage * (p.stage_k < p.block_k ? 2 : 1);
        const uint32_t fragments = WARPS * SMALL_ROW_TILES * p.groups * TILES;
        ranks = sums + (fragments - min(fragments, SMALL_GAPS)) * SMALL_FRAGMENT;
        h = ranks + (p.r != 0 ? WARPS * TILES * SMALL_FRAGMENT : 0);
    }
    // Of a lane's sums, counted in lanes and fragments.
    __device__ __forceinline__ uint32_t sum(uint32_t i) const {
        return i < SMALL_GAPS * 32 ? small_gap(i) : sums + (i - SMALL_GAPS * 32) * 16;
    }
};

// Sixteen bytes a lane of shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 load_shared_of(uint32_t address, uint32_t rank) {
    float4 found;
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %4, %5;\n\t"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n\t}"
        : "=f"(found.x), "=f"(found.y), "=f"(found.z), "=f"(found.w)
        : "r"(address), "r"(rank)
        : "memory");
    return found;
}
__device__ __forceinline__ void store_shared_of(uint32_t address, uint32_t rank, const float (&values)[4]) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n\t}" ::"r"(address),
        "r"(rank), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
        : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void splits_sync(uint32_t splits) {
    if (splits > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
}

__device__ __forceinline__ void add(float4& sum, const float4& more) {
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
}

// Has `rows` rows of `bytes`, `stride` apart, brought to L2 by `threads` threads: for who reads them soon, and for who
// writes there before, too.
__device__ __forceinline__ void prefetch_rows(const void* from, uint32_t rows, uint32_t bytes, uint64_t stride,
                                              uint32_t thread, uint32_t threads) {
    constexpr uint32_t LINE = 128;
    const uint32_t lines = (bytes + LINE - 1) / LINE;
    for (uint32_t i = thread; i < rows * lines; i += threads) {
        const unsigned char* line = static_cast<const unsigned char*>(from) + i / lines * stride + i % lines * LINE;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
}

// Has `bytes`, a multiple of 16 as their address is, brought to L2 by `threads` threads.
__device__ __forceinline__ void prefetch_bulk(const void* from, uint64_t bytes, uint32_t thread, uint32_t threads) {
    constexpr uint64_t PIECE = 4096;
    for (uint64_t at = thread * PIECE; at < bytes; at += threads * PIECE) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(static_cast<const unsigned char*>(from) + at),
                     "r"(static_cast<uint32_t>(min(PIECE, bytes - at))));
    }
}

// A place of a row of x in shared memory: pieces of sixteen bytes are mixed so that two rows and the four lanes of each,
// 64 bytes apart, hit other banks.
__device__ __forceinline__ uint32_t small_place(uint32_t row, uint32_t piece) {
    return (piece ^ (piece >> 3 & 1u) ^ (row & 1u) << 1) * 16;
}

// Depth `column0`.. of x, `columns` of it, to shared memory; zeros from k on.
template <int THREADS>
__device__ __forceinline__ void load_small_x(const LinearSmall& p, unsigned char* to, uint32_t column0,
                                             uint32_t columns) {
    for (uint32_t row = 0; row < p.m; ++row) {
        const unsigned char* from =
            static_cast<const unsigned char*>(p.x) + (static_cast<uint64_t>(row) * p.k + column0) * 2;
        for (uint32_t piece = threadIdx.x; piece < columns / 8; piece += THREADS) {
            const bool inside = column0 + piece * 8 < p.k;
            copy16_async(to + row * columns * 2 + small_place(row, piece), inside ? from + piece * 16 : p.x, inside);
        }
    }
}

// The table of pairs: byte b's values at b * SMALL_STRIDE, SMALL_COPIES times.
template <int THREADS>
__device__ __forceinline__ void fill_pairs(unsigned char* pairs, const Quant4bit& quant) {
    for (int i = threadIdx.x; i < 256 * SMALL_COPIES / 2; i += THREADS) {
        const int byte = i / (SMALL_COPIES / 2), copy = i % (SMALL_COPIES / 2);
        const float high = CODEBOOKS[quant.fp4][byte / 16], low = CODEBOOKS[quant.fp4][byte % 16];
        reinterpret_cast<float4*>(pairs + byte * SMALL_STRIDE)[copy] = make_float4(high, low, high, low);
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
template <bool NESTED, int ROW_TILES>
struct SmallUnit {
    uint4 codes[ROW_TILES][2];
    Absmax<NESTED> absmax[ROW_TILES][2];
};

__device__ __forceinline__ uint32_t small_word(uint4 codes, int word) {
    return word == 0 ? codes.x : word == 1 ? codes.y : word == 2 ? codes.z : codes.w;
}

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

// The rank's sums over one unit's depth of x in shared memory, onto `sums`: one tile of sixteen ranks.
template <typename T, int TILES>
__device__ __forceinline__ void small_ranks(const LinearSmall& p, const unsigned char* x, uint32_t pitch,
                                            uint32_t unit, uint32_t column0, int tile,
                                            float (&sums)[TILES][4]) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
    const uint32_t column = column0 + unit * SMALL_DEPTH + 32 * quad;
    const uint32_t row = tile * 16 + lane / 4;
    const bool inside[2] = {row < p.r && column < p.k, row + 8 < p.r && column < p.k};
    const uint32_t mixed = quad / 2 ^ (lane / 4 & 1) << 1;
    const uint32_t first[2] = {row * p.k + column, (row + 8) * p.k + column};
    const uint32_t x_place = unit * (SMALL_DEPTH * 2) + quad * 64;
    const SmallToken<TILES> token_place(p.m, pitch);
    if (!p.wide) {
        constexpr int TOGETHER = 2;  // under way before the first is used, as registers allow
#pragma unroll 1
        for (int start = 0; start < 4; start += TOGETHER) {
            uint4 raw[TOGETHER][2];
#pragma unroll
            for (int piece = 0; piece < TOGETHER; ++piece)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    raw[piece][i] = inside[i]
                                        ? __ldg(static_cast<const uint4*>(p.lora_a) + (first[i] / 8 + start + piece))
                                        : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
            for (int piece = 0; piece < TOGETHER; ++piece) {
                const Fragments low = {{raw[piece][0].x, raw[piece][1].x, raw[piece][0].y, raw[piece][1].y}};
                const Fragments high = {{raw[piece][0].z, raw[piece][1].z, raw[piece][0].w, raw[piece][1].w}};
                const uint32_t place = x_place + (start + piece ^ mixed) * 16;
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const uint4 b = load_small_piece(x, token_place(t) + place);
                    multiply<T>(sums[t], low, b.x, b.y);
                    multiply<T>(sums[t], high, b.z, b.w);
                }
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
}

__device__ __forceinline__ float small_element(const void* from, uint32_t type, uint64_t at) {
    switch (type) {
        case F32: return __ldg(static_cast<const float*>(from) + at);
        case F16: return to_float(static_cast<const f16*>(from)[at]);
        default: return to_float(static_cast<const bf16*>(from)[at]);
    }
}

// Sixteen rows and ranks of B as fragments of its first two parts, as many as products need.
template <typename T>
__device__ __forceinline__ void load_small_b(Fragments (&found)[2], const LinearSmall& p, uint32_t row0,
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
        uint32_t parts[2];
        split_parts<T>(parts, values[0], values[1]);
        found[0].part[i] = parts[0];
        found[1].part[i] = parts[1];
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

// Sums of a fragment of H, scaled, as parts to `h_tile` [tokens][width], and to H where it is asked for.
template <typename T>
__device__ __forceinline__ void small_h(const LinearSmall& p, const float4& sums, uint32_t tile, uint32_t token0,
                                        int rank_tiles, T* h_tile, int width) {
    const int lane = threadIdx.x % 32;
    const float values[4] = {sums.x, sums.y, sums.z, sums.w};
    const int planes = p.wide ? 3 : 1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint32_t token = token0 + 2 * (lane % 4) + j % 2, column = tile * 16 + lane / 4 + j / 2 * 8;
        float value = values[j] * p.scale;
        for (int plane = 0; plane < planes; ++plane) {
            const T part = from_float<T>(value);
            h_tile[token * width + plane * 16 * rank_tiles + column] = part;
            if (p.h != nullptr && blockIdx.x == 0 && token < p.m) {
                static_cast<T*>(p.h)[token * p.h_stride + plane * p.h_plane + column] = part;
            }
            value = low_part<T>(value);
        }
    }
}

// A fragment of y: its sums, the LoRA term (`b`: of its rows and the first sixteen ranks) and the biases.
template <typename T>
__device__ __forceinline__ void small_finish(const LinearSmall& p, uint32_t row, uint32_t token0, const float4& sums,
                                             Fragments (&b)[2], int rank_tiles, const T* h_tile, int width) {
    const int lane = threadIdx.x % 32, quad = lane % 4, plane = 16 * rank_tiles / 2;
    float out[4] = {sums.x, sums.y, sums.z, sums.w};
    for (int segment = 0; segment < rank_tiles; ++segment) {
        const uint32_t* h = reinterpret_cast<const uint32_t*>(h_tile + (token0 + lane / 4) * width + segment * 16) + quad;
        if (segment > 0) load_small_b<T>(b, p, row, segment * 16);
        if (p.wide) {
            float lower[4] = {};
            multiply<T>(lower, b[1], h[0], h[4]);
            multiply<T>(lower, b[0], h[plane], h[plane + 4]);
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] += lower[j] * (1.0f / PART_SCALE<T>);
        }
        multiply<T>(out, b[0], h[0], h[4]);
    }
    T* const y = static_cast<T*>(p.y);
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

}  // namespace ferrotune
