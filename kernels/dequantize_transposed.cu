#include "common/launch.cuh"
#include "dequantize_transposed.cuh"

// dequantize_4bit_transposed[_any][_nested]_{f32,f16,bf16}; src/cuda/quant.rs knows the tiles.
#define TRANSPOSED(suffix, T, nested)                                                                        \
    extern "C" __global__ void __launch_bounds__(128)                                                        \
        dequantize_4bit_transposed_##suffix(const __grid_constant__ ferrotune::DequantizeTransposed p) {     \
        ferrotune::begin();                                                                                  \
        ferrotune::dequantize_transposed<T, nested, 128, 32, 16>(p);                                         \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                        \
        dequantize_4bit_transposed_any_##suffix(const __grid_constant__ ferrotune::DequantizeTransposed p) { \
        ferrotune::begin();                                                                                  \
        ferrotune::dequantize_transposed_any<T, nested, 256>(p);                                             \
    }

TRANSPOSED(f32, float, false)
TRANSPOSED(f16, ferrotune::f16, false)
TRANSPOSED(bf16, ferrotune::bf16, false)
TRANSPOSED(nested_f32, float, true)
TRANSPOSED(nested_f16, ferrotune::f16, true)
TRANSPOSED(nested_bf16, ferrotune::bf16, true)
