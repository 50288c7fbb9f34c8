// Gated linear units (Shazeer, 2020): out = activation(gate) * up, and its gradients.
#pragma once

#include "common/launch.cuh"
#include "common/vectors.cuh"

namespace ferrotune {

enum Activation : uint32_t { SILU, GELU_TANH, GELU };

struct Glu {
    const void* gate;  // [rows, columns], rows `stride` elements apart, as those of `up`
    const void* up;
    void* out;         // [rows, columns], contiguous; null in backward where it is not asked for
    const void* grad;  // of `out`, contiguous; null in forward
    void* grad_gate;   // rows `grad_stride` elements apart, as those of `grad_up`
    void* grad_up;
    uint64_t stride;
    uint64_t grad_stride;
    uint32_t columns;
    uint32_t tiles;  // of GLU_TILE<T> columns in a row; a block each
    uint32_t activation;
    uint32_t vectors;  // 1: every row of every operand is aligned to 16 bytes, and so is `columns`
};
static_assert(sizeof(Glu) == 80, "src/cuda/glu.rs lays it out alike");

constexpr int GLU_THREADS = 256;
constexpr int GLU_VECTORS = 2;  // of 16 bytes, of each operand, a thread
template <typename T>
constexpr int GLU_TILE = GLU_THREADS * GLU_VECTORS * LANES<T>;

// e^x, 1/x and tanh: to rounding for f32, to 2^-20 for types of 16 bits.
template <bool EXACT>
__device__ __forceinline__ float exponential(float x) {
    return EXACT ? expf(x) : __expf(x);
}
template <bool EXACT>
__device__ __forceinline__ float quotient(float a, float b) {
    return EXACT ? a / b : __fdividef(a, b);
}
template <bool EXACT>
__device__ __forceinline__ float tangent(float x) {
    return EXACT ? tanhf(x) : 1.0f - 2.0f * __fdividef(1.0f, 1.0f + __expf(2.0f * x));
}

// The activation's value and, with SLOPE, its derivative.
template <bool EXACT, bool SLOPE>
__device__ __forceinline__ float2 activate(uint32_t activation, float x) {
    if (activation == SILU) {
        // 1 / (1 + e^-x); __fdividef gives 0 for denominators above 2^126, as is wanted.
        float sigmoid = quotient<EXACT>(1.0f, 1.0f + exponential<EXACT>(-x));
        return make_float2(x * sigmoid, SLOPE ? sigmoid * (1.0f + x * (1.0f - sigmoid)) : 0.0f);
    }
    if (activation == GELU_TANH) {
        constexpr float A = 0.7978845608028654f;  // sqrt(2 / pi)
        constexpr float B = 0.044715f;
        float t = tangent<EXACT>(A * (x + B * x * x * x));
        float slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * A * (1.0f + 3.0f * B * x * x);
        return make_float2(0.5f * x * (1.0f + t), slope);
    }
    constexpr float INV_SQRT2 = 0.7071067811865476f;
    constexpr float INV_SQRT_2PI = 0.3989422804014327f;
    float below = 0.5f * (1.0f + erff(x * INV_SQRT2));
    return make_float2(x * below, SLOPE ? below + x * INV_SQRT_2PI * exponential<EXACT>(-0.5f * x * x) : 0.0f);
}

// Floors: forward 3 * rows * columns * sizeof(T) / 2.96 TB/s, backward 5 (6 with `out`).
// `out` may share memory with nothing, the gradients with `grad`.
template <typename T, bool BACKWARD>
__device__ __forceinline__ void glu(const Glu& p) {
    constexpr bool EXACT = sizeof(T) == 4;
    constexpr int N = LANES<T>;
    uint32_t row = blockIdx.x / p.tiles;
    uint32_t tile = blockIdx.x % p.tiles;
    const T* gate = static_cast<const T*>(p.gate) + row * p.stride;
    const T* up = static_cast<const T*>(p.up) + row * p.stride;
    uint64_t dense = static_cast<uint64_t>(row) * p.columns;
    T* out = static_cast<T*>(p.out) + dense;
    uint32_t first = tile * GLU_TILE<T> + threadIdx.x * N;
    uint4 gates[GLU_VECTORS], ups[GLU_VECTORS], grads[GLU_VECTORS];
#pragma unroll
    for (int v = 0; v < GLU_VECTORS; ++v) {
        uint32_t column = first + v * GLU_THREADS * N;
        gates[v] = load_lanes(gate, column, p.columns, p.vectors);
        ups[v] = load_lanes(up, column, p.columns, p.vectors);
        if constexpr (BACKWARD) {
            grads[v] = load_lanes(static_cast<const T*>(p.grad) + dense, column, p.columns, p.vectors);
        }
    }
#pragma unroll
    for (int v = 0; v < GLU_VECTORS; ++v) {
        uint32_t column = first + v * GLU_THREADS * N;
        float g[N], u[N], y[N];
        unpack16<T>(gates[v], g);
        unpack16<T>(ups[v], u);
        if constexpr (!BACKWARD) {
#pragma unroll
            for (int i = 0; i < N; ++i) y[i] = activate<EXACT, false>(p.activation, g[i]).x * u[i];
            store_lanes(out, column, p.columns, p.vectors, y);
        } else {
            float d[N];
            unpack16<T>(grads[v], d);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float2 a = activate<EXACT, true>(p.activation, g[i]);
                y[i] = a.x * u[i];
                g[i] = d[i] * u[i] * a.y;
                u[i] = d[i] * a.x;
            }
            if (p.out) store_lanes(out, column, p.columns, p.vectors, y);
            store_lanes(static_cast<T*>(p.grad_gate) + row * p.grad_stride, column, p.columns, p.vectors, g);
            store_lanes(static_cast<T*>(p.grad_up) + row * p.grad_stride, column, p.columns, p.vectors, u);
        }
    }
}

}  // namespace ferrotune
