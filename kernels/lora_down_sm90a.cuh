// H = scale * mask(x) A^T as lora_down.cuh writes it, with Hopper's copies and products. A panel lies as the adapters do,
// [R, k] row-major: where adapters have x's type it is the adapters themselves.
#pragma once

#include "common/hopper.cuh"
#include "common/launch.cuh"
#include "common/lora.cuh"

namespace ferrotune {

constexpr int DOWN90_PANELS = 12;  // four projections, three parts of a value

struct LoraDown90 {
    TensorMap x;                     // boxes of 64 columns, 64 rows
    TensorMap panel[DOWN90_PANELS];  // 64 columns, 16 rows; a part of a projection's each
    void* out;                       // [m, planes * R]
    Masks masks;
    uint64_t m;
    uint32_t steps;  // ceil(k / 64)
    uint32_t planes;
    Segment segments[MAX_SEGMENTS];
    uint8_t panel_of[MAX_SEGMENTS * 4];  // [plane][segment]
    uint8_t row_of[MAX_SEGMENTS];        // of the segment in its panels
};
static_assert(sizeof(LoraDown90) == 1856, "src/cuda/lora/down90.rs lays it out alike");

constexpr int DOWN90_ROWS = 64;
constexpr int DOWN90_DEPTH = 64;
constexpr int DOWN90_CONSUMERS = 256;  // two warpgroups, which share a stage's boxes
constexpr int DOWN90_THREADS = DOWN90_CONSUMERS + 32;
constexpr int DOWN90_X_BYTES = DOWN90_ROWS * DOWN90_DEPTH * 2;  // of a box
constexpr int DOWN90_PANEL_BYTES = SEGMENT * DOWN90_DEPTH * 2;
constexpr int DOWN90_SHARED = 224 << 10;
constexpr uint32_t DOWN90_STAGES = 6;

// sums += products over 64 of the depth, in four steps of sixteen, of `a(step)` with the three parts of the values of
// `b(plane, step)`. Tensor cores cut their sums off: those of sixteen products are kept apart, and added in f32.
template <typename T, typename A, typename B>
__device__ __forceinline__ void multiply_three_parts(float (&sums)[8], const A& a, const B& b) {
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        float now[2][3][8];
        products_begin();
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int plane = 0; plane < 3; ++plane) {
                if constexpr (std::is_same_v<std::decay_t<decltype(a(0))>, Fragments>) {
                    multiply_16<T, 0>(now[step][plane], a(half + step), b(plane, half + step), 0);
                } else {
                    multiply_16<T, 0, 0>(now[step][plane], a(half + step), b(plane, half + step), 0);
                }
            }
        products_commit();
        products_wait_all();
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                constexpr float SCALE = 1.0f / PART_SCALE<T>;
                sums[i] += now[step][0][i] + (now[step][1][i] + now[step][2][i] * SCALE) * SCALE;
            }
    }
}

