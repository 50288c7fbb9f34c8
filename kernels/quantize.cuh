// Floating point to 4 bits, with the codes and absmax of bitsandbytes' CUDA code: x / absmax by an approximate reciprocal,
// compared with the midpoints between the codebook's values; subnormals count as zero. A block of zeros, whose x / absmax
// is NaN, gets code 0 throughout.
#pragma once

#include "common/arithmetic.cuh"
#include "common/memory.cuh"
#include "common/types.cuh"

namespace ferrotune {

struct Quantize {
    const void* values;  // [elements]
    uint8_t* packed;     // [ceil(elements / 2)], aligned to 4 bytes
    float* absmax;       // [blocks]
    uint64_t elements;
    uint32_t block_shift;  // log2 of the elements a block, 5 to 12
    uint32_t reserved;
};
static_assert(sizeof(Quantize) == 40, "src/cuda/quant.rs lays it out alike");

constexpr int MIDPOINTS = 15;

// NF4's midpoints, ascending: the code is the number of those below x.
__constant__ float NF4_MIDPOINTS[MIDPOINTS] = {
    -0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
    0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};

// FP4's midpoints of |x|, ascending, and the codes around them.
constexpr int FP4_MIDPOINT_COUNT = 7;
__constant__ float FP4_MIDPOINTS[FP4_MIDPOINT_COUNT] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                                        0.4166667f,  0.583333f,  0.8333333f};
constexpr uint32_t FP4_CODES = 0x32547610;  // nibble i is the code of the i-th smallest magnitude

// Bins of [-1, 1], narrower than any two midpoints are apart: a bin has one midpoint at most, so one comparison settles
// the code. `bin` is monotone in x, whatever is rounded, and tables are made with it: the result is exact. The last bin
// is NaN's.
struct Bins {
    static constexpr uint32_t COUNT = 32;
    float midpoint[COUNT];  // infinity where there is none
    uint32_t code[COUNT];   // of x at most the midpoint; for FP4 also << 8 what to flip above it

    // 4 * bin of x: bits 2 to 6 of round(60 x) + 62, which the addition of 2^23 leaves in the mantissa's low end. The
    // bins are 1 / 15 wide; x is at most one unit in the last place beyond 1.
    static __device__ __forceinline__ uint32_t offset(float x) {
        return __float_as_uint(__fmaf_rn(x, 60.0f, 8388670.0f)) & 0x7Cu;
    }

    template <bool FP4>
    __device__ __forceinline__ void fill() {
        constexpr int count = FP4 ? FP4_MIDPOINT_COUNT : MIDPOINTS;
        if (threadIdx.x >= COUNT) {
            return;
        }
        float mine = INFINITY;
        uint32_t below = 0;
        for (int i = 0; i < count; ++i) {
            const float other = FP4 ? FP4_MIDPOINTS[i] : NF4_MIDPOINTS[i];
            const uint32_t bin = offset(other) / 4;
            below += bin < threadIdx.x;
            mine = bin == threadIdx.x ? other : mine;
        }
        if (threadIdx.x == COUNT - 1) {
            below = 0;
        }
        midpoint[threadIdx.x] = mine;
        if constexpr (FP4) {
            const uint32_t low = FP4_CODES >> (4 * below) & 7, high = FP4_CODES >> (4 * min(below + 1, 7u)) & 7;
            code[threadIdx.x] = low | (low ^ high) << 8;
        } else {
            code[threadIdx.x] = below;
        }
    }

    template <bool FP4>
    __device__ __forceinline__ uint32_t encode(float x) const {
        const float magnitude = FP4 ? fabsf(x) : x;
        const uint32_t at = offset(magnitude);
        const float limit = *reinterpret_cast<const float*>(reinterpret_cast<const char*>(midpoint) + at);
        const uint32_t entry = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(code) + at);
        if constexpr (FP4) {
            const uint32_t low = entry & 7, flip = entry >> 8;
            return (magnitude > limit ? low ^ flip : low) | (x < 0.0f ? 8 : 0);
        } else {
            // The sign of midpoint - x, which no rounding changes, is 1 iff x is above; a NaN has sign 0 here.
            return entry + (__float_as_uint(__fadd_rn(limit, -x)) >> 31);
        }
    }
};

// Eight elements of T in registers.
template <typename T>
struct Eight {
    static constexpr int WORDS = 2 * sizeof(T);
    uint32_t words[WORDS];

