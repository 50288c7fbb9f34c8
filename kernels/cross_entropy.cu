#include "common/launch.cuh"
#include "cross_entropy.cuh"

namespace ferrotune {

struct CrossEntropyPrepare {
    const int64_t* labels;  // [rows]
    const float* divisor;   // 0: that of `mode`
    float* facts;           // [4]
    uint64_t rows;
    int64_t ignore_index;
    uint32_t classes;
    uint32_t mode;          // 0: the sum; 1: the mean over the rows that are not ignored
    float lift;             // a power of two that the gradients are larger by until they are scaled
    uint32_t reserved;
};
static_assert(sizeof(CrossEntropyPrepare) == 56, "src/cuda/cross_entropy.rs lays it out alike");

// One block of threads. Writes what the sum of the losses is divided by; the multiplier of the logits' gradients; what is
// left of 1 / divisor, a power of two; and whether every label is ignored or a class, 1 or 0.
__device__ __forceinline__ void prepare(const CrossEntropyPrepare& p) {
    __shared__ uint32_t counts[32];
    uint32_t count = 0, bad = 0;
#pragma unroll 4
    for (uint64_t i = threadIdx.x; i < p.rows; i += blockDim.x) {
        const int64_t label = p.labels[i];
        const bool counted = label != p.ignore_index;
        count += counted;
        bad |= counted && (label < 0 || label >= p.classes);
    }
    count = __reduce_add_sync(0xFFFFFFFFu, count);
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = count;
    bad = __syncthreads_or(bad);
    if (threadIdx.x != 0) return;
    count = 0;
    for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) {
        count += counts[warp];
    }
    float divisor = p.mode == 0 ? 1.0f : static_cast<float>(count);
    if (p.divisor != nullptr) divisor = *p.divisor;
    const float inverse = 1.0f / divisor;
    // The mantissa goes into the gradients that are rounded next, the exponent, which rounds nothing, comes last: no
    // gradient is rounded once more, and none is too small for float16 in between.
    const float mantissa = __uint_as_float((__float_as_uint(inverse) & 0x807FFFFFu) | 0x3F800000u);
    const bool none = count == 0 && p.divisor == nullptr;
    p.facts[0] = divisor;
    p.facts[1] = isfinite(inverse) && !none ? mantissa * p.lift : p.lift;
    p.facts[2] = none ? 0.0f : (isfinite(inverse) ? inverse / mantissa : inverse) / p.lift;
    p.facts[3] = bad ? 0.0f : 1.0f;
}

struct ScaleGradient {
    void* out;           // [elements], 16-byte aligned, as `in`
    const void* in;
    const float* scale;  // one element, as `grad`
    const float* grad;
    uint64_t elements;
};
static_assert(sizeof(ScaleGradient) == 40, "src/cuda/cross_entropy.rs lays it out alike");

// out = in * scale * grad, rounded once. A thread eight elements.
// Floor: elements * (sizeof(From) + sizeof(To)) / 2.96 TB/s; 8192 x 4096 bf16: 45 us.
template <typename From, typename To>
__device__ __forceinline__ void scale_gradient(const ScaleGradient& p) {
    constexpr int LANES = 8;
    constexpr int READ = 16 / sizeof(From), WRITTEN = 16 / sizeof(To);
    const uint64_t first = (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * LANES;
    if (first >= p.elements) return;
    const float scale = *p.scale * *p.grad;
    const From* in = static_cast<const From*>(p.in) + first;
    To* out = static_cast<To*>(p.out) + first;
    if (first + LANES > p.elements) {
        for (uint64_t i = 0; first + i < p.elements; ++i) {
            out[i] = from_float<To>(to_float(in[i]) * scale);
        }
        return;
    }
    float values[LANES];
#pragma unroll
    for (int i = 0; i < LANES; i += READ) {
        float some[READ];
        unpack16<From>(load_once<uint4>(in + i), some);
#pragma unroll
        for (int j = 0; j < READ; ++j) {
            values[i + j] = some[j] * scale;
        }
    }
#pragma unroll
    for (int i = 0; i < LANES; i += WRITTEN) {
        float some[WRITTEN];
#pragma unroll
        for (int j = 0; j < WRITTEN; ++j) {
            some[j] = values[i + j];
        }
        store16(out + i, pack16<To>(some));
    }
}

}  // namespace ferrotune

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_prepare(const __grid_constant__ ferrotune::CrossEntropyPrepare p) {
    ferrotune::begin();
    ferrotune::prepare(p);
}

// cross_entropy{,_softcap}_{f32,f16,bf16}
#define CROSS_ENTROPY(suffix, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
        cross_entropy_##suffix(const __grid_constant__ ferrotune::CrossEntropy p) {                                    \
        ferrotune::begin();                                                                                            \
        ferrotune::cross_entropy<T, false>(p);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
        cross_entropy_softcap_##suffix(const __grid_constant__ ferrotune::CrossEntropy p) {                            \
        ferrotune::begin();                                                                                            \
        ferrotune::cross_entropy<T, true>(p);                                                                          \
    }

CROSS_ENTROPY(f32, float)
CROSS_ENTROPY(f16, ferrotune::f16)
CROSS_ENTROPY(bf16, ferrotune::bf16)

// scale_gradient_{from}_{to}
#define SCALE_GRADIENT(names, From, To)                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        scale_gradient_##names(const __grid_constant__ ferrotune::ScaleGradient p) {                                   \
        ferrotune::begin();                                                                                            \
        ferrotune::scale_gradient<From, To>(p);                                                                        \
    }

SCALE_GRADIENT(f32_f32, float, float)
SCALE_GRADIENT(f32_f16, float, ferrotune::f16)
SCALE_GRADIENT(f32_bf16, float, ferrotune::bf16)
SCALE_GRADIENT(f16_f16, ferrotune::f16, ferrotune::f16)
SCALE_GRADIENT(bf16_bf16, ferrotune::bf16, ferrotune::bf16)
