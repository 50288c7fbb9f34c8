// bitsandbytes' 4-bit format: element i of the flattened tensor is codebook[code i] * absmax[i / blocksize] in f32;
// element 2i is the high nibble of byte i, 2i + 1 the low one.
#pragma once

#include <cstdint>

#include "common/arithmetic.cuh"

namespace ferrotune {

// A 4-bit tensor, as Rust passes it.
struct Quant4bit {
    const uint8_t* packed;       // ceil(elements / 2) bytes
    const void* absmax;          // a block each: f32, or uint8 codes when nested
    const float* nested_absmax;  // a nested block each; null when not nested
    const float* nested_code;    // [256]
    const float* nested_offset;  // one value
    uint32_t block_shift;        // log2 of the elements a block
    uint32_t nested_shift;       // log2 of the blocks a nested block
    uint32_t fp4;                // 0 for NF4
    uint32_t reserved;
};
static_assert(sizeof(Quant4bit) == 56, "src/cuda/quant.rs lays it out alike");

constexpr float FP4_STEPS[8] = {0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f};

// Dettmers et al. 2023, arXiv 2305.14314, appendix E.
constexpr float NF4_STEPS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// [0] NF4, [1] FP4, whose code 8 is -0.
__constant__ float CODEBOOKS[2][16] = {
    {NF4_STEPS[0], NF4_STEPS[1], NF4_STEPS[2], NF4_STEPS[3], NF4_STEPS[4], NF4_STEPS[5], NF4_STEPS[6], NF4_STEPS[7],
     NF4_STEPS[8], NF4_STEPS[9], NF4_STEPS[10], NF4_STEPS[11], NF4_STEPS[12], NF4_STEPS[13], NF4_STEPS[14],
     NF4_STEPS[15]},
    {FP4_STEPS[0], FP4_STEPS[1], FP4_STEPS[2], FP4_STEPS[3], FP4_STEPS[4], FP4_STEPS[5], FP4_STEPS[6], FP4_STEPS[7],
     -FP4_STEPS[0], -FP4_STEPS[1], -FP4_STEPS[2], -FP4_STEPS[3], -FP4_STEPS[4], -FP4_STEPS[5], -FP4_STEPS[6],
     -FP4_STEPS[7]},
};

// One of four.
__device__ __forceinline__ float select4(uint32_t i, float first, float second, float third, float fourth) {
    const float low = i & 1 ? second : first, high = i & 1 ? fourth : third;
    return i & 2 ? high : low;
}

// CODEBOOKS' value `code` by instructions alone: constant memory that is cold waits for the device's.
__device__ __forceinline__ float codebook_value(uint32_t code, bool fp4) {
    if (fp4) {
        const float low = select4(code, FP4_STEPS[0], FP4_STEPS[1], FP4_STEPS[2], FP4_STEPS[3]);
        const float high = select4(code, FP4_STEPS[4], FP4_STEPS[5], FP4_STEPS[6], FP4_STEPS[7]);
        const float size = code & 4 ? high : low;
        return code & 8 ? -size : size;
    }
    const float first = select4(code, NF4_STEPS[0], NF4_STEPS[1], NF4_STEPS[2], NF4_STEPS[3]);
    const float second = select4(code, NF4_STEPS[4], NF4_STEPS[5], NF4_STEPS[6], NF4_STEPS[7]);
    const float third = select4(code, NF4_STEPS[8], NF4_STEPS[9], NF4_STEPS[10], NF4_STEPS[11]);
    const float fourth = select4(code, NF4_STEPS[12], NF4_STEPS[13], NF4_STEPS[14], NF4_STEPS[15]);
    return select4(code >> 2, first, second, third, fourth);
}

// What a block of threads looks values up in. The sixteen values lie in sixteen banks: no lookup waits for another.
template <bool NESTED>
struct Tables {
    float codebook[16];
    float nested_code[NESTED ? 256 : 1];

    // All THREADS threads call it; a barrier must follow.
    template <int THREADS>
    __device__ __forceinline__ void fill(const Quant4bit& quant) {
        if (threadIdx.x < 16) {
            codebook[threadIdx.x] = CODEBOOKS[quant.fp4][threadIdx.x];
        }
        if constexpr (NESTED) {
            static_assert(256 % THREADS == 0, "the threads share the values evenly");
#pragma unroll
            for (int i = 0; i < 256; i += THREADS) {
                nested_code[i + threadIdx.x] = __ldg(quant.nested_code + i + threadIdx.x);
            }
        }
    }

    // Value of the nibble of `word` that starts at bit `shift`, before scaling.
    __device__ __forceinline__ float value(uint32_t word, int shift) const {
        uint32_t bytes = (shift >= 2 ? word >> (shift - 2) : word << (2 - shift)) & 0x3Cu;
        return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(codebook) + bytes);
    }
};

// The absmax of blocks counted from block `first`, which all threads share.
template <bool NESTED>
struct AbsmaxFrom {
    const void* absmax;
    const float* nested;
    uint32_t nested_start;  // of `first` within its nested block
    uint32_t nested_shift;

    __device__ __forceinline__ AbsmaxFrom(const Quant4bit& quant, uint64_t first) {
        if constexpr (NESTED) {
            absmax = static_cast<const uint8_t*>(quant.absmax) + first;
            nested = quant.nested_absmax + (first >> quant.nested_shift);
            nested_start = static_cast<uint32_t>(first) & ((1u << quant.nested_shift) - 1);
            nested_shift = quant.nested_shift;
        } else {
            absmax = static_cast<const float*>(quant.absmax) + first;
        }
    }
};

// One block's absmax in two steps, so that the loads of several are under way before the first is needed.
template <bool NESTED>
struct Absmax;

template <>
struct Absmax<false> {
    float loaded;
    template <typename Index>
    __device__ __forceinline__ void load(const AbsmaxFrom<false>& from, Index block) {
        loaded = __ldg(static_cast<const float*>(from.absmax) + block);
    }
    __device__ __forceinline__ float value(const Tables<false>&, float) const { return loaded; }
};

template <>
struct Absmax<true> {
    uint32_t code;
    float scale;
    template <typename Index>
    __device__ __forceinline__ void load(const AbsmaxFrom<true>& from, Index block) {
        code = __ldg(static_cast<const uint8_t*>(from.absmax) + block);
        scale = __ldg(from.nested + ((from.nested_start + block) >> from.nested_shift));
    }
    // Two roundings, as bitsandbytes' two kernels give; never one fused operation.
    __device__ __forceinline__ float value(const Tables<true>& tables, float offset) const {
        return __fadd_rn(mul_ftz(tables.nested_code[code], scale), offset);
    }
};

template <bool NESTED>
__device__ __forceinline__ float nested_offset(const Quant4bit& quant) {
    return NESTED ? __ldg(quant.nested_offset) : 0.0f;
}

}  // namespace ferrotune
