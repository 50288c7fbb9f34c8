// H = scale * mask(x) A^T as lora_down.cuh writes it, with Hopper's copies and products. A panel lies as the adapters do,
// [R, k] row-major: where adapters have x's type it is the adapters themselves.
#pragma once

#include "lora_passes_sm90a.cuh"

namespace ferrotune {

constexpr int DOWN90_PANELS = 12;  // four projections, three parts of a value

struct LoraDown90 {
    TensorMap x;                     // boxes of 64 columns, 128 rows
    TensorMap panel[DOWN90_PANELS];  // 64 columns, 16 rows; a part of a projection's each
    void* out;                       // [m, planes * R]
    uint32_t* bits;                  // where an only projection's mask is kept, [m, kept_words(k)], or null
    Masks masks;
    uint64_t m;
    uint32_t steps;  // ceil(k / 64)
    uint32_t reserved;
    Segment segments[MAX_SEGMENTS];
    uint8_t panel_of[MAX_SEGMENTS * 4];  // [plane][segment]
    uint8_t row_of[MAX_SEGMENTS];        // of the segment in its panels
};
static_assert(sizeof(LoraDown90) == 1856, "src/cuda/lora/down90.rs lays it out alike");

constexpr int DOWN90_ROWS = 128;  // 64 a warpgroup
constexpr int DOWN90_DEPTH = 64;
constexpr uint32_t DOWN90_X_BYTES = DOWN90_ROWS * DOWN90_DEPTH * 2;  // of a box
constexpr uint32_t DOWN90_PANEL_BYTES = SEGMENT * DOWN90_DEPTH * 2;
constexpr uint32_t DOWN90_MASK_WORDS = MASK_WORDS / DOWN90_ROWS;  // of a row: those of two boxes

// A cluster of two blocks takes DOWN90_ROWS rows of x, half of k a block, and then half of the rows.
//
// Floor, x of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us.
template <typename T, int R, int PLANES>
__device__ __forceinline__ void lora_down90(const LoraDown90& p) {
    constexpr int PARTS = R / SEGMENT;
    constexpr uint32_t BOX_BYTES = DOWN90_X_BYTES + PARTS * PLANES * DOWN90_PANEL_BYTES;
    constexpr uint32_t EXCHANGE_BYTES = 64 * R * 4;
    extern __shared__ unsigned char memory[];
    __shared__ __align__(8) uint64_t barriers[2 * PASS_STAGES + 2 * MASK_SLOTS];
    const bool masked = p.masks.seed != nullptr;
    const uint32_t exchange = (shared_address(memory) + 1023u) & ~1023u;  // [8 * PARTS][128]
    const uint32_t stages_at = exchange + EXCHANGE_BYTES + (masked ? MASK_MEMORY : 0);
    // Boxes of a stage lie side by side in x: long rows for memory, where there is room.
    const uint32_t boxes = PARTS * PLANES == 1 && !masked ? 4 : 2;
    const uint32_t room = PASS_SHARED - 1024 - EXCHANGE_BYTES - (masked ? MASK_MEMORY : 0);
    const uint32_t stages = min(PASS_STAGES, room / (boxes * BOX_BYTES));
    const uint32_t full = shared_address(barriers), empty = full + 8 * PASS_STAGES;
    const MaskRing ring(exchange + EXCHANGE_BYTES, empty + 8 * PASS_STAGES, masks_of<PARTS>(p.segments));
    const uint32_t rank = cluster_rank(), steps = (p.steps + 2 * boxes - 1) / (2 * boxes);
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const uint64_t row0 = static_cast<uint64_t>(blockIdx.x / 2) * DOWN90_ROWS;
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < stages; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, PASS_CONSUMERS);
        }
        if (masked) ring.init();
        barriers_visible();
    }
    cluster_sync();
    begin();

    // Clusters start at other depths: all at one would ask the same few channels of memory.
    const uint32_t start = blockIdx.x / 2 % steps;
    const auto column_of = [&](uint32_t step) {
        const uint32_t around = step + start < steps ? step + start : step + start - steps;
        return (rank * steps + around) * boxes * DOWN90_DEPTH;
    };
    if (warp >= PASS_CONSUMERS) {
        give_registers<other_registers(PARTS, PLANES)>();
        if (warp > PASS_CONSUMERS && masked) {
            const auto place = [&](uint32_t step, uint64_t& row, uint32_t& column) {
                row = row0;
                column = column_of(step);
            };
            make_masks<PARTS, DOWN90_MASK_WORDS, words_at_once(other_registers(PARTS, PLANES))>(
                p.masks, p.segments, ring, warp - PASS_CONSUMERS - 1, steps, place, p.bits, p.m);
        } else if (warp == PASS_CONSUMERS && lane == 0) {
            uint32_t at = 0, parity = 0;
            for (uint32_t step = 0; step < steps; ++step) {
                barrier_wait(empty + 8 * at, parity ^ 1);
                const uint32_t here = full + 8 * at;
                uint32_t to = stages_at + at * boxes * BOX_BYTES;
                int column = static_cast<int>(column_of(step));
                barrier_expect(here, boxes * BOX_BYTES);
                for (uint32_t box = 0; box < boxes; ++box, column += DOWN90_DEPTH) {
                    copy_box(to, p.x, column, static_cast<int>(row0), here);
                    to += DOWN90_X_BYTES;
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                        for (int plane = 0; plane < PLANES; ++plane, to += DOWN90_PANEL_BYTES) {
                            copy_box(to, p.panel[p.panel_of[plane * MAX_SEGMENTS + part]], column, p.row_of[part], here);
                        }
                    }
                }
                if (++at == stages) at = 0, parity ^= 1;
            }
        }
        __syncwarp();
        cluster_sync();
        return;
    }

    take_registers<consumer_registers(PARTS, PLANES)>();
    const uint32_t group = warp / 4;
    float sums[8 * PARTS] = {};
    Apart<PARTS, PLANES> apart(p.m);
    uint32_t at = 0, parity = 0;
    for (uint32_t step = 0; step < steps; ++step) {
        barrier_wait(full + 8 * at, parity);
        if (masked) ring.wait(step);
        const uint32_t stage = stages_at + at * boxes * BOX_BYTES;
        const auto x = [&](uint32_t box) { return stage + box * BOX_BYTES + group * 64 * DOWN90_DEPTH * 2; };
        const auto panel = [&](uint32_t box, int part, int k) {
            const uint32_t place = stage + box * BOX_BYTES + DOWN90_X_BYTES + part * PLANES * DOWN90_PANEL_BYTES;
            return operand(place, Swizzle::BYTES_128, 1024) + 2 * k;
        };
        if (!masked) {
            if constexpr (PLANES == 1) products_begin();
            for (uint32_t box = 0; box < boxes; ++box) {
                multiply_64<T, PARTS, PLANES, 0, 0>(
                    sums, apart, [&](int k) { return operand(x(box), Swizzle::BYTES_128, 1024) + 2 * k; },
                    [&](int part, int k) { return panel(box, part, k); });
            }
            if constexpr (PLANES == 1) {
                products_commit();
                products_wait_all();
            }
        } else {
            for (uint32_t box = 0; box < 2; ++box) {
                constexpr uint32_t STRIDE = 4 * DOWN90_MASK_WORDS;
                const auto mask = [&](uint32_t i) { return ring.mask(step, i) + 64 * group * STRIDE + 8 * box; };
                multiply_kept<T, PARTS, PLANES, 0>(
                    sums, apart, p.segments, ring.count,
                    [&](Fragments(&kept)[4], uint32_t i) { load_kept_rows(kept, x(box), mask(i), STRIDE); },
                    [&](int part, int k) { return panel(box, part, k); });
            }
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(empty + 8 * at);
            if (masked) ring.release(step);
        }
        if (++at == stages) at = 0, parity ^= 1;
    }

    // A block has all rows' sums over half of the depth: a warpgroup's rows end up in one block.
    const uint32_t mine = exchange + 4 * (threadIdx.x % 128);
    if (group != rank) {
#pragma unroll
        for (int i = 0; i < 8 * PARTS; ++i) store_remote(mine + 512 * i, group, sums[i]);
    }
    cluster_sync();
    if (group != rank) return;
    T* out = static_cast<T*>(p.out);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const float scale = p.segments[part].scale;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const uint64_t row = row0 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
            if (row >= p.m) continue;
            const int at = 8 * part + i;
            float low = (sums[at] + __uint_as_float(load_shared(mine + 512 * at))) * scale;
            float high = (sums[at + 1] + __uint_as_float(load_shared(mine + 512 * (at + 1)))) * scale;
            T* place = out + row * PLANES * R + part * SEGMENT + i / 4 * 8 + 2 * (lane % 4);
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane, place += R) {
                *reinterpret_cast<uint32_t*>(place) = pack2<T>(low, high);
                low = low_part<T>(low);
                high = low_part<T>(high);
            }
        }
    }
}

}  // namespace ferrotune
