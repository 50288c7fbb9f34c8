// From the rank: out = sum over projections of mask(H P^T) + bias, of H [m, R] and panels P [w, R]. The base product
// is accumulated onto it; or it is added to the base product, in f32, where the term must not be rounded alone.
#pragma once

#include "common/lora.cuh"
#include "common/memory.cuh"

namespace ferrotune {

// What multiplies what: sixteen columns of H and of the panel.
struct UpSegment {
    Segment of;
    uint32_t h_column;  // multiples of 8
    uint32_t panel_column;
};

struct LoraUp {
    const void* h;      // [m, h_stride]
    const void* panel;  // [w, panel_stride]
    void* out;          // [m, w]
    const float* bias;  // [w], or null
    Masks masks;
    uint64_t m;
    uint64_t w;
    uint32_t h_stride;
    uint32_t panel_stride;
    uint32_t h_plane;  // elements from one part of a value to the next
    uint32_t panel_plane;
    uint32_t planes;
    uint32_t parts;            // segments
    uint32_t rows_per_block;   // a multiple of 64
    uint32_t vectors;          // 1: rows of out are aligned to 16 bytes
    UpSegment segments[MAX_SEGMENTS];
};
static_assert(sizeof(LoraUp) == 224, "src/cuda/lora/kernels.rs lays it out alike");

constexpr int UP_ROWS = 64;      // of a step
constexpr int UP_COLUMNS = 128;  // of a block of threads

// A block of threads keeps the panel of its columns and goes down the rows. Four warps lie along the rows, two along
// the columns. A lane's sums are eight columns in a row, one store: of 32 columns, column 8a + 2b + c is column 2a + c of
// tile b, and row 8b + 2a + c of the panel in shared memory.
//
// Floor, out of 8192 x 4096 in 16 bits: 67 MB / 2.96 TB/s = 23 us; with ONTO, out is read too: 45 us.
template <typename T, bool ONTO>
__device__ __forceinline__ void lora_up(const LoraUp& p) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp % 4, column_warp = warp / 4;
    const int planes = p.planes, parts = p.parts;
    const int width = padded(SEGMENT * parts * planes);
    T* panel_tile = reinterpret_cast<T*>(shared);       // [UP_COLUMNS][width]: a part's planes, then the next part
    T* h_tiles = panel_tile + UP_COLUMNS * width;       // two of [UP_ROWS][width]
    const uint64_t column0 = static_cast<uint64_t>(blockIdx.x) * UP_COLUMNS;
    const uint64_t first_row = static_cast<uint64_t>(blockIdx.y) * p.rows_per_block;
    const uint64_t last_row = min(first_row + p.rows_per_block, p.m);
    const uint64_t seed = p.masks.seed != nullptr ? *p.masks.seed : 0;
    T* out = static_cast<T*>(p.out);

    const auto load = [&](T* tile, int rows, const void* from, uint64_t row0, uint64_t end, uint32_t stride,
                          uint32_t plane, bool of_h) {
        const T* source = static_cast<const T*>(from);
        const int chunks = 2 * parts * planes;  // 2, 4, 6, 8, 12 or 16
        for (int index = threadIdx.x; index < rows * chunks; index += THREADS) {
            const int row = index / chunks, chunk = index % chunks;
            const int part = chunk / (2 * planes), inner = chunk % (2 * planes);
            const int place = of_h ? row : (row & ~31) + row / 2 % 4 * 8 + row / 8 % 4 * 2 + row % 2;
            const bool inside = row0 + row < end;
            const uint64_t column = (of_h ? p.segments[part].h_column : p.segments[part].panel_column) +
                                    inner / 2 * plane + inner % 2 * 8;
            copy16_async(tile + place * width + chunk * 8, inside ? source + (row0 + row) * stride + column : source,
                         inside);
        }
    };

