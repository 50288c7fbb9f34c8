// Few rows by a 4-bit weight: y = x W^T + scale x A^T B^T + bias, W's values made in registers; nothing of W is written.
//
// W is the operand of sixteen rows a warp, the tokens are its columns. A lane's sixteen bytes of a row, 32 codes, are what
// it holds of eight steps of sixteen; x is taken in the same order. Sums are added up in a fixed order.
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
    uint32_t m;
    uint32_t k;  // a multiple of 32
    uint32_t n;
    uint32_t r;        // 0 to 64
    uint32_t h_plane;  // elements from one part of a value to the next
    uint32_t wide;     // 1: the adapter is f32, else of x's type
    uint32_t lora_bias_type;
    float scale;
    uint32_t splits;   // blocks of a cluster
    uint32_t k_groups;  // warpgroups of a block that share its depth: 1, 2 or 4; 1 with few tokens
    uint32_t tile_rows;  // 64 for each of its groups of rows; 16 with few tokens
    uint32_t groups;     // row tiles of a cluster; of a block with few tokens
    uint32_t block_k;  // a block's depth, a multiple of 128 * k_groups; with few tokens columns of x in shared memory
    uint32_t stage_k;  // of x in shared memory at a time, another such multiple; with few tokens a block's depth of H
    // Where parts of a block's shared memory lie, beside the table at 0 and x after it.
    uint32_t sums;   // those that find no room in the table's gaps
    uint32_t ranks;  // sums of H
    uint32_t h_tile;
    uint32_t flags, flags2;
    uint32_t slots;  // of H's sums of a rank tile, a warp's each, with few tokens
};
static_assert(sizeof(LinearSmall) == 200, "src/cuda/lora/small.rs lays it out alike");

constexpr int SMALL_DEPTH = 128;  // of a unit: what the four lanes of a row load at once
constexpr int SMALL_THREADS = 512;
constexpr int SMALL_WARPS = SMALL_THREADS / 32;
constexpr int SMALL_GROUPS = SMALL_WARPS / 4;
constexpr int SMALL_COPIES = 16;   // of the table of pairs: lanes i and i + 16 have one, in two banks of their own
constexpr int SMALL_STRIDE = 256;  // bytes from one byte's copies to the next one's, which one permutation multiplies by
constexpr int SMALL_GAPS = 64;     // fragments of sums that lie in the other halves of the strides
constexpr uint32_t SMALL_PAIRS = 256 * SMALL_STRIDE;
constexpr uint32_t SMALL_FRAGMENT = 32 * sizeof(float4);  // of 16 x 8 sums

// Of sixteen bytes of those, counted.
__device__ __forceinline__ uint32_t small_gap(uint32_t i) {
    return i / 8 * SMALL_STRIDE + SMALL_STRIDE / 2 + i * 16 % 128;
}

// A block's dynamic shared memory begins with the table of pairs, and boxes of x start on 1024 bytes.
extern __shared__ __align__(1024) unsigned char small_shared[];

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
// The same to there; barrier `barrier` of that block, at the same place of each, gets to know of the bytes.
__device__ __forceinline__ void send_shared(uint32_t address, uint32_t rank, uint32_t barrier, const float (&values)[4]) {
    asm volatile(
        "{\n\t.reg .b32 remote, told;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mapa.shared::cluster.u32 told, %2, %1;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%3, %4, %5, %6}, [told];\n\t}" ::"r"(
            address),
        "r"(rank), "r"(barrier), "r"(__float_as_uint(values[0])), "r"(__float_as_uint(values[1])),
        "r"(__float_as_uint(values[2])), "r"(__float_as_uint(values[3]))
        : "memory");
}

// Arrives without a word on what was written before, which would take a fence of the whole device.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// All have come here, and see what the others wrote to shared memory: one fence of the device is enough for a block.
__device__ __forceinline__ void splits_sync(uint32_t splits) {
    __syncthreads();
    if (splits == 1) return;
    if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
    __syncwarp();
    cluster_arrive();
    cluster_wait();
}

// Asked for again, so that what follows from them need not be kept in registers until here.
__device__ __forceinline__ uint32_t thread_again() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
__device__ __forceinline__ uint32_t block_again() {
    uint32_t block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}

__device__ __forceinline__ void add(float4& sum, const float4& more) {
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
}

// Has `bytes` brought to L2 by `threads` threads: for who reads them soon, and for who writes there before, too.
constexpr uint32_t LINE = 128;
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes, uint32_t thread, uint32_t threads) {
    for (uint32_t at = thread * LINE; at < bytes; at += threads * LINE) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const unsigned char*>(from) + at));
    }
}

// The same for `rows` rows of `bytes`, `stride` apart: eight threads for one.
__device__ __forceinline__ void prefetch_rows(const void* from, uint32_t rows, uint32_t bytes, uint64_t stride,
                                              uint32_t threads) {
    for (uint32_t row = threadIdx.x / 8; row < rows; row += threads / 8) {
        prefetch(static_cast<const unsigned char*>(from) + row * stride, bytes, threadIdx.x % 8, 8);
    }
}

