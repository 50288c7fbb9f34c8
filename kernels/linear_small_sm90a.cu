#include "linear_few.cuh"
#include "linear_small.cuh"

// linear_small[_nested]_{f16,bf16}_{8,16,32,64}: the most tokens. Older chips have no clusters; on newer ones it was not
// measured, and a wheel has a limit.
#define LINEAR_SMALL(suffix, ...)                                                    \
    extern "C" __global__ void __launch_bounds__(ferrotune::SMALL_THREADS, 1)         \
        linear_small_##suffix(const __grid_constant__ ferrotune::LinearSmall p) {     \
        ferrotune::__VA_ARGS__(p);                                                    \
    }
#define LINEAR_SMALL_TOKENS(suffix, T, nested)                     \
    LINEAR_SMALL(suffix##_8, linear_few<T, nested>)                \
    LINEAR_SMALL(suffix##_16, linear_small<T, nested, 2>)          \
    LINEAR_SMALL(suffix##_32, linear_small<T, nested, 4>)          \
    LINEAR_SMALL(suffix##_64, linear_small<T, nested, 8>)

LINEAR_SMALL_TOKENS(f16, ferrotune::f16, false)
LINEAR_SMALL_TOKENS(bf16, ferrotune::bf16, false)
LINEAR_SMALL_TOKENS(nested_f16, ferrotune::f16, true)
LINEAR_SMALL_TOKENS(nested_bf16, ferrotune::bf16, true)
