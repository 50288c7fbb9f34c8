// What the LoRA kernels share: the layout of panels, segments, tiles in shared memory, and masks in registers.
//
// A panel holds an adapter matrix of `width` (k for A, n for B) rows and R columns in the input's 16-bit type, ranks
// padded with zeros to multiples of 16; adapters wider than the input's type come as two planes, high then low parts:
// row i is [high 0..R) [low 0..R). H = scaling * dropout(x) A^T and G = scaling * dY B are laid out alike, a row a token.
#pragma once

#include "common/mma.cuh"
#include "common/philox.cuh"

namespace ferrotune {

constexpr int SEGMENT = 16;      // columns of a panel that are one projection's
constexpr int MAX_SEGMENTS = 4;  // 64 columns: what one pass takes
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// Sixteen columns of a panel.
struct Segment {
    uint64_t stream;     // of the projection's dropout mask
    float scale;         // of its sums
    uint32_t threshold;  // round(p * 65536); 0 drops nothing
    uint32_t first;      // 1: another projection starts here
    uint32_t reserved;
};

// Keys of the masks; null seed: nothing is dropped.
struct Masks {
    const uint64_t* seed;
    uint64_t columns;  // of the matrix that is masked: element (i, j) has index i * columns + j
};

// Rows of a tile in shared memory are 16 bytes longer than what they hold, so that eight in a column hit other banks.
__host__ __device__ constexpr int padded(int columns) { return columns + 8; }

// Rows row0.. and columns column0.. of `from` to a tile of ROWS x COLUMNS; zeros outside. With `vectors`, rows of `from`
// start on 16 bytes and `columns` is a multiple of 8: copies are asynchronous.
template <typename T, int ROWS, int COLUMNS>
__device__ __forceinline__ void load_tile(T* tile, const T* from, uint64_t row0, uint64_t rows, uint64_t column0,
                                          uint64_t columns, uint64_t stride, bool vectors) {
    if (vectors) {
        constexpr int CHUNKS = COLUMNS / 8;
        static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies alike");
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
            const int index = i * THREADS + threadIdx.x;
            const int row = index / CHUNKS, column = index % CHUNKS * 8;
            const bool inside = row0 + row < rows && column0 + column < columns;
            copy16_async(tile + row * padded(COLUMNS) + column,
                         inside ? from + (row0 + row) * stride + column0 + column : from, inside);
        }
    } else {
        for (int index = threadIdx.x; index < ROWS * COLUMNS; index += THREADS) {
            const int row = index / COLUMNS, column = index % COLUMNS;
            const bool inside = row0 + row < rows && column0 + column < columns;
            tile[row * padded(COLUMNS) + column] =
                inside ? from[(row0 + row) * stride + column0 + column] : from_float<T>(0.0f);
        }
    }
}

// Rows of a panel, H or G: `planes` times R columns of each, to rows of padded(planes * R). `from` is aligned to 16
// bytes, `stride` and `plane` (elements from a high part to its low part) are multiples of 8.
template <typename T, int R>
__device__ __forceinline__ void load_panel(T* tile, const T* from, int tile_rows, uint64_t row0, uint64_t rows,
                                           uint64_t stride, uint64_t plane, int planes) {
    constexpr int CHUNKS = R / 8;
    const int chunks = CHUNKS * planes;
    const int width = padded(R * planes);
    for (int index = threadIdx.x; index < tile_rows * chunks; index += THREADS) {
        const int row = index / chunks, chunk = index % chunks;
        const bool inside = row0 + row < rows;
        const uint64_t column = chunk / CHUNKS * plane + chunk % CHUNKS * 8;
        copy16_async(tile + row * width + chunk * 8, inside ? from + (row0 + row) * stride + column : from, inside);
    }
}

// Which of elements (row, column) .. (row, column + 7) are kept: a bit each, the first the lowest.
__device__ __forceinline__ uint32_t kept_bits(uint64_t seed, const Segment& segment, uint64_t row, uint64_t column,
                                              uint64_t columns) {
    const uint64_t index = row * columns + column;
    const uint32_t shift = static_cast<uint32_t>(index % DROPOUT_LANES);
    uint32_t bits = 0;
    uint4 uniforms = dropout_uniforms(seed, segment.stream, index / DROPOUT_LANES);
#pragma unroll
    for (int lane = 0; lane < DROPOUT_LANES; ++lane) {
        bits |= static_cast<uint32_t>(dropout_keeps(uniforms, lane, segment.threshold)) << lane;
    }
    if (shift != 0) {  // rows that are no multiple of 8 elements long: two calls
        uniforms = dropout_uniforms(seed, segment.stream, index / DROPOUT_LANES + 1);
#pragma unroll
        for (int lane = 0; lane < DROPOUT_LANES; ++lane) {
            bits |= static_cast<uint32_t>(dropout_keeps(uniforms, lane, segment.threshold)) << (lane + DROPOUT_LANES);
        }
        bits >>= shift;
    }
    return bits & 0xFFu;
}

// All ones in the halves of a register whose element is kept.
__device__ __forceinline__ uint32_t keep_halves(uint32_t low, uint32_t high) {
    return (low & 1u ? 0x0000FFFFu : 0u) | (high & 1u ? 0xFFFF0000u : 0u);
}

// `a` with dropped elements zeroed; `bits` are kept_bits of the row of 16 bytes whose address this lane gave to
// load_matrices.
template <bool TRANSPOSED>
__device__ __forceinline__ Fragments mask_fragments(const Fragments& a, uint32_t bits) {
    const int lane = threadIdx.x % 32;
    Fragments masked;
    if constexpr (TRANSPOSED) {
        const uint32_t two_rows = bits | __shfl_down_sync(0xFFFFFFFFu, bits, 1) << 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t found = __shfl_sync(0xFFFFFFFFu, two_rows, 8 * i + 2 * (lane % 4)) >> (lane / 4);
            masked.part[i] = a.part[i] & keep_halves(found, found >> 8);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t found = __shfl_sync(0xFFFFFFFFu, bits, 8 * i + lane / 4) >> (2 * (lane % 4));
            masked.part[i] = a.part[i] & keep_halves(found, found >> 1);
        }
    }
    return masked;
}

// Offsets of the row whose address this lane gives to load_matrices, for an operand of 16 x 16 at (row, column) of a
// tile whose matrices are taken down the rows first, or along them first.
__device__ __forceinline__ int rows_first(int width) {
    const int lane = threadIdx.x % 32;
    return (lane % 16) * width + lane / 16 * 8;
}
__device__ __forceinline__ int columns_first(int width) {
    const int lane = threadIdx.x % 32;
    return (lane % 8 + lane / 16 * 8) * width + lane / 8 % 2 * 8;
}

}  // namespace ferrotune
