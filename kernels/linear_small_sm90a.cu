#include "linear_few.cuh"
#include "linear_small.cuh"

// linear_small[_nested]_{f16,bf16}_{8,16,32,64}: the most tokens; src/cuda/lora/small.rs knows the blocks a multiprocessor.
// Older chips have no clusters; on newer ones it was not measured, and a wheel has a limit.
#define LINEAR_SMALL(suffix, T, nested, tiles, blocks)                                \
    extern "C" __global__ void __launch_bounds__(256, blocks)                         \
        linear_small_##suffix(const __grid_constant__ ferrotune::LinearSmall p) {     \
        ferrotune::linear_small<T, nested, tiles>(p);                                 \
    }
#define LINEAR_FEW(suffix, T, nested)                                                 \
    extern "C" __global__ void __launch_bounds__(512, 1)                              \
        linear_small_##suffix(const __grid_constant__ ferrotune::LinearSmall p) {     \
        ferrotune::linear_few<T, nested>(p);                                          \
    }
#define LINEAR_SMALL_TOKENS(suffix, T, nested)          \
    LINEAR_FEW(suffix##_8, T, nested)                   \
    LINEAR_SMALL(suffix##_16, T, nested, 2, 2)          \
    LINEAR_SMALL(suffix##_32, T, nested, 4, 1)          \
    LINEAR_SMALL(suffix##_64, T, nested, 8, 1)

LINEAR_SMALL_TOKENS(f16, ferrotune::f16, false)
LINEAR_SMALL_TOKENS(bf16, ferrotune::bf16, false)
LINEAR_SMALL_TOKENS(nested_f16, ferrotune::f16, true)
LINEAR_SMALL_TOKENS(nested_bf16, ferrotune::bf16, true)
