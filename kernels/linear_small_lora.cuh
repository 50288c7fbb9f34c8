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

// What a lane has of sixteen ranks by a quarter of a unit: of rows lane / 4 and lane / 4 + 8 the eight columns from
// 32(lane % 4) + 8 * piece on. WIDE: the adapter is f32, and its values are loaded as they are multiplied.
template <bool WIDE>
struct RankPiece {
    uint4 raw[2];
    const uint4* from[2];  // null: zeros

    // Zeros from column `end` on.
    __device__ __forceinline__ void load(const LinearSmall& p, uint32_t column0, uint32_t end, uint32_t piece,
                                         uint32_t tile) {
        const uint32_t lane = thread_again() % 32;
        const uint32_t column = column0 + 32 * (lane % 4) + 8 * piece;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = tile * 16 + lane / 4 + 8 * half;
            const bool inside = row < p.r && column < end;
            from[half] = static_cast<const uint4*>(p.lora_a) + (row * p.k + column) / (WIDE ? 4 : 8);
            if constexpr (WIDE) {
                if (!inside) from[half] = nullptr;
            } else {
                raw[half] = inside ? __ldg(from[half]) : make_uint4(0, 0, 0, 0);
            }
        }
    }

    // Onto the sums of token tiles; `x(t)` brings token tile t of the piece's columns, two operands.
    template <typename T, int TILES, typename X>
    __device__ __forceinline__ void multiply_by(const X& x, float (&sums)[TILES][4]) const {
        if constexpr (!WIDE) {
            const Fragments low = {{raw[0].x, raw[1].x, raw[0].y, raw[1].y}};
            const Fragments high = {{raw[0].z, raw[1].z, raw[0].w, raw[1].w}};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const Fragments b = x(t);
                multiply<T>(sums[t], low, b.part[0], b.part[1]);
                multiply<T>(sums[t], high, b.part[2], b.part[3]);
            }
        } else {
#pragma unroll 1
            for (int step = 0; step < 2; ++step) {
                uint32_t parts[2][2][3];  // of two rows, two pairs
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 four = from[half] != nullptr ? __ldg(from[half] + step) : make_uint4(0, 0, 0, 0);
                    split_parts<T>(parts[half][0], __uint_as_float(four.x), __uint_as_float(four.y));
                    split_parts<T>(parts[half][1], __uint_as_float(four.z), __uint_as_float(four.w));
                }
                // Tensor cores cut their sums off: those of the parts are kept apart for sixteen products.
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const Fragments both = x(t);
                    const uint32_t b0 = step ? both.part[2] : both.part[0], b1 = step ? both.part[3] : both.part[1];
                    float few[4] = {};
#pragma unroll
                    for (int i = 2; i >= 0; --i) {
                        const Fragments a = {{parts[0][0][i], parts[1][0][i], parts[0][1][i], parts[1][1][i]}};
                        float now[4] = {};
                        multiply<T>(now, a, b0, b1);
#pragma unroll
                        for (int j = 0; j < 4; ++j) few[j] = few[j] * (1.0f / PART_SCALE<T>) + now[j];
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[t][i] += few[i];
                }
            }
        }
    }
};

// A lane's sums of `count` fragments, `stride` apart, in their order.
__device__ __forceinline__ float4 add_fragments(const float4* from, uint32_t count, uint32_t stride) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (uint32_t i = 0; i < count; ++i, from += stride * 32) add(total, *from);
    return total;
}

// A fragment of H, whose sums these are, as the second operand of a product with B: `parts` [plane][ranks 0 to 7, 8 to
// 15], and to H where it is asked for.
template <typename T>
__device__ __forceinline__ void small_h(const LinearSmall& p, const float4& sums, uint32_t tile, uint32_t token0,
                                        bool writes, uint32_t (&parts)[3][2]) {
    uint32_t halves[2][3];
    split_parts<T>(halves[0], sums.x * p.scale, sums.y * p.scale);
    split_parts<T>(halves[1], sums.z * p.scale, sums.w * p.scale);
    const uint32_t lane = thread_again() % 32, planes = p.wide ? 3 : 1;
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
        if (plane >= planes) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t both = halves[half][plane];
            if (writes && p.h != nullptr) {
                const uint32_t token = token0 + 2 * (lane % 4), column = tile * 16 + lane / 4 + half * 8;
                uint16_t* const to = static_cast<uint16_t*>(p.h) + token * p.h_stride + plane * p.h_plane + column;
                if (token < p.m) to[0] = static_cast<uint16_t>(both);
                if (token + 1 < p.m) to[p.h_stride] = static_cast<uint16_t>(both >> 16);
            }
            parts[plane][half] = transposed(both);
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
    const uint32_t lane = thread_again() % 32;
    const bool pairs = !p.wide && p.r % 2 == 0 && aligned(static_cast<const unsigned char*>(p.lora_b), 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = row0 + lane / 4 + i % 2 * 8, column = column0 + 2 * (lane % 4) + i / 2 * 8;
        const bool inside = row < p.n && column < p.r;
        const uint64_t at = static_cast<uint64_t>(row) * p.r + column;
        found[0].part[i] = found[1].part[i] = 0;
        if (pairs && inside) found[0].part[i] = __ldg(static_cast<const uint32_t*>(p.lora_b) + at / 2);
    }
    if (pairs) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = row0 + lane / 4 + i % 2 * 8, column = column0 + 2 * (lane % 4) + i / 2 * 8;
        const uint64_t at = static_cast<uint64_t>(row) * p.r + column;
        float values[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const bool inside = row < p.n && column + j < p.r;
            values[j] = !inside  ? 0.0f
                        : p.wide ? __ldg(static_cast<const float*>(p.lora_b) + at + j)
                                 : to_float(static_cast<const T*>(p.lora_b)[at + j]);
        }
        uint32_t parts[2];
        split_parts<T>(parts, values[0], values[1]);
        found[0].part[i] = parts[0];
        found[1].part[i] = parts[1];
    }
}

// A fragment of y: a lane's sums that `sums()` brings, the LoRA term by its sums of H that `ranks(tile)` brings, and the
// biases. `writes`: H, too.
template <typename T, typename Sums, typename Ranks>
__device__ __forceinline__ void small_finish(const LinearSmall& p, uint32_t row, uint32_t token0, const Sums& sums,
                                             const Ranks& ranks, bool writes) {
    const uint32_t lane = thread_again() % 32, quad = lane % 4;
    float out[4];
#pragma unroll 1
    for (uint32_t tile = 0;; ++tile) {
        const bool more = tile * 16 < p.r;
        Fragments b[2];  // under way while sums come
        if (more) load_small_b<T>(b, p, row, tile * 16);
        if (tile == 0) {
            const float4 found = sums();
            out[0] = found.x, out[1] = found.y, out[2] = found.z, out[3] = found.w;
        }
        if (!more) break;
        uint32_t h[3][2];
        small_h<T>(p, ranks(tile), tile, token0, writes, h);
        if (p.wide) {
            float lower[4] = {};
            multiply<T>(lower, b[1], h[0][0], h[0][1]);
            multiply<T>(lower, b[0], h[1][0], h[1][1]);
#pragma unroll
            for (int j = 0; j < 4; ++j) out[j] += lower[j] * (1.0f / PART_SCALE<T>);
        }
        multiply<T>(out, b[0], h[0][0], h[0][1]);
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
