// Few rows by a 4-bit weight: H = scale x A^T, the LoRA term, and what of y is written.
#pragma once

#include "linear_small_parts.cuh"

namespace ferrotune {

// Two values, side by side, in their first COUNT parts of type T.
template <typename T, int COUNT>
__device__ __forceinline__ void split_parts(uint32_t (&parts)[COUNT], float first, float second) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
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
        uint4 raw[4][2];  // all under way before the first is used
#pragma unroll
        for (int two = 0; two < 4; ++two)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                raw[two][i] = inside[i] ? __ldg(static_cast<const uint4*>(p.lora_a) + (first[i] / 8 + two))
                                        : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
        for (int two = 0; two < 4; ++two) {
            const Fragments low = {{raw[two][0].x, raw[two][1].x, raw[two][0].y, raw[two][1].y}};
            const Fragments high = {{raw[two][0].z, raw[two][1].z, raw[two][0].w, raw[two][1].w}};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const Fragments b = x(t, two);
                multiply<T>(sums[t], low, b.part[0], b.part[1]);
                multiply<T>(sums[t], high, b.part[2], b.part[3]);
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