    load(panel_tile, UP_COLUMNS, p.panel, column0, p.w, p.panel_stride, p.panel_plane, false);
    load(h_tiles, UP_ROWS, p.h, first_row, p.m, p.h_stride, p.h_plane, true);
    commit_copies();
    uint32_t turn = 0;
    for (uint64_t row0 = first_row; row0 < last_row; row0 += UP_ROWS, turn ^= 1) {
        wait_copies(0);
        __syncthreads();
        if (row0 + UP_ROWS < last_row) {
            load(h_tiles + (turn ^ 1) * UP_ROWS * width, UP_ROWS, p.h, row0 + UP_ROWS, p.m, p.h_stride, p.h_plane,
                 true);
        }
        commit_copies();
        const T* h_tile = h_tiles + turn * UP_ROWS * width + row_warp * 16 * width + rows_first(width);
        const uint64_t my_row = row0 + row_warp * 16 + lane / 4;
        T* const my_out = out + my_row * p.w + column0 + 8 * (lane % 4);
#pragma unroll 1
        for (int group = 0; group < UP_COLUMNS / 2 / 32; ++group) {
            const int column = column_warp * (UP_COLUMNS / 2) + group * 32;
            const uint64_t my_column = column0 + column + 8 * (lane % 4);
            const T* panel_rows = panel_tile + column * width + columns_first(width);
            float total[4][4] = {};
            float sums[4][4] = {};
            for (int part = 0; part < parts; ++part) {
                if (p.masks.seed != nullptr && p.segments[part].of.first) {
#pragma unroll
                    for (int t = 0; t < 4; ++t)
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[t][i] = 0.0f;
                }
                const auto add = [&](float (&to)[4][4], int h_plane, int panel_plane) {
                    const Fragments a = load_matrices<false>(h_tile + (part * planes + h_plane) * SEGMENT);
#pragma unroll
                    for (int pair = 0; pair < 2; ++pair) {
                        const Fragments b = load_matrices<false>(panel_rows + 16 * pair * width +
                                                                 (part * planes + panel_plane) * SEGMENT);
                        multiply<T>(to[2 * pair], a, b.part[0], b.part[1]);
                        multiply<T>(to[2 * pair + 1], a, b.part[2], b.part[3]);
                    }
                };
                if (planes > 1) {
                    float lower[4][4] = {};
                    add(lower, 0, 1);
                    add(lower, 1, 0);
#pragma unroll
                    for (int t = 0; t < 4; ++t)
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[t][i] += lower[t][i] * (1.0f / PART_SCALE<T>);
                }
                add(sums, 0, 0);
                if (p.masks.seed != nullptr && (part + 1 == parts || p.segments[part + 1].of.first)) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t bits =
                            kept_bits<false>(seed, p.segments[part].of, my_row + 8 * half, my_column, p.masks.columns);
#pragma unroll
                        for (int t = 0; t < 4; ++t)
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                const float kept = bits >> (2 * t + i) & 1u ? p.segments[part].of.scale : 0.0f;
                                total[t][2 * half + i] += kept * sums[t][2 * half + i];
                            }
                    }
                }
            }
            if (p.masks.seed == nullptr) {
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) total[t][i] = sums[t][i];
            }
            if (p.bias != nullptr) {
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const uint64_t at = my_column + 2 * t + i;
                        const float bias = at < p.w ? __ldg(p.bias + at) : 0.0f;
                        total[t][i] += bias;
                        total[t][2 + i] += bias;
                    }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (my_row + 8 * half >= p.m || my_column >= p.w) continue;
                T* place = my_out + half * 8 * p.w + column;
                if (p.vectors) {
                    if constexpr (ONTO) {
                        const uint4 old = *reinterpret_cast<const uint4*>(place);
                        const uint32_t words[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
                        for (int t = 0; t < 4; ++t) {
                            const float2 two = unpack2<T>(words[t]);
                            total[t][2 * half] += two.x;
                            total[t][2 * half + 1] += two.y;
                        }
                    }
                    store16(place, make_uint4(pack2<T>(total[0][2 * half], total[0][2 * half + 1]),
                                              pack2<T>(total[1][2 * half], total[1][2 * half + 1]),
                                              pack2<T>(total[2][2 * half], total[2][2 * half + 1]),
                                              pack2<T>(total[3][2 * half], total[3][2 * half + 1])));
                } else {
#pragma unroll
                    for (int t = 0; t < 4; ++t)
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            if (my_column + 2 * t + i < p.w) {
                                const float old = ONTO ? to_float(place[2 * t + i]) : 0.0f;
                                place[2 * t + i] = from_float<T>(old + total[t][2 * half + i]);
                            }
                        }
                }
            }
        }
    }
}

}  // namespace ferrotune
