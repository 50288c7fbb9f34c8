// The passes of lora_outer.cuh and lora_down_outer.cuh with Hopper's copies and products: partial sums of mask(x)^T G over
// ranges of the rows; and, of a gradient dY in x's place and H in G's, partial sums of dY B over its columns, too. Of
// adapters in x's type.
#pragma once

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/lora.cuh"

namespace ferrotune {

struct LoraOuter90 {
    TensorMap x;       // [m, w], boxes of 64 columns, 64 rows
    TensorMap g;       // [m, ..], 16 columns, 64 rows
    TensorMap panel;   // DOWN: [w, R], 16 columns, 256 rows
    float* partial;    // [ranges, w, R]
    float* g_partial;  // DOWN: [column blocks, m, R]
    Masks masks;
    uint64_t m;
    uint64_t w;
    uint32_t g_column;        // the first of G
    uint32_t rows_per_range;  // a multiple of 64
    uint32_t early;           // see common/launch.cuh
    uint32_t reserved;
    Segment segments[MAX_SEGMENTS];
};
static_assert(sizeof(LoraOuter90) == 576, "src/cuda/lora/outer90.rs lays it out alike");

constexpr int OUTER90_ROWS = 64;
constexpr int OUTER90_COLUMNS = 256;  // four boxes of x
constexpr int OUTER90_CONSUMERS = 256;
constexpr int OUTER90_THREADS = OUTER90_CONSUMERS + 32;
constexpr int OUTER90_BOX = OUTER90_ROWS * 64 * 2;
constexpr int OUTER90_G = OUTER90_ROWS * SEGMENT * 2;
constexpr int OUTER90_PANEL = OUTER90_COLUMNS * SEGMENT * 2;
constexpr int OUTER90_SHARED = 224 << 10;
constexpr int OUTER90_STAGES = 6;

// A block takes OUTER90_COLUMNS columns and a range of rows, half of the columns a warpgroup.
//
// Floor, x of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us.
template <typename T, int R, bool DOWN>
__device__ __forceinline__ void lora_outer90(const LoraOuter90& p) {
    constexpr int PARTS = R / SEGMENT;
    extern __shared__ unsigned char memory[];
    __shared__ __align__(8) uint64_t barriers[2 * OUTER90_STAGES + 1];
    const uint32_t panel = (shared_address(memory) + 1023u) & ~1023u;  // [PARTS] boxes
    constexpr uint32_t PANEL_BYTES = DOWN ? PARTS * OUTER90_PANEL : 0;
    const uint32_t ring = panel + PANEL_BYTES;
    constexpr uint32_t STAGE_BYTES = 4 * OUTER90_BOX + PARTS * OUTER90_G;
    constexpr uint32_t EXCHANGE = DOWN ? 2 * OUTER90_ROWS * R * 4 : 0;
    constexpr uint32_t STAGES = (OUTER90_SHARED - 1024 - EXCHANGE - PANEL_BYTES) / STAGE_BYTES;
    static_assert(STAGES >= 3 && STAGES <= OUTER90_STAGES);
    const uint32_t full = shared_address(barriers), empty = full + 8 * OUTER90_STAGES;
    const uint32_t panel_full = empty + 8 * OUTER90_STAGES;
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const uint64_t column0 = static_cast<uint64_t>(blockIdx.x) * OUTER90_COLUMNS;
    const uint64_t first_row = static_cast<uint64_t>(blockIdx.y) * p.rows_per_range;
    const uint64_t last_row = min(first_row + p.rows_per_range, p.m);
    const uint32_t steps = static_cast<uint32_t>((last_row - first_row + OUTER90_ROWS - 1) / OUTER90_ROWS);
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, OUTER90_CONSUMERS / 32);
        }
        barrier_init(panel_full, 1);
        barriers_visible();
    }
    __syncthreads();
    begin(p.early);

    if (warp == OUTER90_CONSUMERS / 32) {
        if (lane == 0) {
            if constexpr (DOWN) {
                barrier_expect(panel_full, PANEL_BYTES);
                for (uint32_t box = 0; box < PARTS; ++box) {
                    copy_box(panel + box * OUTER90_PANEL, p.panel, static_cast<int>(box * SEGMENT),
                             static_cast<int>(column0), panel_full);
                }
            }
            uint32_t at = 0, parity = 0;
            for (uint32_t step = 0; step < steps; ++step) {
                barrier_wait(empty + 8 * at, parity ^ 1);
                const uint32_t stage = ring + at * STAGE_BYTES, here = full + 8 * at;
                const int row = static_cast<int>(first_row) + static_cast<int>(step) * OUTER90_ROWS;
                barrier_expect(here, STAGE_BYTES);
#pragma unroll
                for (int box = 0; box < 4; ++box) {
                    copy_box(stage + box * OUTER90_BOX, p.x, static_cast<int>(column0) + 64 * box, row, here);
                }
                uint32_t to = stage + 4 * OUTER90_BOX;
#pragma unroll
                for (int part = 0; part < PARTS; ++part, to += OUTER90_G) {
                    copy_box(to, p.g, static_cast<int>(p.g_column) + part * SEGMENT, row, here);
                }
                if (++at == STAGES) at = 0, parity ^= 1;
            }
        }
        __syncwarp();
        finish(p.early);
        return;
    }

    const uint32_t group = warp / 4, group_warp = warp % 4;
    const bool masked = !DOWN && p.masks.seed != nullptr;
    const uint64_t seed = masked ? *p.masks.seed : 0;
    float* exchange = reinterpret_cast<float*>(memory + (ring + STAGES * STAGE_BYTES - shared_address(memory)));
    float sums[2][PARTS][8] = {};
    if constexpr (DOWN) barrier_wait(panel_full, 0);
    uint32_t at = 0, parity = 0;
    for (uint32_t step = 0; step < steps; ++step) {
        if (!masked) barrier_wait(full + 8 * at, parity);
        const uint32_t boxes = ring + at * STAGE_BYTES + 2 * group * OUTER90_BOX;
        const uint32_t g_tile = ring + at * STAGE_BYTES + 4 * OUTER90_BOX;
        const auto g_part = [&](int part, int k) {
            return operand(g_tile + part * OUTER90_G, Swizzle::BYTES_32, 256) + 32 * k;
        };
        [[maybe_unused]] float down[PARTS][8] = {};
        if (!masked) {
            products_begin();
            if constexpr (DOWN) {
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    const uint64_t a = operand(boxes + k / 4 * OUTER90_BOX, Swizzle::BYTES_128, 1024) + 2 * (k % 4);
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        multiply_16<T, 0, 1>(down[part], a,
                                             operand(panel + part * OUTER90_PANEL + (128 * group + 16 * k) * 32,
                                                     Swizzle::BYTES_32, 256),
                                             1);
                    }
                }
            }
