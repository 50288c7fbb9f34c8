#include "common/launch.cuh"
#include "dequantize.cuh"

// dequantize_4bit[_nested]_{f32,f16,bf16}; src/cuda/quant.rs knows the threads and the elements of a block of threads.
#define DEQUANTIZE(suffix, T, nested, unroll)                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                   \
        dequantize_4bit_##suffix(const __grid_constant__ ferrotune::Dequantize p) {                     \
        ferrotune::begin(p.early);                                                                      \
        ferrotune::dequantize<T, nested, 256, unroll>(p);                                               \
        ferrotune::finish(p.early);                                                                     \
    }

DEQUANTIZE(f32, float, false, 4)
DEQUANTIZE(f16, ferrotune::f16, false, 4)
DEQUANTIZE(bf16, ferrotune::bf16, false, 4)
DEQUANTIZE(nested_f32, float, true, 4)
DEQUANTIZE(nested_f16, ferrotune::f16, true, 4)
DEQUANTIZE(nested_bf16, ferrotune::bf16, true, 4)
