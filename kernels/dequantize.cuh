// 4-bit to floating point, in the tensor's own order.
#pragma once

#include <type_traits>

#include "common/memory.cuh"
#include "common/quant.cuh"
#include "common/types.cuh"

namespace ferrotune {

struct Dequantize {
    Quant4bit quant;
    void* out;  // [elements], aligned to 16 bytes
    uint64_t elements;
    uint32_t early;  // see common/launch.cuh
    uint32_t reserved;
};
static_assert(sizeof(Dequantize) == 80, "src/cuda/quant.rs lays it out alike");

// A thread writes `UNROLL` times 16 bytes, a warp 512 bytes in a row each time; the codes and absmax of all are loaded
// before the first is used. A block of threads covers whole blocks; what is left at the end, or all when the codes are
// not aligned, goes element by element.
//
// Floor, 14336 x 4096 nested NF4 to bf16: (29.4 + 0.9 + 117.4) MB / 2.96 TB/s = 50 us.
template <typename T, bool NESTED, int THREADS, int UNROLL>
__device__ __forceinline__ void dequantize(const Dequantize& p) {
    constexpr int PER = 16 / sizeof(T);  // elements a store
    constexpr int CHUNK = THREADS * PER * UNROLL;
    static_assert(CHUNK % 4096 == 0, "blocks must not straddle blocks of threads");
    __shared__ Tables<NESTED> tables;

    const uint64_t base = static_cast<uint64_t>(blockIdx.x) * CHUNK;
    const uint64_t left = p.elements - base;
    const uint8_t* packed = p.quant.packed + base / 2;
    T* out = static_cast<T*>(p.out) + base;
    const AbsmaxFrom<NESTED> blocks(p.quant, base >> p.quant.block_shift);
    const float offset = nested_offset<NESTED>(p.quant);

    if (left < CHUNK || !aligned(p.quant.packed, PER / 2)) {
        tables.fill<THREADS>(p.quant);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < CHUNK && i < left; i += THREADS) {
            Absmax<NESTED> absmax;
            absmax.load(blocks, i >> p.quant.block_shift);
            const float value = tables.value(packed[i / 2], i % 2 ? 0 : 4);
            out[i] = from_float<T>(mul_ftz(value, absmax.value(tables, offset)));
        }
        return;
    }

    using Word = std::conditional_t<PER == 8, uint32_t, uint16_t>;  // PER codes
    uint32_t words[UNROLL];
    Absmax<NESTED> absmax[UNROLL];
    const uint32_t start = threadIdx.x * PER;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        words[u] = load_once<Word>(packed + start / 2 + u * (THREADS * PER / 2));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        absmax[u].load(blocks, (start + u * THREADS * PER) >> p.quant.block_shift);
    }
    tables.fill<THREADS>(p.quant);
    __syncthreads();
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const float scale = absmax[u].value(tables, offset);
        float values[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            values[i] = mul_ftz(tables.value(words[u], 4 * (i ^ 1)), scale);
        }
        store16(out + start + u * (THREADS * PER), pack16<T>(values));
    }
}

}  // namespace ferrotune
