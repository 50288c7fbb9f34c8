// Gradients of adapters: partial sums of mask(x)^T G, of x [m, w] and G [m, R], over ranges of the rows.
#pragma once

#include "common/lora.cuh"

namespace ferrotune {

struct LoraOuter {
    const void* x;   // [m, w]
    const void* g;   // [m, g_stride]
    float* partial;  // [ranges, w, R]
    Masks masks;
    uint64_t m;
    uint64_t w;
    uint32_t g_stride;
    uint32_t g_plane;  // elements from one part of a value to the next
    uint32_t planes;
    uint32_t stages;          // 2 to 6
    uint32_t rows_per_range;  // a multiple of 64
    uint32_t vectors;         // 1: rows of x are aligned to 16 bytes, and w is a multiple of 8
    uint32_t early;           // see common/launch.cuh
    uint32_t reserved;
    Segment segments[MAX_SEGMENTS];
};
static_assert(sizeof(LoraOuter) == 184, "src/cuda/lora/kernels.rs lays it out alike");

constexpr int OUTER_ROWS = 64;
constexpr int OUTER_COLUMNS = 128;  // sixteen a warp

// Sums of a warp's sixteen columns to [.., w, R] at `out`, scaled by segment.
template <int R>
__device__ __forceinline__ void store_partial(float* out, const float (&sums)[R / 8][4], uint64_t column, uint64_t w,
                                              const Segment* segments) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < R / 8; ++tile) {
        const float scale = segments == nullptr ? 1.0f : segments[tile / 2].scale;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint64_t at = column + lane / 4 + 8 * half;
            if (at < w) {
                *reinterpret_cast<float2*>(out + at * R + tile * 8 + 2 * (lane % 4)) =
                    make_float2(sums[tile][2 * half] * scale, sums[tile][2 * half + 1] * scale);
            }
        }
    }
}

// A block of threads takes OUTER_COLUMNS columns and a range of rows, so that x is read once for all projections.
//
// Floor, x of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us.
template <typename T, int R>
__device__ __forceinline__ void lora_outer(const LoraOuter& p) {
    constexpr int PARTS = R / SEGMENT;
    extern __shared__ __align__(16) unsigned char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int planes = p.planes;
    const int g_width = padded(R * planes);
    const int x_elements = OUTER_ROWS * padded(OUTER_COLUMNS);
    const int stage_elements = x_elements + OUTER_ROWS * g_width;
    T* ring = reinterpret_cast<T*>(shared);
    const uint64_t column0 = static_cast<uint64_t>(blockIdx.x) * OUTER_COLUMNS;
    const uint64_t first_row = static_cast<uint64_t>(blockIdx.y) * p.rows_per_range;
    const uint64_t last_row = min(first_row + p.rows_per_range, p.m);
    const uint32_t steps = static_cast<uint32_t>((last_row - first_row + OUTER_ROWS - 1) / OUTER_ROWS);
    const uint64_t seed = p.masks.seed != nullptr ? *p.masks.seed : 0;

    Ring filling{p.stages}, reading{p.stages};
    const auto load = [&](uint32_t step) {
        T* stage = ring + filling.at * stage_elements;
        const uint64_t row0 = first_row + static_cast<uint64_t>(step) * OUTER_ROWS;
        load_tile<T, OUTER_ROWS, OUTER_COLUMNS>(stage, static_cast<const T*>(p.x), row0, last_row, column0, p.w,
                                                p.vectors);
        load_panel<T, R, OUTER_ROWS>(stage + x_elements, static_cast<const T*>(p.g), row0, last_row, p.g_stride,
                                     p.g_plane, planes);
        filling.next();
    };

    float sums[2 * PARTS][4] = {};
    for (uint32_t step = 0; step + 1 < p.stages; ++step) {
        if (step < steps) load(step);
        commit_copies();
    }
    for (uint32_t step = 0; step < steps; ++step) {
        wait_copies(p.stages - 2);
        __syncthreads();
        if (step + p.stages - 1 < steps) load(step + p.stages - 1);
        commit_copies();

        const T* x_tile = ring + reading.at * stage_elements;
        reading.next();
        const T* g_tile = x_tile + x_elements;
#pragma unroll
        for (int depth = 0; depth < OUTER_ROWS; depth += 16) {
            const Fragments a = load_matrices<true>(x_tile + depth * padded(OUTER_COLUMNS) + warp * 16 +
                                                    columns_first(padded(OUTER_COLUMNS)));
            Fragments masked = a;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                if (p.masks.seed != nullptr && p.segments[part].first) {
                    const uint64_t row =
                        first_row + static_cast<uint64_t>(step) * OUTER_ROWS + depth + lane % 8 + lane / 16 * 8;
                    const uint64_t column = column0 + warp * 16 + lane / 8 % 2 * 8;
                    masked = mask_fragments<true>(
                        a, kept_bits<false>(seed, p.segments[part], row, column, p.masks.columns));
                }
                multiply_parts<T, R>(sums[2 * part], sums[2 * part + 1], masked,
                                     g_tile + depth * g_width + part * SEGMENT + rows_first(g_width), planes);
            }
        }
    }
    store_partial<R>(p.partial + blockIdx.y * p.w * R, sums, column0 + warp * 16, p.w, p.segments);
}

}  // namespace ferrotune
