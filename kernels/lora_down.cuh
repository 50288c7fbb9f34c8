// To the rank: H = scale * mask(x) P, of x [m, k] and a panel P [k, R] of every projection that shares x.
#pragma once

#include "common/lora.cuh"

namespace ferrotune {

struct LoraDown {
    const void* x;      // [m, k]
    const void* panel;  // [k, planes * columns]
    void* out;          // [m, planes * columns]
    Masks masks;
    uint8_t* bits;  // where an only projection's mask is kept, [m, kept_words(k)], or null
    uint64_t m;
    uint64_t k;
    uint32_t planes;
    uint32_t stages;   // of the ring in shared memory, 2 to 6
    uint32_t vectors;  // 1: rows of x are aligned to 16 bytes, and k is a multiple of 8
    uint32_t reserved;
    Segment segments[MAX_SEGMENTS];
};
static_assert(sizeof(LoraDown) == 176, "src/cuda/lora/kernels.rs lays it out alike");

// Rows and depth of a step of x, by the warps along the rows; the others share the depth.
template <int ROW_WARPS>
struct DownTile {
    static constexpr int ROWS = 16 * ROW_WARPS;
    static constexpr int DEPTH_WARPS = WARPS / ROW_WARPS;
    static constexpr int DEPTH = 128;
    static constexpr int STEPS = DEPTH / 16 / DEPTH_WARPS;  // a warp's, of 16
};

// A block of threads takes DownTile::ROWS rows of x and all of k, so that x is read once for all projections.
//
// Floor, x of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us; the panel's reads are L2's.
template <typename T, int R, int ROW_WARPS>
__device__ __forceinline__ void lora_down(const LoraDown& p) {
    using Tile = DownTile<ROW_WARPS>;
    constexpr int PARTS = R / SEGMENT;
    extern __shared__ __align__(16) unsigned char shared[];

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp % ROW_WARPS, depth_warp = warp / ROW_WARPS;
    const int planes = p.planes;
    const int panel_width = padded(R * planes);
    const int x_elements = Tile::ROWS * padded(Tile::DEPTH);
    const int stage_elements = x_elements + Tile::DEPTH * panel_width;
    T* ring = reinterpret_cast<T*>(shared);
    const T* x = static_cast<const T*>(p.x);
    const T* panel = static_cast<const T*>(p.panel);
    const uint64_t row0 = static_cast<uint64_t>(blockIdx.x) * Tile::ROWS;
    const uint32_t steps = static_cast<uint32_t>((p.k + Tile::DEPTH - 1) / Tile::DEPTH);
    // Blocks start at other depths: all at one would ask the same few channels of memory.
    const uint32_t start = blockIdx.x % steps;
    const uint64_t seed = p.masks.seed != nullptr ? *p.masks.seed : 0;

    const auto around = [&](uint32_t step) { return step + start < steps ? step + start : step + start - steps; };
    Ring filling{p.stages}, reading{p.stages};
    const auto load = [&](uint32_t step) {
        T* stage = ring + filling.at * stage_elements;
        const uint64_t column0 = static_cast<uint64_t>(around(step)) * Tile::DEPTH;
        load_tile<T, Tile::ROWS, Tile::DEPTH>(stage, x, row0, p.m, column0, p.k, p.vectors);
        load_panel<T, R, Tile::DEPTH>(stage + x_elements, panel, column0, p.k, planes * R, R, planes);
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
        const T* panel_tile = x_tile + x_elements;
#pragma unroll
        for (int s = 0; s < Tile::STEPS; ++s) {
            const int depth = (depth_warp * Tile::STEPS + s) * 16;
            const int place = rows_first(padded(Tile::DEPTH));
            const Fragments a =
                load_matrices<false>(x_tile + row_warp * 16 * padded(Tile::DEPTH) + depth + place);
            Fragments masked = a;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                if (p.masks.seed != nullptr && p.segments[part].first) {
                    const uint64_t row = row0 + row_warp * 16 + lane % 16;
                    const uint64_t column = static_cast<uint64_t>(around(step)) * Tile::DEPTH + depth + lane / 16 * 8;
                    const uint32_t kept = kept_bits<true>(seed, p.segments[part], row, column, p.masks.columns);
                    if (p.bits != nullptr) {
                        // Sixteen columns are a byte of a word's even elements and one of its odd ones.
                        const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, kept, 16), odd = lane / 16;
                        const uint32_t first = odd ? other >> 8 : kept, second = odd ? kept >> 8 : other;
                        const uint64_t place = row * 4 * kept_words(p.k) + column / 32 * 4 + 2 * odd + column / 16 % 2;
                        if (row < p.m) p.bits[place] = static_cast<uint8_t>((first & 0xFu) | second << 4);
                    }
                    masked = mask_fragments<false>(a, kept);
                }
                multiply_parts<T, R>(sums[2 * part], sums[2 * part + 1], masked,
                                     panel_tile + depth * panel_width + part * SEGMENT + rows_first(panel_width),
                                     planes);
            }
        }
    }

    // The warps that shared the depth add up in their order.
    wait_copies(0);
    __syncthreads();
    float* exchange = reinterpret_cast<float*>(shared);  // [DEPTH_WARPS][ROWS][R]
#pragma unroll
    for (int tile = 0; tile < 2 * PARTS; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_warp * 16 + lane / 4 + 8 * half, column = tile * 8 + 2 * (lane % 4);
            *reinterpret_cast<float2*>(exchange + (depth_warp * Tile::ROWS + row) * R + column) =
                make_float2(sums[tile][2 * half], sums[tile][2 * half + 1]);
        }
    }
    __syncthreads();
    T* out = static_cast<T*>(p.out);
    for (int index = threadIdx.x; index < Tile::ROWS * R / 2; index += THREADS) {
        const int row = index / (R / 2), column = index % (R / 2) * 2;
        if (row0 + row >= p.m) continue;
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int part = 0; part < Tile::DEPTH_WARPS; ++part) {
            const float2 more = *reinterpret_cast<const float2*>(exchange + (part * Tile::ROWS + row) * R + column);
            sum.x += more.x;
            sum.y += more.y;
        }
        const float scale = p.segments[column / SEGMENT].scale;
        sum.x *= scale;
        sum.y *= scale;
        T* place = out + (row0 + row) * planes * R + column;
        for (int plane = 0; plane < planes; ++plane, place += R) {
            *reinterpret_cast<uint32_t*>(place) = pack2<T>(sum.x, sum.y);
            sum.x = low_part<T>(sum.x);
            sum.y = low_part<T>(sum.y);
        }
    }
}

}  // namespace ferrotune
