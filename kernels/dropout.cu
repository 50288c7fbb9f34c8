// The mask that dropout applies, for tests and for whoever wants to see it.
#include "common/launch.cuh"
#include "common/memory.cuh"
#include "common/philox.cuh"
#include "common/types.cuh"

namespace ferrotune {

struct DropoutMask {
    void* out;              // [elements], 0 or `scale`
    const uint64_t* seed;   // one element
    uint64_t elements;
    uint64_t stream;
    uint32_t threshold;     // round(p * 65536)
    float scale;            // 1 / (1 - p)
};
static_assert(sizeof(DropoutMask) == 40, "src/cuda/dropout.rs lays it out alike");

// A thread a Philox call. Floor: the mask's bytes written, elements * sizeof(T) / 2.96 TB/s.
template <typename T>
__device__ __forceinline__ void dropout_mask(const DropoutMask& p) {
    uint64_t group = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    uint64_t first = group * DROPOUT_LANES;
    if (first >= p.elements) {
        return;
    }
    uint4 uniforms = dropout_uniforms(*p.seed, p.stream, group);
    T* out = static_cast<T*>(p.out) + first;
    alignas(16) T values[DROPOUT_LANES];
#pragma unroll
    for (int lane = 0; lane < DROPOUT_LANES; ++lane) {
        values[lane] = from_float<T>(dropout_keeps(uniforms, lane, p.threshold) ? p.scale : 0.0f);
    }
    if (first + DROPOUT_LANES <= p.elements) {
#pragma unroll
        for (int i = 0; i < DROPOUT_LANES; i += 16 / sizeof(T)) {
            store16(out + i, *reinterpret_cast<uint4*>(values + i));
        }
        return;
    }
#pragma unroll
    for (int lane = 0; lane < DROPOUT_LANES; ++lane) {
        if (first + lane < p.elements) {
            out[lane] = values[lane];
        }
    }
}

}  // namespace ferrotune

extern "C" {
__global__ void __launch_bounds__(256) dropout_mask_f32(const __grid_constant__ ferrotune::DropoutMask p) {
    ferrotune::begin();
    ferrotune::dropout_mask<float>(p);
}
__global__ void __launch_bounds__(256) dropout_mask_f16(const __grid_constant__ ferrotune::DropoutMask p) {
    ferrotune::begin();
    ferrotune::dropout_mask<ferrotune::f16>(p);
}
__global__ void __launch_bounds__(256) dropout_mask_bf16(const __grid_constant__ ferrotune::DropoutMask p) {
    ferrotune::begin();
    ferrotune::dropout_mask<ferrotune::bf16>(p);
}
}