#pragma unroll
            for (int box = 0; box < 2; ++box)
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const uint64_t a = operand(boxes + box * OUTER90_BOX, Swizzle::BYTES_128, 1024) + 128 * k;
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        multiply_16<T, 1, 1>(sums[box][part], a, g_part(part, k), 1);
                    }
                }
            products_commit();
            products_wait_all();
        } else if constexpr (!DOWN) {
#pragma unroll
            for (int box = 0; box < 2; ++box) {
                const uint32_t row = lane % 8 + lane / 16 * 8;
                const uint32_t chunk = 2 * group_warp + lane / 8 % 2;  // of 16 bytes, as the copy swizzles them
                uint32_t bits[4];
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    if (p.segments[part].first) {
                        const uint64_t index =
                            (first_row + static_cast<uint64_t>(step) * OUTER90_ROWS + row) * p.masks.columns + column0 +
                            128 * group + 64 * box + 8 * chunk;  // rows are multiples of 8
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            bits[k] =
                                kept_of_call<false>(seed, p.segments[part], index / 8 + 2 * k * p.masks.columns);
                        }
                    }
                    // Masks need no data: they are made while it comes.
                    if (part == 0 && box == 0) barrier_wait(full + 8 * at, parity);
                    Fragments kept[4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const uint32_t place = (16 * k + row) * 128 + 16 * (chunk ^ (row % 8));
                        kept[k] = mask_fragments<true>(load_matrices_at<true>(boxes + box * OUTER90_BOX + place), bits[k]);
                    }
                    products_begin();
#pragma unroll
                    for (int k = 0; k < 4; ++k) multiply_16<T, 1>(sums[box][part], kept[k], g_part(part, k), 1);
                    products_commit();
                    products_wait_all();
                }
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * at);
        if (++at == STAGES) at = 0, parity ^= 1;
        if constexpr (DOWN) {
            // The second warpgroup's sums are added to the first's.
            float* now = exchange + step % 2 * OUTER90_ROWS * R + threadIdx.x % 128;
            if (group == 1) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < 8; ++i) now[(part * 8 + i) * 128] = down[part][i];
            }
            asm volatile("bar.sync 1, 256;" ::: "memory");
            if (group == 0) {
                float* out = p.g_partial + blockIdx.x * p.m * R;
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < 8; i += 2) {
                        const uint64_t row = first_row + static_cast<uint64_t>(step) * OUTER90_ROWS + group_warp * 16 +
                                             lane / 4 + i / 2 % 2 * 8;
                        if (row < p.m) {
                            *reinterpret_cast<float2*>(out + row * R + part * SEGMENT + i / 4 * 8 + 2 * (lane % 4)) =
                                make_float2(down[part][i] + now[(part * 8 + i) * 128],
                                            down[part][i + 1] + now[(part * 8 + i + 1) * 128]);
                        }
                    }
            }
        }
    }
    float* out = p.partial + blockIdx.y * p.w * R;
#pragma unroll
    for (int box = 0; box < 2; ++box)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const float scale = DOWN ? 1.0f : p.segments[part].scale;
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                const uint64_t column =
                    column0 + 128 * group + 64 * box + 16 * group_warp + lane / 4 + i / 2 % 2 * 8;
                if (column < p.w) {
                    *reinterpret_cast<float2*>(out + column * R + part * SEGMENT + i / 4 * 8 + 2 * (lane % 4)) =
                        make_float2(sums[box][part][i] * scale, sums[box][part][i + 1] * scale);
                }
            }
        }
    finish(p.early);
}

}  // namespace ferrotune
