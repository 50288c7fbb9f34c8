// RMSNorm's gradients (rms_norm.cuh has the formulas) by blocks that stay: rows come to shared memory ahead of their use,
// and the weight and the sums of its gradient stay in registers. (Forward is no faster so.)
#pragma once

#include "common/hopper.cuh"
#include "rms_norm.cuh"

namespace ferrotune {

constexpr uint32_t NORM90_STAGES = 8;          // at most
constexpr uint32_t NORM90_SHARED = 104 << 10;  // of a block: two fit a multiprocessor
constexpr int NORM90_WARPS = NORM_THREADS / 32;

// `bytes` in a row, a multiple of sixteen, as both addresses are.
__device__ __forceinline__ void copy_row(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
    uint4 found;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                 : "r"(address)
                 : "memory");
    return found;
}

// The rows of this block of x, the gradient and, where there is one, the residual's, in this order: a stage those of one
// number. The next to be read are at `turn`.
struct NormRows {
    const unsigned char* from[3];
    uint64_t rows, next;
    uint32_t bytes, stage_bytes, memory, barriers, stages, turn, parity;

    __device__ __forceinline__ NormRows(const RmsNorm& p, uint32_t bytes, uint32_t memory, uint32_t barriers)
        : rows(p.rows), next(blockIdx.x), bytes(bytes), stage_bytes((p.residual ? 3 : 2) * bytes), memory(memory),
          barriers(barriers), stages(min(NORM90_STAGES, NORM90_SHARED / stage_bytes)), turn(0), parity(0) {
        const void* const matrices[3] = {p.x, p.grad, p.residual};
#pragma unroll
        for (int i = 0; i < 3; ++i) from[i] = static_cast<const unsigned char*>(matrices[i]);
        if (threadIdx.x == 0) {
            for (uint32_t stage = 0; stage < stages; ++stage) barrier_init(barriers + 8 * stage, 1);
            barriers_visible();
        }
        __syncthreads();
    }

    // Of the row at `turn`.
    __device__ __forceinline__ uint32_t place(int matrix) const { return memory + turn * stage_bytes + matrix * bytes; }

    // One thread's: the next row to `stage`, which nobody reads any more.
    __device__ __forceinline__ void load(uint32_t stage) {
        if (next >= rows) return;
        const uint32_t barrier = barriers + 8 * stage, to = memory + stage * stage_bytes;
        barrier_expect(barrier, stage_bytes);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            if (from[i]) copy_row(to + i * bytes, from[i] + next * bytes, bytes, barrier);
        }
        next += gridDim.x;
    }

    __device__ __forceinline__ void start() {
        if (threadIdx.x == 0) {
            for (uint32_t stage = 0; stage < stages; ++stage) load(stage);
        }
    }

    __device__ __forceinline__ void wait() const { barrier_wait(barriers + 8 * turn, parity); }

    // After all threads have read the row.
    __device__ __forceinline__ void release() {
        if (threadIdx.x == 0) load(turn);
        if (++turn == stages) turn = 0, parity ^= 1;
    }
};

// The block's sum, of two `scratch` in turn: a thread that is a row ahead writes to the other one.
__device__ __forceinline__ float block_sum(float value, float (&scratch)[NORM90_WARPS]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < NORM90_WARPS; ++warp) value += scratch[warp];
    return value;
}

// Sixteen bytes of columns that thread has as vector v.
template <typename T>
__device__ __forceinline__ uint32_t norm_column(int v) {
    return (v * NORM_THREADS + threadIdx.x) * LANES<T>;
}

// KEPT vectors of a row a thread. Floor: as rms_norm_backward.
template <typename T, int KEPT, bool WEIGHT>
__device__ __forceinline__ void rms_norm_backward90(const RmsNorm& p) {
    constexpr int N = LANES<T>;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ float scratch[2][NORM90_WARPS];
    __shared__ __align__(8) uint64_t barriers[NORM90_STAGES];
    NormRows rows(p, p.columns * sizeof(T), shared_address(memory), shared_address(barriers));
    begin();
    rows.start();
    float w[KEPT][N];
#pragma unroll
    for (int v = 0; v < KEPT; ++v) load_weight<T>(p, norm_column<T>(v), w[v]);
    float sums[WEIGHT ? KEPT : 1][N] = {};
    uint32_t other = 0;
    for (uint64_t row = blockIdx.x; row < p.rows; row += gridDim.x, other ^= 1) {
        const float inverse = __ldg(p.inverse + row);
        rows.wait();
        uint4 xs[KEPT], grads[KEPT], more[KEPT];
        float dot = 0.0f;
#pragma unroll
        for (int v = 0; v < KEPT; ++v) {
            const uint32_t column = norm_column<T>(v);
            xs[v] = grads[v] = more[v] = make_uint4(0, 0, 0, 0);
            if (column >= p.columns) continue;
            xs[v] = load_shared16(rows.place(0) + column * sizeof(T));
            grads[v] = load_shared16(rows.place(1) + column * sizeof(T));
            if (p.residual) more[v] = load_shared16(rows.place(2) + column * sizeof(T));
            float x[N], d[N];
            unpack16<T>(xs[v], x);
            unpack16<T>(grads[v], d);
#pragma unroll
            for (int i = 0; i < N; ++i) dot += x[i] * d[i] * w[v][i];
        }
        dot = block_sum(dot, scratch[other]);
        rows.release();
        const float mean = dot * inverse * inverse * inverse / p.columns;
#pragma unroll
        for (int v = 0; v < KEPT; ++v) {
            const uint32_t column = norm_column<T>(v);
            if (column >= p.columns) continue;
            float x[N], d[N], added[N];
            unpack16<T>(xs[v], x);
            unpack16<T>(grads[v], d);
            unpack16<T>(more[v], added);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if constexpr (WEIGHT) sums[v][i] += d[i] * x[i] * inverse;
                d[i] = d[i] * w[v][i] * inverse - x[i] * mean + added[i];
            }
            store16(static_cast<T*>(p.out) + row * p.columns + column, pack16<T>(d));
        }
    }
    if constexpr (WEIGHT) {
        float* partial = p.partial + static_cast<uint64_t>(blockIdx.x) * p.columns;
#pragma unroll
        for (int v = 0; v < KEPT; ++v) {
            const uint32_t column = norm_column<T>(v);
            if (column >= p.columns) continue;
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                *reinterpret_cast<float4*>(partial + column + i) =
                    make_float4(sums[v][i], sums[v][i + 1], sums[v][i + 2], sums[v][i + 3]);
            }
        }
    }
}

}  // namespace ferrotune