    __device__ __forceinline__ void load(const T* from) {
        const uint4* vectors = reinterpret_cast<const uint4*>(from);
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i) {
            const uint4 vector = load_once<uint4>(vectors + i);
            words[4 * i] = vector.x, words[4 * i + 1] = vector.y;
            words[4 * i + 2] = vector.z, words[4 * i + 3] = vector.w;
        }
    }
    // The first `count` of them, at any alignment; zeros after those.
    __device__ __forceinline__ void load_some(const T* from, int count) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            constexpr int PER = 4 / sizeof(T);
            const float low = i * PER < count ? to_float(from[i * PER]) : 0.0f;
            if constexpr (PER == 1) {
                words[i] = __float_as_uint(low);
            } else {
                words[i] = pack2<T>(low, i * PER + 1 < count ? to_float(from[i * PER + 1]) : 0.0f);
            }
        }
    }
    __device__ __forceinline__ void unpack(float (&values)[8]) const {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if constexpr (sizeof(T) == 4) {
                values[i] = __uint_as_float(words[i]);
            } else {
                const float2 pair = unpack2<T>(words[i]);
                values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
            }
        }
    }
};

// The largest magnitude of eight; NaNs do not count.
__device__ __forceinline__ float largest(const Eight<float>& eight) {
    float max = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        max = max_ftz(max, fabsf(__uint_as_float(eight.words[i])));
    }
    return max;
}
template <typename Pair, typename T>
__device__ __forceinline__ float largest_of_pairs(const Eight<T>& eight) {
    const Pair* pairs = reinterpret_cast<const Pair*>(eight.words);
    const Pair max = __hmax2(__hmax2(__habs2(pairs[0]), __habs2(pairs[1])), __hmax2(__habs2(pairs[2]), __habs2(pairs[3])));
    const float2 both = unpack2<T>(*reinterpret_cast<const uint32_t*>(&max));
    return max_ftz(max_ftz(both.x, both.y), 0.0f);
}
__device__ __forceinline__ float largest(const Eight<f16>& eight) { return largest_of_pairs<__half2>(eight); }
__device__ __forceinline__ float largest(const Eight<bf16>& eight) { return largest_of_pairs<__nv_bfloat162>(eight); }

// A thread encodes UNROLL times eight elements, 4 bytes a store; the threads of a block of threads cover 4096 elements in
// a row each time, the largest block. A block's absmax is found by shuffles within a warp (256 elements), through shared
// memory above that.
//
// Floor, 14336 x 4096 bf16 in blocks of 64: (117.4 + 29.4 + 3.7) MB / 2.96 TB/s = 51 us.
template <typename T, bool FP4, int UNROLL>
__device__ __forceinline__ void quantize(const Quantize& p) {
    constexpr int THREADS = 512;
    constexpr uint32_t SPAN = THREADS * 8;
    __shared__ Bins bins;
    __shared__ float warp_max[UNROLL][THREADS / 32];

    const uint64_t base = static_cast<uint64_t>(blockIdx.x) * (SPAN * UNROLL);
    const uint64_t left = p.elements - base;
    const T* values = static_cast<const T*>(p.values) + base;
    const uint32_t start = threadIdx.x * 8;

    Eight<T> eights[UNROLL];
    if (left >= SPAN * UNROLL && aligned(p.values, 16)) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            eights[u].load(values + start + u * SPAN);
        }
    } else {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const uint64_t at = start + u * SPAN;
            eights[u].load_some(values + at, at < left ? static_cast<int>(min(left - at, uint64_t{8})) : 0);
        }
    }
    bins.fill<FP4>();

    float absmax[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        absmax[u] = largest(eights[u]);
    }
    const uint32_t lanes = 1u << min(p.block_shift - 3, 5u);  // of a warp that share a block
    for (uint32_t lane = 1; lane < lanes; lane *= 2) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            absmax[u] = fmaxf(absmax[u], __shfl_xor_sync(0xFFFFFFFFu, absmax[u], lane));
        }
    }
    if (p.block_shift > 8) {
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                warp_max[u][threadIdx.x / 32] = absmax[u];
            }
        }
    }
    __syncthreads();
    if (p.block_shift > 8) {
        const uint32_t warps = 1u << (p.block_shift - 8);
        const uint32_t first = threadIdx.x / 32 & ~(warps - 1);
        for (uint32_t warp = first; warp < first + warps; ++warp) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                absmax[u] = fmaxf(absmax[u], warp_max[u][warp]);
            }
        }
    }

    const uint32_t within = start & ((1u << p.block_shift) - 1);
    float* block_absmax = p.absmax + (base >> p.block_shift);
    uint8_t* packed = p.packed + base / 2;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
        const uint32_t at = start + u * SPAN;
        if (at >= left) {
            return;
        }
        if (within == 0) {
            block_absmax[at >> p.block_shift] = absmax[u];
        }
        const float inverse = reciprocal_ftz(absmax[u]);
        float eight[8];
        eights[u].unpack(eight);
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            codes = codes * 16 + bins.encode<FP4>(mul_ftz(eight[i], inverse));
        }
        const uint32_t bytes = __byte_perm(codes, 0, 0x0123);
        if (at + 8 <= left) {
            *reinterpret_cast<uint32_t*>(packed + at / 2) = bytes;
        } else {
            for (uint32_t i = 0; 2 * i < left - at; ++i) {
                packed[at / 2 + i] = static_cast<uint8_t>(bytes >> (8 * i));
            }
        }
    }
}

}  // namespace ferrotune
