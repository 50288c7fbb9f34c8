// Of a gradient dY [m, n], read once: partial sums of G = dY B over ranges of the columns, and of dB = dY^T H over
// ranges of the rows.
#pragma once

#include "lora_outer.cuh"

namespace ferrotune {

struct LoraDownOuter {
    const void* grad;      // [m, n]
    const void* panel;     // B: [n, planes * R]
    const void* h;         // [m, h_stride]
    float* g_partial;      // [column blocks, m, R]
    float* panel_partial;  // [ranges, n, R]
    uint64_t m;
    uint64_t n;
    uint32_t h_stride;
    uint32_t h_plane;  // elements from one part of a value to the next
    uint32_t planes;
    uint32_t stages;          // 2 to 6
    uint32_t rows_per_range;  // a multiple of the tile's rows
    uint32_t vectors;         // 1: rows of grad are aligned to 16 bytes, and n is a multiple of 8
};
static_assert(sizeof(LoraDownOuter) == 80, "src/cuda/lora/kernels.rs lays it out alike");

// A block of threads keeps the panel of its COLUMNS columns and goes down a range of rows, ROWS at a time. For G its
// warps lie along the rows and share the columns; for dB they lie along the columns.
//
// Floor, dY of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us, and R = 16 partials of 8 MB + 2 MB, in L2.
template <typename T, int R, int COLUMNS, int ROWS>
__device__ __forceinline__ void lora_down_outer(const LoraDownOuter& p) {
    constexpr int PARTS = R / SEGMENT;
    constexpr int ROW_WARPS = ROWS / 16, COLUMN_WARPS = WARPS / ROW_WARPS;
    constexpr int DEPTH = COLUMNS / COLUMN_WARPS;  // a warp's columns for G
    constexpr int TILES = COLUMNS / 16 / WARPS;    // a warp's, of sixteen columns, for dB
    constexpr int WIDTH = padded(COLUMNS);
    extern __shared__ __align__(16) unsigned char shared[];

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp % ROW_WARPS, column_warp = warp / ROW_WARPS;
    const int planes = p.planes;
    const int width = padded(R * planes);
    const int stage_elements = ROWS * WIDTH + ROWS * width;
    T* panel_tile = reinterpret_cast<T*>(shared);                                // [COLUMNS][width]
    float* exchange = reinterpret_cast<float*>(panel_tile + COLUMNS * width);    // two of [COLUMN_WARPS - 1][ROWS][R]
    T* ring = reinterpret_cast<T*>(exchange + 2 * (COLUMN_WARPS - 1) * ROWS * R);
    const uint64_t column0 = static_cast<uint64_t>(blockIdx.x) * COLUMNS;
    const uint64_t first_row = static_cast<uint64_t>(blockIdx.y) * p.rows_per_range;
    const uint64_t last_row = min(first_row + p.rows_per_range, p.m);
    const uint32_t steps = static_cast<uint32_t>((last_row - first_row + ROWS - 1) / ROWS);
    float* g_out = p.g_partial + blockIdx.x * p.m * R;

    Ring filling{p.stages}, reading{p.stages};
    const auto load = [&](uint32_t step) {
        T* stage = ring + filling.at * stage_elements;
        const uint64_t row0 = first_row + static_cast<uint64_t>(step) * ROWS;
        load_tile<T, ROWS, COLUMNS>(stage, static_cast<const T*>(p.grad), row0, last_row, column0, p.n, p.vectors);
        load_panel<T, R, ROWS>(stage + ROWS * WIDTH, static_cast<const T*>(p.h), row0, last_row, p.h_stride,
                               p.h_plane, planes);
        filling.next();
    };
    // G of a step, complete once the warps that share its columns have met: rows of this warp, by lane.
    float g_sums[2 * PARTS][4];
    const auto finish = [&](uint32_t step) {
        if (column_warp != 0) return;
        const float* theirs = exchange + step % 2 * (COLUMN_WARPS - 1) * ROWS * R;
#pragma unroll
        for (int tile = 0; tile < 2 * PARTS; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row_warp * 16 + lane / 4 + 8 * half, column = tile * 8 + 2 * (lane % 4);
                float2 sum = make_float2(g_sums[tile][2 * half], g_sums[tile][2 * half + 1]);
#pragma unroll
                for (int other = 0; other + 1 < COLUMN_WARPS; ++other) {
                    const float2 more =
                        *reinterpret_cast<const float2*>(theirs + (other * ROWS + row) * R + column);
                    sum.x += more.x;
                    sum.y += more.y;
                }
                const uint64_t at = first_row + static_cast<uint64_t>(step) * ROWS + row;
                if (at < last_row) *reinterpret_cast<float2*>(g_out + at * R + column) = sum;
            }
        }
    };

    load_panel<T, R, COLUMNS>(panel_tile, static_cast<const T*>(p.panel), column0, p.n, planes * R, R, planes);
    float sums[TILES][2 * PARTS][4] = {};
    for (uint32_t step = 0; step + 1 < p.stages; ++step) {
        if (step < steps) load(step);
        commit_copies();
    }
    for (uint32_t step = 0; step < steps; ++step) {
        wait_copies(p.stages - 2);
        __syncthreads();
        if (step + p.stages - 1 < steps) load(step + p.stages - 1);
        commit_copies();
        if (step > 0) finish(step - 1);

        const T* grad_tile = ring + reading.at * stage_elements;
        reading.next();
        const T* h_tile = grad_tile + ROWS * WIDTH;
#pragma unroll
        for (int tile = 0; tile < 2 * PARTS; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) g_sums[tile][i] = 0.0f;
#pragma unroll
        for (int d = 0; d < DEPTH; d += 16) {
            const int depth = column_warp * DEPTH + d;
            const Fragments a =
                load_matrices<false>(grad_tile + row_warp * 16 * WIDTH + depth + rows_first(WIDTH));
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                multiply_parts<T, R>(g_sums[2 * part], g_sums[2 * part + 1], a,
                                     panel_tile + depth * width + part * SEGMENT + rows_first(width), planes);
            }
        }
        if (column_warp != 0) {
            float* mine = exchange + (step % 2 * (COLUMN_WARPS - 1) + column_warp - 1) * ROWS * R;
#pragma unroll
            for (int tile = 0; tile < 2 * PARTS; ++tile) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = row_warp * 16 + lane / 4 + 8 * half, column = tile * 8 + 2 * (lane % 4);
                    *reinterpret_cast<float2*>(mine + row * R + column) =
                        make_float2(g_sums[tile][2 * half], g_sums[tile][2 * half + 1]);
                }
            }
        }
#pragma unroll
        for (int depth = 0; depth < ROWS; depth += 16) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const Fragments a = load_matrices<true>(grad_tile + depth * WIDTH + (warp * TILES + tile) * 16 +
                                                        columns_first(WIDTH));
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    multiply_parts<T, R>(sums[tile][2 * part], sums[tile][2 * part + 1], a,
                                         h_tile + depth * width + part * SEGMENT + rows_first(width), planes);
                }
            }
        }
    }
    __syncthreads();
    if (steps > 0) finish(steps - 1);
    float* panel_out = p.panel_partial + blockIdx.y * p.n * R;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        store_partial<R>(panel_out, sums[tile], column0 + (warp * TILES + tile) * 16, p.n, nullptr);
    }
}

}  // namespace ferrotune
