// Rows that elementwise kernels read and write sixteen bytes at a time.
#pragma once

#include "common/memory.cuh"
#include "common/types.cuh"

namespace ferrotune {

// Elements of T in sixteen bytes.
template <typename T>
constexpr int LANES = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void unpack16(uint4 raw, float (&values)[LANES<T>]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            values[i] = __uint_as_float(words[i]);
        } else {
            float2 pair = unpack2<T>(words[i]);
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    }
}

// LANES<T> elements from column `column` of a row; those past `columns` are zero. With `vectors` the row is aligned to
// sixteen bytes and `columns` is a multiple of LANES<T>.
template <typename T>
__device__ __forceinline__ uint4 load_lanes(const T* row, uint32_t column, uint32_t columns, bool vectors) {
    if (vectors) {
        return column < columns ? *reinterpret_cast<const uint4*>(row + column) : make_uint4(0, 0, 0, 0);
    }
    alignas(16) T values[LANES<T>];
#pragma unroll
    for (int i = 0; i < LANES<T>; ++i) {
        values[i] = column + i < columns ? row[column + i] : from_float<T>(0.0f);
    }
    return *reinterpret_cast<uint4*>(values);
}

template <typename T>
__device__ __forceinline__ void store_lanes(T* row, uint32_t column, uint32_t columns, bool vectors,
                                            const float (&values)[LANES<T>]) {
    if (vectors) {
        if (column < columns) store16(row + column, pack16<T>(values));
        return;
    }
#pragma unroll
    for (int i = 0; i < LANES<T>; ++i) {
        if (column + i < columns) row[column + i] = from_float<T>(values[i]);
    }
}

}  // namespace ferrotune
