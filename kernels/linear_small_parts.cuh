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
    uint32_t splits;     // blocks of a cluster
    uint32_t k_groups;   // warpgroups of a block that share its depth: 1, 2 or 4; 1 with few tokens
    uint32_t tile_rows;  // 64 for each of its groups of rows; 16 with few tokens
    uint32_t groups;     // row tiles of a cluster; of a block with few tokens
    uint32_t block_k;    // a block's depth, a multiple of 128 * k_groups; with few tokens columns of x in shared memory
    uint32_t stage_k;    // of x in shared memory at a time, another such multiple; with few tokens a block's depth of H
    // Where parts of a block's dynamic shared memory lie. The table of pairs is at 0, x after it; with few tokens both are
    // elsewhere.
    uint32_t sums;      // those that find no room in the table's gaps; with few tokens those that wait for H
    uint32_t ranks;     // sums of H, a warp's each, with few tokens
    uint32_t received;  // sums of H, a block's each
    uint32_t shifts;    // log2 of `splits`, and 256 times that of `k_groups`
};
static_assert(sizeof(LinearSmall) == 192, "src/cuda/lora/small.rs lays it out alike");

constexpr int SMALL_THREADS = 512;
constexpr uint32_t SMALL_WARPS = SMALL_THREADS / 32;
constexpr uint32_t SMALL_DEPTH = 128;  // of a unit: what the four lanes of a row load at once
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
__device__ __forceinline__ void send_shared(uint32_t address, uint32_t rank, uint32_t barrier, const float4& values) {
    asm volatile(
        "{\n\t.reg .b32 remote, told;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mapa.shared::cluster.u32 told, %2, %1;\n\t"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%3, %4, %5, %6}, [told];\n\t}" ::"r"(
            address),
        "r"(rank), "r"(barrier), "r"(__float_as_uint(values.x)), "r"(__float_as_uint(values.y)),
        "r"(__float_as_uint(values.z)), "r"(__float_as_uint(values.w))
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

// a / power of two, which a division takes some twenty instructions for; and by those that the host knows of.
__device__ __forceinline__ uint32_t over(uint32_t a, uint32_t power) { return a >> (31 - __clz(power)); }
__device__ __forceinline__ uint32_t over_splits(const LinearSmall& p, uint32_t a) { return a >> (p.shifts & 0xFF); }
__device__ __forceinline__ uint32_t over_k_groups(const LinearSmall& p, uint32_t a) { return a >> (p.shifts >> 8); }

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

// An 8 x 8 matrix of 16-bit elements, of whose rows a lane holds two elements as load_matrices says.
__device__ __forceinline__ uint32_t transposed(uint32_t two) {
    uint32_t found;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(two));
    return found;
}

__device__ __forceinline__ void add(float4& sum, const float4& more) {
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
}

// Has `bytes` brought to L2 by `threads` threads: for who reads them soon, and for who writes there before, too.
constexpr uint32_t LINE = 128;
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes, uint32_t thread, uint32_t threads) {
#pragma unroll 1
    for (uint32_t at = thread * LINE; at < bytes; at += threads * LINE) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const unsigned char*>(from) + at));
    }
}

// The same at one instruction for all of them, a multiple of sixteen from an address that is one.
__device__ __forceinline__ void prefetch_bulk(const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// The same for `rows` rows of `bytes`, `stride` apart.
__device__ __forceinline__ void prefetch_rows(const void* from, uint32_t rows, uint32_t bytes, uint64_t stride,
                                              uint32_t threads) {
    // Threads of a warp take turns: so those of all warps do.
    const uint32_t warps = threads / 32, first = threadIdx.x % 32 * warps + threadIdx.x / 32;
#pragma unroll 1
    for (uint32_t row = first; row < rows && bytes > 0; row += threads) {
        prefetch_bulk(static_cast<const unsigned char*>(from) + row * stride, bytes);
    }
}

// The same for what absmax `rows` rows from row0 on have, of columns from column0 on.
template <bool NESTED>
__device__ __forceinline__ void prefetch_absmax(const LinearSmall& p, uint32_t row0, uint32_t rows, uint32_t column0,
                                                uint32_t columns, uint32_t threads) {
    constexpr uint32_t SIZE = NESTED ? 1 : 4;
#pragma unroll 1
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
    constexpr int CHUNKS = SMALL_COPIES / 2, BYTES = THREADS / CHUNKS;  // written at a time
    static_assert(THREADS % CHUNKS == 0 && BYTES % 16 == 0, "a thread's bytes have one low half");
    const int first = threadIdx.x / CHUNKS, copy = threadIdx.x % CHUNKS;
    const float value = codebook_value(threadIdx.x % 16, quant.fp4 != 0);
    const float low = __shfl_sync(0xFFFFFFFFu, value, first % 16);
#pragma unroll
    for (int byte = first; byte < 256 + first; byte += BYTES) {
        const float high = __shfl_sync(0xFFFFFFFFu, value, byte / 16 % 16);
        reinterpret_cast<float4*>(pairs + byte * SMALL_STRIDE)[copy] = make_float4(high, low, high, low);
    }
}

// What absmax of all blocks are computed by, on its way to shared memory: it is not waited for before it is put there.
template <bool NESTED>
struct NestedScales {
    float code = 0.0f, offset = 0.0f;
    __device__ __forceinline__ explicit NestedScales(const Quant4bit& quant) {
        if (NESTED && threadIdx.x < 256) code = __ldg(quant.nested_code + threadIdx.x);
        if (threadIdx.x == 0) offset = nested_offset<NESTED>(quant);
    }
    __device__ __forceinline__ void put(Tables<NESTED>& tables, float& to) const {
        const uint32_t thread = thread_again();
        if (NESTED && thread < 256) tables.nested_code[thread] = code;
        if (NESTED && thread == 0) to = offset;
    }
};

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

}  // namespace ferrotune
