// 4-bit [n, k] to floating point [k, n]: what the gradient of a linear layer's input is multiplied with.
#pragma once

#include <type_traits>

#include "common/memory.cuh"
#include "common/quant.cuh"
#include "common/types.cuh"

namespace ferrotune {

struct DequantizeTransposed {
    Quant4bit quant;
    void* out;  // [k, n]
    uint64_t n;
    uint64_t k;
};
static_assert(sizeof(DequantizeTransposed) == 80, "src/cuda/quant.rs lays it out alike");

// For k a multiple of KS, n of 16 / sizeof(T), codes aligned to KS / 2 bytes and `out` to 16. KS divides every block
// size: the codes that a thread loads from a row have one absmax.
//
// A thread holds KS columns of as many rows as fill 16 bytes of T, so that each column is one store: the transposition
// costs nothing. LANES threads of a warp lie along n, the rest and the warps along k; blocks of threads along n first,
// which fills rows of `out` before it goes on.
//
// Floor, 14336 x 4096 nested NF4 to bf16: as straight, 50 us.
template <typename T, bool NESTED, int THREADS, int LANES, int KS>
__device__ __forceinline__ void dequantize_transposed(const DequantizeTransposed& p) {
    constexpr int ROWS = 16 / sizeof(T);
    constexpr int K_THREADS = THREADS / LANES;
    static_assert(KS == 8 || KS == 16 || KS == 32, "a load of 4, 8 or 16 bytes, within a block");
    using Codes = std::conditional_t<KS == 32, uint4, std::conditional_t<KS == 16, uint2, uint32_t>>;
    __shared__ Tables<NESTED> tables;

    const uint32_t lane = threadIdx.x % LANES;
    const uint32_t k_thread = threadIdx.x / LANES;
    const uint32_t n_blocks = static_cast<uint32_t>((p.n + LANES * ROWS - 1) / (LANES * ROWS));
    const uint64_t row = static_cast<uint64_t>(blockIdx.x % n_blocks * LANES + lane) * ROWS;
    const uint64_t column = static_cast<uint64_t>(blockIdx.x / n_blocks * K_THREADS + k_thread) * KS;
    const bool inside = row < p.n && column < p.k;

    Codes codes[ROWS];
    Absmax<NESTED> absmax[ROWS];
    if (inside) {
        const AbsmaxFrom<NESTED> blocks(p.quant, 0);
        uint64_t element = row * p.k + column;
#pragma unroll
        for (int r = 0; r < ROWS; ++r, element += p.k) {
            codes[r] = __ldg(reinterpret_cast<const Codes*>(p.quant.packed + element / 2));
            absmax[r].load(blocks, element >> p.quant.block_shift);
        }
    }
    const float offset = nested_offset<NESTED>(p.quant);
    tables.template fill<THREADS>(p.quant);
    __syncthreads();
    if (!inside) {
        return;
    }
    float scale[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        scale[r] = absmax[r].value(tables, offset);
    }
    T* out = static_cast<T*>(p.out) + column * p.n + row;
#pragma unroll
    for (int c = 0; c < KS; ++c, out += p.n) {
        float values[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t word = reinterpret_cast<const uint32_t*>(&codes[r])[c / 8];
            values[r] = mul_ftz(tables.value(word, 4 * (c % 8 ^ 1)), scale[r]);
        }
        store16(out, pack16<T>(values));
    }
}

// Any n and k, any alignment: tiles of 32 x 32 go through shared memory, 2 or 4 bytes a thread and store.
template <typename T, bool NESTED, int THREADS>
__device__ __forceinline__ void dequantize_transposed_any(const DequantizeTransposed& p) {
    constexpr int TILE = 32;
    constexpr int STEP = THREADS / TILE;
    __shared__ Tables<NESTED> tables;
    __shared__ float tile[TILE][TILE + 1];

    const uint32_t x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const uint32_t n_blocks = static_cast<uint32_t>((p.n + TILE - 1) / TILE);
    const uint64_t row = static_cast<uint64_t>(blockIdx.x % n_blocks) * TILE;
    const uint64_t column = static_cast<uint64_t>(blockIdx.x / n_blocks) * TILE;
    const AbsmaxFrom<NESTED> blocks(p.quant, 0);
    const float offset = nested_offset<NESTED>(p.quant);
    tables.template fill<THREADS>(p.quant);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) {
        if (row + y + i < p.n && column + x < p.k) {
            const uint64_t element = (row + y + i) * p.k + column + x;
            Absmax<NESTED> absmax;
            absmax.load(blocks, element >> p.quant.block_shift);
            const float value = tables.value(p.quant.packed[element / 2], element % 2 ? 0 : 4);
            tile[y + i][x] = mul_ftz(value, absmax.value(tables, offset));
        }
    }
    __syncthreads();
    T* out = static_cast<T*>(p.out);
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) {
        if (row + x < p.n && column + y + i < p.k) {
            out[(column + y + i) * p.n + row + x] = from_float<T>(tile[x][y + i]);
        }
    }
}

}  // namespace ferrotune
