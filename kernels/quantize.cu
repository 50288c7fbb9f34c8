#include "common/launch.cuh"
#include "quantize.cuh"

// quantize_{nf4,fp4}_{f32,f16,bf16}; src/cuda/quant.rs knows the threads and the elements of a block of threads.
#define QUANTIZE(suffix, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(512)                                                             \
        quantize_nf4_##suffix(const __grid_constant__ ferrotune::Quantize p) {                                    \
        ferrotune::begin();                                                                                       \
        ferrotune::quantize<T, false, 2>(p);                                                                      \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512)                                                             \
        quantize_fp4_##suffix(const __grid_constant__ ferrotune::Quantize p) {                                    \
        ferrotune::begin();                                                                                       \
        ferrotune::quantize<T, true, 2>(p);                                                                       \
    }

QUANTIZE(f32, float)
QUANTIZE(f16, ferrotune::f16)
QUANTIZE(bf16, ferrotune::bf16)
