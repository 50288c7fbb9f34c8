// RMSNorm (Zhang and Sennrich, 2019), with a residual added before it, and its gradients.
#pragma once

#include "common/launch.cuh"
#include "common/vectors.cuh"

namespace ferrotune {

struct RmsNorm {
    const void* x;         // [rows, columns], contiguous, as all matrices here
    const void* residual;  // null: none. In backward: a gradient that is added to that of x
    void* sum;             // forward, with a residual: x + residual, rounded; it is what is normalised
    const void* weight;    // [columns], of the type of x, or f32 with `wide`
    const void* grad;      // backward: of `out`
    void* out;             // forward: weight * x / rms(x). backward: the gradient of x
    float* inverse;        // [rows]: 1 / rms, written by forward and read by backward
    float* partial;        // backward: [groups, columns], sums of the weight's gradient; null: not asked for
    uint64_t rows;
    uint32_t columns;
    float epsilon;
    float offset;  // added to the weight: 1 for Gemma's
    uint32_t wide;
    uint32_t vectors;  // 1: rows of all matrices, the weight and `partial` are aligned to 16 bytes, and `columns`
                       // is a multiple of 16 bytes of x
    uint32_t reserved;
};
static_assert(sizeof(RmsNorm) == 96, "src/cuda/rms_norm.rs lays it out alike");

constexpr int NORM_THREADS = 256;
constexpr int NORM_HALF = 128;  // of rows that so many threads keep
constexpr int NORM_KEPT = 4;  // vectors of a row that a thread keeps in registers

// AGAIN: `scratch` may be in use from before.
template <int GROUP, bool AGAIN>
__device__ __forceinline__ float group_sum(float value, float* scratch) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if constexpr (GROUP > 32) {
        if constexpr (AGAIN) __syncthreads();
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
        __syncthreads();
        value = 0.0f;
#pragma unroll
        for (int warp = 0; warp < GROUP / 32; ++warp) value += scratch[warp];
    }
    return value;
}

// VECTORS: `vectors` is 1.
template <typename T, bool VECTORS = false>
__device__ __forceinline__ void load_weight(const RmsNorm& p, uint32_t column, float (&w)[LANES<T>]) {
    if (p.wide) {
        const float* weight = static_cast<const float*>(p.weight) + column;
#pragma unroll
        for (int i = 0; i < LANES<T>; ++i) w[i] = column + i < p.columns ? weight[i] : 0.0f;
    } else {
        unpack16<T>(load_lanes(static_cast<const T*>(p.weight), column, p.columns, VECTORS || p.vectors), w);
    }
#pragma unroll
    for (int i = 0; i < LANES<T>; ++i) w[i] += p.offset;
}

// The row's next LANES<T> elements from `column`: x, or x + residual rounded to T, which is written.
template <typename T, bool VECTORS>
__device__ __forceinline__ uint4 load_row(const RmsNorm& p, uint64_t at, uint32_t column) {
    const bool vectors = VECTORS || p.vectors;
    uint4 raw = load_lanes(static_cast<const T*>(p.x) + at, column, p.columns, vectors);
    if (!p.residual) return raw;
    float a[LANES<T>], b[LANES<T>];
    unpack16<T>(raw, a);
    unpack16<T>(load_lanes(static_cast<const T*>(p.residual) + at, column, p.columns, vectors), b);
#pragma unroll
    for (int i = 0; i < LANES<T>; ++i) a[i] += b[i];
    store_lanes(static_cast<T*>(p.sum) + at, column, p.columns, vectors, a);
    return pack16<T>(a);
}

