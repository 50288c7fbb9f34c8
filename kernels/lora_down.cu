#include "common/launch.cuh"
#include "lora_down.cuh"

// lora_down[_few]_{f16,bf16}_r{16,32,48,64}; `few`: blocks of 16 rows, for few tokens. Wide panels are read by fewer
// blocks of more rows.
#define DOWN(name, T, r, warps)                                                      \
    extern "C" __global__ void __launch_bounds__(256, 2)                             \
        lora_down_##name##_r##r(const __grid_constant__ ferrotune::LoraDown p) {     \
        ferrotune::begin();                                                          \
        ferrotune::lora_down<T, r, warps>(p);                                        \
    }
#define DOWN_RANKS(name, T, narrow, wide) \
    DOWN(name, T, 16, narrow)             \
    DOWN(name, T, 32, narrow)             \
    DOWN(name, T, 48, wide)               \
    DOWN(name, T, 64, wide)

DOWN_RANKS(f16, ferrotune::f16, 2, 4)
DOWN_RANKS(bf16, ferrotune::bf16, 2, 4)
DOWN_RANKS(few_f16, ferrotune::f16, 1, 1)
DOWN_RANKS(few_bf16, ferrotune::bf16, 1, 1)
