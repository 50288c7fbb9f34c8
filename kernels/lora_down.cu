#include "lora_down.cuh"

// lora_down[_few]_{f16,bf16}_r{16,32,48,64}; `few`: blocks of 16 rows instead of 64, for few tokens.
#define DOWN(name, T, r, warps)                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                \
        lora_down_##name##_r##r(const __grid_constant__ ferrotune::LoraDown p) {     \
        ferrotune::lora_down<T, r, warps>(p);                                        \
    }
#define DOWN_RANKS(name, T, warps) \
    DOWN(name, T, 16, warps)       \
    DOWN(name, T, 32, warps)       \
    DOWN(name, T, 48, warps)       \
    DOWN(name, T, 64, warps)

DOWN_RANKS(f16, ferrotune::f16, 4)
DOWN_RANKS(bf16, ferrotune::bf16, 4)
DOWN_RANKS(few_f16, ferrotune::f16, 1)
DOWN_RANKS(few_bf16, ferrotune::bf16, 1)
