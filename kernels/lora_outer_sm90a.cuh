// The passes of lora_outer.cuh and lora_down_outer.cuh with Hopper's copies and products: partial sums of mask(x)^T G over
// ranges of the rows; and, of a gradient dY in x's place and H in G's, partial sums of dY B over its columns, too.
#pragma once

#include "lora_passes_sm90a.cuh"

namespace ferrotune {

struct LoraOuter90 {
    TensorMap x;       // [m, w], boxes of 64 columns, 64 rows
    TensorMap g;       // [m, ..], 16 columns, 64 rows
    TensorMap panel;   // DOWN: [w, PLANES * R], 16 columns, 256 rows
    TensorMap bits;    // of a mask that was kept, as 16-bit elements: 16 columns, 64 rows
    float* partial;    // [ranges, w, R]
    float* g_partial;  // DOWN: [column blocks, m, R]
    Masks masks;
    uint64_t m;
    uint64_t w;
    uint32_t g_column;        // the first of G
    uint32_t g_plane;         // columns from one part of a value to the next
    uint32_t rows_per_range;  // a multiple of 64
    uint32_t early;           // see common/launch.cuh
    uint32_t kept;            // 1: an only projection's mask is that of `bits`; 0: masks are made here
    uint32_t reserved;
    Segment segments[MAX_SEGMENTS];
};
static_assert(sizeof(LoraOuter90) == 704, "src/cuda/lora/outer90.rs lays it out alike");

constexpr int OUTER90_ROWS = 64;
constexpr int OUTER90_COLUMNS = 256;  // four boxes of x
constexpr uint32_t OUTER90_BOX = OUTER90_ROWS * 64 * 2;
constexpr uint32_t OUTER90_G = OUTER90_ROWS * SEGMENT * 2;
constexpr uint32_t OUTER90_PANEL = OUTER90_COLUMNS * SEGMENT * 2;
constexpr uint32_t OUTER90_MASK_WORDS = MASK_WORDS / OUTER90_ROWS;  // of a row
static_assert(OUTER90_MASK_WORDS == 8 && OUTER90_MASK_WORDS * 32 == OUTER90_COLUMNS);

// What a block keeps in shared memory, in bytes: what its warpgroups exchange, masks, the panel, and stages.
template <int R, int PLANES, bool DOWN>
struct Outer90Memory {
    static constexpr uint32_t STAGE = 4 * OUTER90_BOX + R / SEGMENT * PLANES * OUTER90_G;
    static constexpr uint32_t PANEL = DOWN ? R / SEGMENT * PLANES * OUTER90_PANEL : 0;
    static constexpr uint32_t MASKS_BYTES = DOWN ? 0 : MASK_MEMORY;
    static constexpr uint32_t SUMS = OUTER90_ROWS * R * 4;
    static constexpr uint32_t stages(uint32_t exchanges) {
        return (PASS_SHARED - 1024 - exchanges * SUMS - MASKS_BYTES - PANEL) / STAGE;
    }
    static constexpr uint32_t EXCHANGES = !DOWN ? 0 : stages(2) >= 2 ? 2 : 1;
    static constexpr uint32_t STAGES = stages(EXCHANGES) < PASS_STAGES ? stages(EXCHANGES) : PASS_STAGES;
    static_assert(STAGES >= 2 && (DOWN || STAGES * MASK_BYTES <= MASK_MEMORY));
};

// A block takes OUTER90_COLUMNS columns and a range of rows, half of the columns a warpgroup.
//
// Floor, x of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us.
template <typename T, int R, int PLANES, bool DOWN>
__device__ __forceinline__ void lora_outer90(const LoraOuter90& p) {
    using Memory = Outer90Memory<R, PLANES, DOWN>;
    constexpr int PARTS = R / SEGMENT;
    constexpr uint32_t STAGES = Memory::STAGES;
    extern __shared__ unsigned char memory[];
    __shared__ __align__(8) uint64_t barriers[2 * PASS_STAGES + 1 + 2 * MASK_SLOTS];
    const uint32_t exchange = (shared_address(memory) + 1023u) & ~1023u;
    const uint32_t panel = exchange + Memory::EXCHANGES * Memory::SUMS + Memory::MASKS_BYTES;  // [PARTS][PLANES] boxes
    const uint32_t stages_at = panel + Memory::PANEL;
    const auto kept_at = [&](uint32_t stage) { return exchange + stage * MASK_BYTES; };  // where masks are made, else
    const uint32_t full = shared_address(barriers), empty = full + 8 * PASS_STAGES;
    const uint32_t panel_full = empty + 8 * PASS_STAGES;
    const MaskRing ring(exchange, panel_full + 8, masks_of<PARTS>(p.segments));
    const uint32_t warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const uint64_t column0 = static_cast<uint64_t>(blockIdx.x) * OUTER90_COLUMNS;
    const uint64_t first_row = static_cast<uint64_t>(blockIdx.y) * p.rows_per_range;
    const uint64_t last_row = min(first_row + p.rows_per_range, p.m);
    const uint32_t steps = static_cast<uint32_t>((last_row - first_row + OUTER90_ROWS - 1) / OUTER90_ROWS);
    const bool masked = !DOWN && p.masks.seed != nullptr, made = masked && p.kept == 0;
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, PASS_CONSUMERS);
        }
        barrier_init(panel_full, 1);
        if (made) ring.init();
        barriers_visible();
    }
    __syncthreads();
    begin(p.early);

    if (warp >= PASS_CONSUMERS) {
        give_registers<other_registers(PARTS, PLANES)>();
        if (warp > PASS_CONSUMERS && made) {
            const auto place = [&](uint32_t step, uint64_t& row, uint32_t& column) {
                row = first_row + static_cast<uint64_t>(step) * OUTER90_ROWS;
                column = static_cast<uint32_t>(column0);
            };
            make_masks<PARTS, OUTER90_MASK_WORDS, words_at_once(other_registers(PARTS, PLANES))>(
                p.masks, p.segments, ring, warp - PASS_CONSUMERS - 1, steps, place, nullptr, p.m);
        } else if (warp == PASS_CONSUMERS && lane == 0) {
            if constexpr (DOWN) {
                barrier_expect(panel_full, Memory::PANEL);
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int plane = 0; plane < PLANES; ++plane) {
                        copy_box(panel + (part * PLANES + plane) * OUTER90_PANEL, p.panel, plane * R + part * SEGMENT,
                                 static_cast<int>(column0), panel_full);
                    }
            }
            uint32_t at = 0, parity = 0;
            for (uint32_t step = 0; step < steps; ++step) {
                barrier_wait(empty + 8 * at, parity ^ 1);
                uint32_t to = stages_at + at * Memory::STAGE;
                const uint32_t here = full + 8 * at;
                const int row = static_cast<int>(first_row) + static_cast<int>(step) * OUTER90_ROWS;
                barrier_expect(here, Memory::STAGE + (masked && !made ? MASK_BYTES : 0));
                if (masked && !made) copy_box(kept_at(at), p.bits, static_cast<int>(blockIdx.x) * 16, row, here);
#pragma unroll
                for (int box = 0; box < 4; ++box, to += OUTER90_BOX) {
                    copy_box(to, p.x, static_cast<int>(column0) + 64 * box, row, here);
                }
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int plane = 0; plane < PLANES; ++plane, to += OUTER90_G) {
                        const uint32_t column = p.g_column + plane * p.g_plane + part * SEGMENT;
                        copy_box(to, p.g, static_cast<int>(column), row, here);
                    }
                if (++at == STAGES) at = 0, parity ^= 1;
            }
        }
        __syncwarp();
        finish(p.early);
        return;
    }

    take_registers<consumer_registers(PARTS, PLANES)>();
    const uint32_t group = warp / 4, group_warp = warp % 4;
    float sums[2][8 * PARTS] = {};
    [[maybe_unused]] float down[8 * PARTS] = {};
    Apart<PARTS, PLANES> apart(p.m);
    if constexpr (DOWN) barrier_wait(panel_full, 0);
    uint32_t at = 0, parity = 0;
    for (uint32_t step = 0; step < steps; ++step) {
        barrier_wait(full + 8 * at, parity);
        const uint32_t boxes = stages_at + at * Memory::STAGE + 2 * group * OUTER90_BOX;
        const uint32_t g_tile = stages_at + at * Memory::STAGE + 4 * OUTER90_BOX;
        const auto of_g = [&](int part, int k) {
            return operand(g_tile + part * PLANES * OUTER90_G, Swizzle::BYTES_32, 256, OUTER90_G) + 32 * k;
        };
        if constexpr (DOWN) {
#pragma unroll
            for (int i = 0; i < 8 * PARTS; ++i) {
                // Zeros, each a value of its own: ptxas 13.0 takes sums onto one zero for the same, and leaves out all but
                // one of their products.
                down[i] = PLANES == 1 ? 0.0f : __uint_as_float(__float_as_uint(down[i]) & apart.never);
            }
        }
        if (!masked) {
            if constexpr (PLANES == 1) products_begin();
#pragma unroll
            for (int box = 0; box < 2; ++box) {
                const uint64_t x = operand(boxes + box * OUTER90_BOX, Swizzle::BYTES_128, 1024);
                if constexpr (DOWN) {
                    const uint32_t rows = panel + (128 * group + 64 * box) * SEGMENT * 2;
                    multiply_64<T, PARTS, PLANES, 0, 1>(
                        down, apart, [&](int k) { return x + 2 * k; },
                        [&](int part, int k) {
                            return operand(rows + part * PLANES * OUTER90_PANEL, Swizzle::BYTES_32, 256,
                                           OUTER90_PANEL) +
                                   32 * k;
                        });
                }
                multiply_64<T, PARTS, PLANES, 1, 1>(
                    sums[box], apart, [&](int k) { return x + 128 * k; }, of_g);
            }
            if constexpr (PLANES == 1) {
                products_commit();
                products_wait_all();
            }
        } else if constexpr (!DOWN) {
            if (made) ring.wait(step);
            const uint32_t tile = boxes + group_warp / 2 * OUTER90_BOX, chunk = group_warp % 2 * 4;
            const uint32_t word = 4 * group + group_warp;
            const auto mask = [&](uint32_t i) { return made ? ring.mask(step, i) : kept_at(at); };
            multiply_kept<T, PARTS, PLANES, 1>(
                sums[0], apart, p.segments, ring.count,
                [&](Fragments(&kept)[4], uint32_t i) { load_kept_columns<0>(kept, tile, chunk, mask(i), word); }, of_g);
            multiply_kept<T, PARTS, PLANES, 1>(
                sums[1], apart, p.segments, ring.count,
                [&](Fragments(&kept)[4], uint32_t i) { load_kept_columns<1>(kept, tile, chunk + 2, mask(i), word); },
                of_g);
        }
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(empty + 8 * at);
            if (made) ring.release(step);
        }
        if (++at == STAGES) at = 0, parity ^= 1;
        if constexpr (DOWN) {
            // The second warpgroup's sums are added to the first's.
            const uint32_t now = exchange + step % Memory::EXCHANGES * Memory::SUMS + 4 * (threadIdx.x % 128);
            if (group == 1) {
#pragma unroll
                for (int i = 0; i < 8 * PARTS; ++i) store_shared(now + 512 * i, down[i]);
            }
            asm volatile("bar.sync 1, 256;" ::: "memory");
            if (group == 0) {
                float* out = p.g_partial + blockIdx.x * p.m * R;
#pragma unroll
                for (int i = 0; i < 8 * PARTS; i += 2) {
                    const uint64_t row = first_row + static_cast<uint64_t>(step) * OUTER90_ROWS + group_warp * 16 +
                                         lane / 4 + i / 2 % 2 * 8;
                    const float2 sum = make_float2(down[i] + __uint_as_float(load_shared(now + 512 * i)),
                                                   down[i + 1] + __uint_as_float(load_shared(now + 512 * (i + 1))));
                    if (row < p.m) *reinterpret_cast<float2*>(out + row * R + i / 4 * 8 + 2 * (lane % 4)) = sum;
                }
            }
            if constexpr (Memory::EXCHANGES == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
        }
    }
    float* out = p.partial + blockIdx.y * p.w * R;
#pragma unroll
    for (int box = 0; box < 2; ++box) {
        // A warp's columns of both products lie side by side under a mask, and in two boxes without.
        const uint32_t first = masked ? 32 * group_warp + 16 * box : 64 * box + 16 * group_warp;
#pragma unroll
        for (int i = 0; i < 8 * PARTS; i += 2) {
            const float scale = DOWN ? 1.0f : p.segments[i / 8].scale;
            const uint64_t column = column0 + 128 * group + first + lane / 4 + i / 2 % 2 * 8;
            if (column < p.w) {
                *reinterpret_cast<float2*>(out + column * R + i / 4 * 8 + 2 * (lane % 4)) =
                    make_float2(sums[box][i] * scale, sums[box][i + 1] * scale);
            }
        }
    }
    finish(p.early);
}

}  // namespace ferrotune