// GROUP threads a row, of which each keeps KEPT vectors and reads the rest again; with VECTORS there is no rest.
// Floor: (2, or 4 with a residual) * rows * columns * sizeof(T) / 2.96 TB/s.
template <typename T, int GROUP, int KEPT, bool VECTORS>
__device__ __forceinline__ void rms_norm(const RmsNorm& p) {
    constexpr int N = LANES<T>;
    constexpr int STEP = GROUP * N;
    __shared__ float scratch[NORM_THREADS / 32];
    // Of a warp a row there are several in a block.
    uint64_t row = GROUP == 32 ? static_cast<uint64_t>(blockIdx.x) * (NORM_THREADS / 32) + threadIdx.x / 32 : blockIdx.x;
    if (GROUP == 32 && row >= p.rows) return;
    uint64_t at = row * p.columns;
    uint32_t first = threadIdx.x % GROUP * N;
    uint4 kept[KEPT];
    float squares = 0.0f;
    auto add = [&](uint4 raw) {
        float x[N];
        unpack16<T>(raw, x);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += x[i] * x[i];
    };
#pragma unroll
    for (int v = 0; v < KEPT; ++v) {
        kept[v] = first + v * STEP < p.columns ? load_row<T, VECTORS>(p, at, first + v * STEP) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int v = 0; v < KEPT; ++v) add(kept[v]);
    if constexpr (!VECTORS) {
        for (uint32_t column = first + KEPT * STEP; column < p.columns; column += STEP) {
            add(load_row<T, VECTORS>(p, at, column));
        }
    }
    uint4 weights[VECTORS ? KEPT : 1] = {};
    if constexpr (VECTORS) {  // under way while the row is summed
#pragma unroll
        for (int v = 0; v < KEPT; ++v) {
            weights[v] = p.wide ? make_uint4(0, 0, 0, 0)
                                : load_lanes(static_cast<const T*>(p.weight), first + v * STEP, p.columns, true);
        }
    }
    squares = group_sum<GROUP, false>(squares, scratch);
#pragma unroll
    for (int v = 0; v < KEPT; ++v) {  // unpacked again, not kept so: the more rows are under way
        asm volatile("" : "+r"(kept[v].x), "+r"(kept[v].y), "+r"(kept[v].z), "+r"(kept[v].w));
    }
    float inverse = rsqrtf(squares / p.columns + p.epsilon);
    if (p.inverse && threadIdx.x % GROUP == 0) p.inverse[row] = inverse;
    auto write = [&](uint4 raw, uint32_t column, int v) {
        float x[N], w[N];
        unpack16<T>(raw, x);
        if (VECTORS && !p.wide) {
            unpack16<T>(weights[v], w);
#pragma unroll
            for (int i = 0; i < N; ++i) w[i] += p.offset;
        } else {
            load_weight<T, VECTORS>(p, column, w);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = x[i] * inverse * w[i];
        store_lanes(static_cast<T*>(p.out) + at, column, p.columns, VECTORS || p.vectors, x);
    };
#pragma unroll
    for (int v = 0; v < KEPT; ++v) {
        if (first + v * STEP < p.columns) write(kept[v], first + v * STEP, v);
    }
    if constexpr (!VECTORS) {
        // What this thread itself wrote or read before.
        const T* again = static_cast<const T*>(p.residual ? p.sum : p.x) + at;
        for (uint32_t column = first + KEPT * STEP; column < p.columns; column += STEP) {
            write(load_lanes(again, column, p.columns, p.vectors), column, 0);
        }
    }
}

// With x^ = x / rms: dx = (w dy - x^ mean(w dy x^)) / rms (+ residual), dw = sum over rows of dy x^.
// WEIGHT: columns are at most NORM_KEPT vectors a thread; group g of all writes row g of `partial`.
// Floor: 3 (4 with a residual) * rows * columns * sizeof(T) / 2.96 TB/s.
template <typename T, int GROUP, bool WEIGHT>
__device__ __forceinline__ void rms_norm_backward(const RmsNorm& p) {
    constexpr int N = LANES<T>;
    constexpr int STEP = GROUP * N;
    constexpr int GROUPS = NORM_THREADS / GROUP;
    __shared__ float scratch[NORM_THREADS / 32];
    uint64_t group = static_cast<uint64_t>(blockIdx.x) * GROUPS + threadIdx.x / GROUP;
    uint64_t groups = static_cast<uint64_t>(gridDim.x) * GROUPS;
    uint32_t first = threadIdx.x % GROUP * N;
    float sums[WEIGHT ? NORM_KEPT : 1][N] = {};
    for (uint64_t row = group; row < p.rows; row += groups) {
        uint64_t at = row * p.columns;
        const T* x_row = static_cast<const T*>(p.x) + at;
        const T* grad_row = static_cast<const T*>(p.grad) + at;
        float inverse = p.inverse[row];
        uint4 xs[NORM_KEPT], grads[NORM_KEPT];
        float dot = 0.0f;
        auto add = [&](uint4 raw_x, uint4 raw_grad, uint32_t column) {
            float x[N], d[N], w[N];
            unpack16<T>(raw_x, x);
            unpack16<T>(raw_grad, d);
            load_weight<T>(p, column, w);
#pragma unroll
            for (int i = 0; i < N; ++i) dot += x[i] * d[i] * w[i];
        };
#pragma unroll
        for (int v = 0; v < NORM_KEPT; ++v) {
            bool in = first + v * STEP < p.columns;
            xs[v] = in ? load_lanes(x_row, first + v * STEP, p.columns, p.vectors) : make_uint4(0, 0, 0, 0);
            grads[v] = in ? load_lanes(grad_row, first + v * STEP, p.columns, p.vectors) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int v = 0; v < NORM_KEPT; ++v) {
            if (first + v * STEP < p.columns) add(xs[v], grads[v], first + v * STEP);
        }
        if constexpr (!WEIGHT) {
            for (uint32_t column = first + NORM_KEPT * STEP; column < p.columns; column += STEP) {
                add(load_lanes(x_row, column, p.columns, p.vectors),
                    load_lanes(grad_row, column, p.columns, p.vectors), column);
            }
        }
        dot = group_sum<GROUP, true>(dot, scratch);
        float mean = dot * inverse * inverse * inverse / p.columns;
        auto write = [&](uint4 raw_x, uint4 raw_grad, uint32_t column, float(&sum)[N]) {
            float x[N], d[N], w[N];
            unpack16<T>(raw_x, x);
            unpack16<T>(raw_grad, d);
            load_weight<T>(p, column, w);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if constexpr (WEIGHT) sum[i] += d[i] * x[i] * inverse;
                d[i] = d[i] * w[i] * inverse - x[i] * mean;
            }
            if (p.residual) {
                unpack16<T>(load_lanes(static_cast<const T*>(p.residual) + at, column, p.columns, p.vectors), x);
#pragma unroll
                for (int i = 0; i < N; ++i) d[i] += x[i];
            }
            store_lanes(static_cast<T*>(p.out) + at, column, p.columns, p.vectors, d);
        };
#pragma unroll
        for (int v = 0; v < NORM_KEPT; ++v) {
            if (first + v * STEP < p.columns) write(xs[v], grads[v], first + v * STEP, sums[WEIGHT ? v : 0]);
        }
        if constexpr (!WEIGHT) {
            for (uint32_t column = first + NORM_KEPT * STEP; column < p.columns; column += STEP) {
                write(load_lanes(x_row, column, p.columns, p.vectors),
                      load_lanes(grad_row, column, p.columns, p.vectors), column, sums[0]);
            }
        }
    }
    if constexpr (WEIGHT) {
        float* partial = p.partial + group * p.columns;
#pragma unroll
        for (int v = 0; v < NORM_KEPT; ++v) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                uint32_t column = first + v * STEP + i;
                if (column < p.columns) partial[column] = sums[v][i];
            }
        }
    }
}

struct NormWeight {
    const float* partial;  // [groups, columns]
    void* out;             // [columns]
    uint32_t groups;
    uint32_t columns;
};
static_assert(sizeof(NormWeight) == 24, "src/cuda/rms_norm.rs lays it out alike");

// The sums of the groups: 32 columns a block, every eighth group a warp.
template <typename T>
__device__ __forceinline__ void norm_weight(const NormWeight& p) {
    constexpr int WARPS = NORM_THREADS / 32;
    __shared__ float sums[WARPS][32];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < p.columns) {
#pragma unroll 8
        for (uint32_t group = warp; group < p.groups; group += WARPS) {
            sum += p.partial[static_cast<uint64_t>(group) * p.columns + column];
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= p.columns) return;
#pragma unroll
    for (int other = 1; other < WARPS; ++other) sum += sums[other][lane];
    static_cast<T*>(p.out)[column] = from_float<T>(sum);
}

}  // namespace ferrotune