// A block takes DOWN90_ROWS rows of x and all of k.
//
// Floor, x of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us.
template <typename T, int R>
__device__ __forceinline__ void lora_down90(const LoraDown90& p) {
    constexpr int PARTS = R / SEGMENT;
    extern __shared__ unsigned char memory[];
    __shared__ __align__(8) uint64_t barriers[2 * DOWN90_STAGES];
    const uint32_t shared = (shared_address(memory) + 1023u) & ~1023u;
    const uint32_t full = shared_address(barriers), empty = full + 8 * DOWN90_STAGES;
    const uint32_t planes = p.planes;
    // Boxes of a stage lie side by side in x: long rows for memory, where wide panels leave room.
    const uint32_t boxes = PARTS * planes <= 4 ? 4 : 2;
    const uint32_t box_bytes = DOWN90_X_BYTES + PARTS * planes * DOWN90_PANEL_BYTES;
    const uint32_t stages = min(DOWN90_STAGES, (DOWN90_SHARED - 1024) / (boxes * box_bytes));
    const uint32_t steps = (p.steps + boxes - 1) / boxes;
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const uint64_t row0 = static_cast<uint64_t>(blockIdx.x) * DOWN90_ROWS;
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < stages; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, DOWN90_CONSUMERS / 32);
        }
        barriers_visible();
    }
    __syncthreads();
    begin();

    // Blocks start at other depths: all at one would ask the same few channels of memory.
    const uint32_t start = blockIdx.x % steps;
    const auto around = [&](uint32_t step) { return step + start < steps ? step + start : step + start - steps; };
    if (warp == DOWN90_CONSUMERS / 32) {
        if (lane != 0) return;
        uint32_t at = 0, parity = 0;
        for (uint32_t step = 0; step < steps; ++step) {
            barrier_wait(empty + 8 * at, parity ^ 1);
            const uint32_t here = full + 8 * at;
            uint32_t to = shared + at * boxes * box_bytes;
            int column = static_cast<int>(around(step) * boxes) * DOWN90_DEPTH;
            barrier_expect(here, boxes * box_bytes);
            for (uint32_t box = 0; box < boxes; ++box, to += box_bytes, column += DOWN90_DEPTH) {
                copy_box(to, p.x, column, static_cast<int>(row0), here);
                uint32_t panel = to + DOWN90_X_BYTES;
                for (uint32_t plane = 0; plane < planes; ++plane) {
#pragma unroll
                    for (int part = 0; part < PARTS; ++part, panel += DOWN90_PANEL_BYTES) {
                        copy_box(panel, p.panel[p.panel_of[plane * MAX_SEGMENTS + part]], column, p.row_of[part], here);
                    }
                }
            }
            if (++at == stages) at = 0, parity ^= 1;
        }
        return;
    }

    const uint32_t group = warp / 4;
    const uint64_t seed = p.masks.seed != nullptr ? *p.masks.seed : 0;
    const bool masked = p.masks.seed != nullptr;
    const uint32_t my_boxes = boxes / 2, row = warp % 4 * 16 + lane % 16;
    float sums[PARTS][8] = {};
    uint32_t at = 0, parity = 0;
    for (uint32_t step = 0; step < steps; ++step) {
        for (uint32_t my_box = 0; my_box < my_boxes; ++my_box) {
            const uint32_t box = group * my_boxes + my_box;
            const uint32_t tile = shared + (at * boxes + box) * box_bytes;
            const auto panel = [&](uint32_t plane, int part, int k) {
                return operand(tile + DOWN90_X_BYTES + (plane * PARTS + part) * DOWN90_PANEL_BYTES, Swizzle::BYTES_128,
                               1024) +
                       2 * k;
            };
            if (!masked) {
                if (my_box == 0) barrier_wait(full + 8 * at, parity);
                const uint64_t x = operand(tile, Swizzle::BYTES_128, 1024);
                if (planes == 1) {
                    products_begin();
#pragma unroll
                    for (int k = 0; k < 4; ++k)
#pragma unroll
                        for (int part = 0; part < PARTS; ++part) {
                            multiply_16<T, 0, 0>(sums[part], x + 2 * k, panel(0, part, k), 1);
                        }
                    products_commit();
                    products_wait_all();
                } else {
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
                        multiply_three_parts<T>(
                            sums[part], [&](int k) { return x + 2 * k; },
                            [&](uint32_t plane, int k) { return panel(plane, part, k); });
                    }
                }
                continue;
            }
            // Masks need no data: they are made while it comes.
            const uint64_t column = static_cast<uint64_t>(around(step) * boxes + box) * DOWN90_DEPTH;
            uint32_t bits[4];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                if (p.segments[part].first) {
                    const uint64_t call = ((row0 + row) * p.masks.columns + column + lane / 16 * 8) / 8;
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        bits[k] = kept_of_call<true>(seed, p.segments[part], call + 2 * k);  // rows are multiples of 8
                    }
                }
                if (part == 0 && my_box == 0) barrier_wait(full + 8 * at, parity);
                Fragments kept[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const uint32_t chunk = (2 * k + lane / 16) ^ (row % 8);  // of 16 bytes, as the copy swizzles them
                    kept[k] = mask_fragments<false>(load_matrices_at(tile + row * 128 + 16 * chunk), bits[k]);
                }
                if (planes == 1) {
                    products_begin();
#pragma unroll
                    for (int k = 0; k < 4; ++k) multiply_16<T, 0>(sums[part], kept[k], panel(0, part, k), 1);
                    products_commit();
                    products_wait_all();
                } else {
                    multiply_three_parts<T>(
                        sums[part], [&](int k) { return kept[k]; },
                        [&](uint32_t plane, int k) { return panel(plane, part, k); });
                }
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * at);
        if (++at == stages) at = 0, parity ^= 1;
    }

    // The second warpgroup's sums are added to the first's.
    asm volatile("bar.sync 1, 256;" ::: "memory");
    float* exchange = reinterpret_cast<float*>(memory + (shared - shared_address(memory)));  // [8 * PARTS][128]
    if (group == 1) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < 8; ++i) exchange[(part * 8 + i) * 128 + threadIdx.x % 128] = sums[part][i];
    }
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (group == 1) return;
    T* out = static_cast<T*>(p.out);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const float scale = p.segments[part].scale;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sums[part][i] = (sums[part][i] + exchange[(part * 8 + i) * 128 + threadIdx.x % 128]) * scale;
        }
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const uint64_t row = row0 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
            if (row >= p.m) continue;
            float low = sums[part][i], high = sums[part][i + 1];
            T* place = out + row * planes * R + part * SEGMENT + i / 4 * 8 + 2 * (lane % 4);
            for (uint32_t plane = 0; plane < planes; ++plane, place += R) {
                *reinterpret_cast<uint32_t*>(place) = pack2<T>(low, high);
                low = low_part<T>(low);
                high = low_part<T>(high);
            }
        }
    }
}

}  // namespace ferrotune
