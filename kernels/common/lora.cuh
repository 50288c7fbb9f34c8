// What the LoRA kernels share: the layout of panels, segments, tiles in shared memory, and masks in registers.
//
// A panel holds an adapter matrix of `width` (k for A, n for B) rows and R columns in the input's 16-bit type, ranks
// padded with zeros to multiples of 16. Adapters wider than the input's type are sums of three parts of that type, a
// plane each: row i is [first 0..R) [second 0..R) [third 0..R). H = scaling * dropout(x) A^T and G = scaling * dY B are
// laid out alike, a row a token.
#pragma once

#include "common/mma.cuh"
#include "common/philox.cuh"

namespace ferrotune {

constexpr int SEGMENT = 16;      // columns of a panel that are one projection's
constexpr int MAX_SEGMENTS = 4;  // 64 columns: what one pass takes
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// How element types are numbered in what Rust passes.
enum ElementType : uint32_t { F32, F16, BF16 };

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

// A mask that is kept for backward has the words of kept_of_four_calls, and rows that are a multiple of 16 bytes long, so
// that they can be copied asynchronously.
__host__ __device__ constexpr uint64_t kept_words(uint64_t columns) { return (columns + 127) / 128 * 4; }

// Rows of a tile in shared memory are 16 bytes longer than what they hold, so that eight in a column hit other banks.
__host__ __device__ constexpr int padded(int columns) { return columns + 8; }

// Rows row0.. and columns column0.. of `from` to a tile of ROWS x COLUMNS; zeros outside. With `vectors`, rows of `from`
// start on 16 bytes and `columns` is a multiple of 8: copies are asynchronous.
template <typename T, int ROWS, int COLUMNS>
__device__ __forceinline__ void load_tile(T* tile, const T* from, uint64_t row0, uint64_t rows, uint64_t column0,
                                          uint64_t columns, bool vectors) {
    const T* first = from + row0 * columns + column0;
    const uint32_t rows_left = static_cast<uint32_t>(min(rows - min(row0, rows), static_cast<uint64_t>(ROWS)));
    const uint32_t columns_left = static_cast<uint32_t>(min(columns - column0, static_cast<uint64_t>(COLUMNS)));
    if (vectors) {
        constexpr int CHUNKS = COLUMNS / 8;
        static_assert(ROWS * CHUNKS % THREADS == 0 && THREADS % CHUNKS == 0, "every thread copies alike");
        constexpr int STEP = THREADS / CHUNKS;
        const int column = threadIdx.x % CHUNKS * 8;
        int row = threadIdx.x / CHUNKS;
        const T* source = first + row * columns + column;
        T* place = tile + row * padded(COLUMNS) + column;
        const bool column_inside = column < columns_left;
#pragma unroll
        for (int i = 0; i < ROWS / STEP; ++i, row += STEP, source += STEP * columns) {
            const bool inside = column_inside && row < rows_left;
            copy16_async(place + i * STEP * padded(COLUMNS), inside ? source : from, inside);
        }
    } else {
        for (int index = threadIdx.x; index < ROWS * COLUMNS; index += THREADS) {
            const int row = index / COLUMNS, column = index % COLUMNS;
            const bool inside = row < rows_left && column < columns_left;
            tile[row * padded(COLUMNS) + column] = inside ? first[row * columns + column] : from_float<T>(0.0f);
        }
    }
}

// The stage of a ring that a step uses: counted, as a remainder costs more than the rest of a step's addresses.
struct Ring {
    uint32_t stages;
    uint32_t at = 0;
    __device__ __forceinline__ void next() { at = at + 1 == stages ? 0 : at + 1; }
};

// Rows of a panel, H or G: `planes` times R columns of each, to rows of padded(planes * R). `from` is aligned to 16
// bytes, `stride` and `plane` (elements from one part of a value to the next) are multiples of 8.
template <typename T, int R, int ROWS>
__device__ __forceinline__ void load_panel(T* tile, const T* from, uint64_t row0, uint64_t rows, uint32_t stride,
                                           uint32_t plane, int planes) {
    constexpr int CHUNKS = R / 8;
    const int width = padded(R * planes);
    const T* first = from + row0 * stride;
    const uint32_t left = static_cast<uint32_t>(min(rows - min(row0, rows), static_cast<uint64_t>(ROWS)));
    for (int p = 0; p < planes; ++p, first += plane, tile += R) {
#pragma unroll
        for (int i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; ++i) {
            const int index = i * THREADS + threadIdx.x;
            const int row = index / CHUNKS, chunk = index % CHUNKS;
            const bool inside = row < left;
            if (ROWS * CHUNKS % THREADS == 0 || row < ROWS) {
                copy16_async(tile + row * width + chunk * 8, inside ? first + row * stride + chunk * 8 : from, inside);
            }
        }
    }
}

// `bits` with bit BIT set if a 16-bit uniform, in the upper half of `word` above anything, is at least the threshold.
template <int BIT>
__device__ __forceinline__ void keep_bit(uint32_t& bits, uint32_t word, uint32_t threshold) {
    asm("{\n\t.reg .pred kept;\n\tsetp.ge.u32 kept, %1, %2;\n\t@kept or.b32 %0, %0, %3;\n\t}"
        : "+r"(bits)
        : "r"(word), "r"(threshold), "n"(1u << BIT));
}

// Which of the eight elements of one Philox call are kept: bit i for element i; PAIRED: bit i for element 2i and 8 + i
// for 2i + 1.
template <bool PAIRED>
__device__ __forceinline__ uint32_t kept_of_call(uint64_t seed, const Segment& segment, uint64_t call) {
    const uint4 uniforms = dropout_uniforms(seed, segment.stream, call);
    // No uniform reaches 65536; what p = 1 keeps all the same, one word in 2^32, is scaled by 0.
    const uint32_t threshold = segment.threshold > 0xFFFFu ? 0xFFFFFFFFu : segment.threshold << 16;
    uint32_t bits = 0;
    keep_bit<0>(bits, uniforms.x << 16, threshold);
    keep_bit<PAIRED ? 8 : 1>(bits, uniforms.x, threshold);
    keep_bit<PAIRED ? 1 : 2>(bits, uniforms.y << 16, threshold);
    keep_bit<PAIRED ? 9 : 3>(bits, uniforms.y, threshold);
    keep_bit<PAIRED ? 2 : 4>(bits, uniforms.z << 16, threshold);
    keep_bit<PAIRED ? 10 : 5>(bits, uniforms.z, threshold);
    keep_bit<PAIRED ? 3 : 6>(bits, uniforms.w << 16, threshold);
    keep_bit<PAIRED ? 11 : 7>(bits, uniforms.w, threshold);
    return bits;
}

// Which 16-bit uniforms are kept, for two of them a word: held to what lies between `low` and `high`, in each half, a word
// is `none` where neither is kept, and one more in the half of one that is.
struct Threshold {
    uint32_t low, high, none;
    __device__ __forceinline__ explicit Threshold(const Segment& segment) {
        const uint32_t t = segment.threshold;  // p = 0 keeps all, p = 1 nothing
        low = t == 0 ? 1 : t > 0xFFFFu ? 0 : t - 1;
        high = t == 0 ? 1 : t > 0xFFFFu ? 0 : t;
        none = t == 0 ? 0 : low;
        low *= 0x10001u, high *= 0x10001u, none *= 0x10001u;
    }
};

// The same of four calls in a row, of the first 2^32: bit i for element 2i of the 32, bit 16 + i for element 2i + 1. (By
// Hopper's instructions for two 16-bit values a word.)
__device__ __forceinline__ void keep_call(uint32_t& sum, uint64_t seed, const Segment& segment, uint32_t call,
                                          const Threshold& threshold) {
    const uint4 uniforms = dropout_uniforms(seed, segment.stream, call);
    const auto keep = [&](uint32_t word) {
        const uint32_t held = __vminu2(__vmaxu2(word, threshold.low), threshold.high);
        // sum = 2 * sum + held; as a product it would wait for those of Philox.
        asm("add.u32 %0, %0, %0;\n\tadd.u32 %0, %0, %1;" : "+r"(sum) : "r"(held));
    };
    keep(uniforms.w);
    keep(uniforms.z);
    keep(uniforms.y);
    keep(uniforms.x);
}
__device__ __forceinline__ uint32_t kept_of_four_calls(uint64_t seed, const Segment& segment, uint32_t call) {
    const Threshold threshold(segment);
    uint32_t sum = 0;
#pragma unroll
    for (int i = 3; i >= 0; --i) keep_call(sum, seed, segment, call + i, threshold);
    return sum - 0xFFFFu * threshold.none;
}

// The same of elements (row, column) .. (row, column + 7), `column` a multiple of 8.
template <bool PAIRED>
__device__ __forceinline__ uint32_t kept_bits(uint64_t seed, const Segment& segment, uint64_t row, uint64_t column,
                                              uint64_t columns) {
    const uint64_t index = row * columns + column;
    const uint32_t shift = static_cast<uint32_t>(columns % 8 == 0 ? 0 : index % 8);
    if (shift == 0) return kept_of_call<PAIRED>(seed, segment, index / 8);
    // Rows that are no multiple of 8 elements long: two calls.
    uint32_t bits = kept_of_call<false>(seed, segment, index / 8);
    bits = (bits | kept_of_call<false>(seed, segment, index / 8 + 1) << 8) >> shift;
    if (!PAIRED) return bits & 0xFFu;
    uint32_t paired = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) paired |= (bits >> (2 * i) & 1u) << i | (bits >> (2 * i + 1) & 1u) << (8 + i);
    return paired;
}