// The same for what absmax `rows` rows from row0 on have, of columns from column0 on.
template <bool NESTED>
__device__ __forceinline__ void prefetch_absmax(const LinearSmall& p, uint32_t row0, uint32_t rows, uint32_t column0,
                                                uint32_t columns, uint32_t threads) {
    constexpr uint32_t SIZE = NESTED ? 1 : 4;
    for (uint32_t row = threadIdx.x; row < rows; row += threads) {
        const uint64_t first = (static_cast<uint64_t>(row0 + row) * p.k + column0) >> p.quant.block_shift;
        prefetch(static_cast<const unsigned char*>(p.quant.absmax) + first * SIZE,
                 ((columns - 1 >> p.quant.block_shift) + 1) * SIZE, 0, 1);
        if (NESTED) prefetch(p.quant.nested_absmax + (first >> p.quant.nested_shift), 4, 0, 1);
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

// What a lane loads of a unit, sixteen rows: of rows lane / 4 + 8i.
template <bool NESTED>
struct SmallUnit {
    uint4 codes[2];
    Absmax<NESTED> absmax[2];
};

__device__ __forceinline__ uint32_t small_word(uint4 codes, int word) {
    return word == 0 ? codes.x : word == 1 ? codes.y : word == 2 ? codes.z : codes.w;
}

// Two values of those at `address` of the table, scaled.
template <typename T>
__device__ __forceinline__ uint32_t small_pair(uint32_t address, float scale) {
    float2 two;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(address));
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

// Sums of sixteen ranks over one unit's depth, from `column0` on, onto `sums`. `x(t, two)` brings steps 2 * two and the
// next of token tile t, as operands.
template <typename T, int TILES, typename X>
__device__ __forceinline__ void small_ranks(const LinearSmall& p, uint32_t column0, int tile, const X& x,
                                            float (&sums)[TILES][4]) {
    const int lane = threadIdx.x % 32, quad = lane % 4;
    const uint32_t column = column0 + 32 * quad, row = tile * 16 + lane / 4;
    const bool inside[2] = {row < p.r && column < p.k, row + 8 < p.r && column < p.k};
    const uint32_t first[2] = {row * p.k + column, (row + 8) * p.k + column};
    if (!p.wide) {
        constexpr int TOGETHER = 4;  // under way before the first is used, as registers allow
#pragma unroll 1
        for (int start = 0; start < 4; start += TOGETHER) {
            uint4 raw[TOGETHER][2];
#pragma unroll
            for (int two = 0; two < TOGETHER; ++two)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    raw[two][i] = inside[i]
                                      ? __ldg(static_cast<const uint4*>(p.lora_a) + (first[i] / 8 + start + two))
                                      : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
            for (int two = 0; two < TOGETHER; ++two) {
                const Fragments low = {{raw[two][0].x, raw[two][1].x, raw[two][0].y, raw[two][1].y}};
                const Fragments high = {{raw[two][0].z, raw[two][1].z, raw[two][0].w, raw[two][1].w}};
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const Fragments b = x(t, start + two);
                    multiply<T>(sums[t], low, b.part[0], b.part[1]);
                    multiply<T>(sums[t], high, b.part[2], b.part[3]);
                }
            }
        }
        return;
    }
#pragma unroll 1
    for (int step = 0; step < 8; ++step) {
        uint32_t parts[2][2][3];  // of two rows, two pairs
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 raw = inside[i] ? __ldg(static_cast<const float4*>(p.lora_a) + (first[i] / 4 + step))
                                         : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            split_parts<T>(parts[i][0], raw.x, raw.y);
            split_parts<T>(parts[i][1], raw.z, raw.w);
        }
        // Tensor cores cut their sums off: those of the parts are kept apart for sixteen products.
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const Fragments both = x(t, step / 2);
            const uint32_t b0 = step % 2 ? both.part[2] : both.part[0], b1 = step % 2 ? both.part[3] : both.part[1];
            float few[4] = {};
#pragma unroll
            for (int part = 2; part >= 0; --part) {
                const Fragments a = {{parts[0][0][part], parts[1][0][part], parts[0][1][part], parts[1][1][part]}};
                float now[4] = {};
                multiply<T>(now, a, b0, b1);
#pragma unroll
                for (int i = 0; i < 4; ++i) few[i] = few[i] * (1.0f / PART_SCALE<T>) + now[i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][i] += few[i];
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
        if (p.r % 2 == 0 && aligned(static_cast<const unsigned char*>(p.lora_b), 8)) {  // both at once
            const bool inside = row < p.n && column < p.r;
            float2 both = make_float2(0.0f, 0.0f);
            if (inside && p.wide) both = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(p.lora_b) + at));
            if (inside && !p.wide) {
                both = unpack2<T>(__ldg(reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.lora_b) + at)));
            }
            values[0] = both.x;
            values[1] = both.y;
        } else {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const bool inside = row < p.n && column + j < p.r;
                values[j] = !inside  ? 0.0f
                            : p.wide ? __ldg(static_cast<const float*>(p.lora_b) + at + j)
                                     : to_float(static_cast<const T*>(p.lora_b)[at + j]);
            }
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
        add(total, more);
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
