// Double quantisation: the blocks' absmax, less their mean, as bytes of the dynamic 8-bit type, with the codes of
// bitsandbytes' CUDA code.
#include "common/launch.cuh"
#include "common/arithmetic.cuh"

#include <cstdint>

namespace ferrotune {

struct QuantizeAbsmax {
    const float* absmax;   // [blocks]
    const float* offset;   // their mean
    const float* code;     // [256], ascending from at least -1 to 1
    uint8_t* codes;        // [blocks]
    float* nested_absmax;  // [ceil(blocks / 256)]
    uint64_t blocks;
};
static_assert(sizeof(QuantizeAbsmax) == 48, "src/cuda/quant.rs lays it out alike");

// bitsandbytes' search: not the nearest value in every case, because `lower` and `upper` start at -1 and 1.
__device__ __forceinline__ uint32_t search(const float* code, float x) {
    int pivot = 127, upper_pivot = 255, lower_pivot = 0;
    float lower = -1.0f, upper = 1.0f;
    float value = code[pivot];
#pragma unroll
    for (int step = 64; step > 0; step /= 2) {
        if (x > value) {
            lower_pivot = pivot;
            lower = value;
            pivot += step;
        } else {
            upper_pivot = pivot;
            upper = value;
            pivot -= step;
        }
        value = code[pivot];
    }
    if (upper_pivot == 255) {
        upper = code[255];
    }
    if (lower_pivot == 0) {
        lower = code[0];
    }
    if (x > value) {
        return x > mul_ftz(__fadd_rn(upper, value), 0.5f) ? upper_pivot : pivot;
    }
    return x < mul_ftz(__fadd_rn(lower, value), 0.5f) ? lower_pivot : pivot;
}

// A warp takes 256 absmax, which share a nested one. Floor, 917,504 absmax: (3.7 + 0.9) MB / 2.96 TB/s = 1.6 us.
__device__ __forceinline__ void quantize_absmax(const QuantizeAbsmax& p) {
    constexpr int PER = 8;  // values a thread
    __shared__ float code[256];
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t nested = static_cast<uint64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const uint64_t first = nested * 256 + lane;
    const float offset = __ldg(p.offset);
    float values[PER];
    float max = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const uint64_t at = first + 32 * i;
        values[i] = at < p.blocks ? __fsub_rn(__ldg(p.absmax + at), offset) : 0.0f;
    }
    code[threadIdx.x] = __ldg(p.code + threadIdx.x);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        max = max_ftz(max, fabsf(values[i]));
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, distance));
    }
    if (nested * 256 >= p.blocks) {
        return;
    }
    if (lane == 0) {
        p.nested_absmax[nested] = max;
    }
    const float inverse = reciprocal_ftz(max);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const uint64_t at = first + 32 * i;
        if (at < p.blocks) {
            p.codes[at] = static_cast<uint8_t>(search(code, mul_ftz(values[i], inverse)));
        }
    }
}

}  // namespace ferrotune

extern "C" __global__ void __launch_bounds__(256) quantize_absmax(const __grid_constant__ ferrotune::QuantizeAbsmax p) {
    ferrotune::begin();
    ferrotune::quantize_absmax(p);
}