// `a` with dropped elements zeroed; `bits` are kept_bits<!TRANSPOSED> of the row of 16 bytes whose address this lane
// gave to load_matrices.
template <bool TRANSPOSED>
__device__ __forceinline__ Fragments mask_fragments(const Fragments& a, uint32_t bits) {
    const int lane = threadIdx.x % 32;
    if constexpr (TRANSPOSED) bits |= __shfl_down_sync(0xFFFFFFFFu, bits, 1) << 8;
    const int shift = 7 - (TRANSPOSED ? lane / 4 : lane % 4);
    Fragments masked;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int from = 8 * i + (TRANSPOSED ? 2 * (lane % 4) : lane / 4);
        const uint32_t found = __shfl_sync(0xFFFFFFFFu, bits, from) << shift;
        // The sign of byte 0 to all of the lower half, that of byte 1 to the upper.
        uint32_t keep;
        asm("prmt.b32 %0, %1, 0, 0x9988;" : "=r"(keep) : "r"(found));
        masked.part[i] = a.part[i] & keep;
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

// sums += a * b for sixteen columns of a panel's tile, `b` being the row whose address this lane gives. Tensor cores cut
// their sums off: those of a wider adapter's parts are kept apart for sixteen products, and added in f32.
template <typename T, int R>
__device__ __forceinline__ void multiply_parts(float (&low)[4], float (&high)[4], const Fragments& a, const T* b,
                                               int planes) {
    if (planes == 1) {
        const Fragments f = load_matrices<true>(b);
        multiply<T>(low, a, f.part[0], f.part[1]);
        multiply<T>(high, a, f.part[2], f.part[3]);
        return;
    }
    float low_sums[4] = {}, high_sums[4] = {};
#pragma unroll 1
    for (int plane = planes - 1; plane >= 0; --plane) {
        const Fragments f = load_matrices<true>(b + plane * R);
        float low_now[4] = {}, high_now[4] = {};
        multiply<T>(low_now, a, f.part[0], f.part[1]);
        multiply<T>(high_now, a, f.part[2], f.part[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low_sums[i] = low_sums[i] * (1.0f / PART_SCALE<T>) + low_now[i];
            high_sums[i] = high_sums[i] * (1.0f / PART_SCALE<T>) + high_now[i];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        low[i] += low_sums[i];
        high[i] += high_sums[i];
    }
}

}  // namespace ferrotune
