#include "lora_down_sm90a.cuh"

// lora_down90_{f16,bf16}_r{16,32,48,64}, lora_down90_parts_..
#define DOWN90(kernel, name, T, r, planes)                                                                \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(ferrotune::PASS_THREADS, 1)    \
        kernel##_##name##_r##r(const __grid_constant__ ferrotune::LoraDown90 p) {                         \
        ferrotune::lora_down90<T, r, planes>(p);                                                          \
    }
#define DOWN90_RANKS(kernel, name, T, planes) \
    DOWN90(kernel, name, T, 16, planes)       \
    DOWN90(kernel, name, T, 32, planes)       \
    DOWN90(kernel, name, T, 48, planes)       \
    DOWN90(kernel, name, T, 64, planes)

DOWN90_RANKS(lora_down90, f16, ferrotune::f16, 1)
DOWN90_RANKS(lora_down90, bf16, ferrotune::bf16, 1)
DOWN90_RANKS(lora_down90_parts, f16, ferrotune::f16, 3)
DOWN90_RANKS(lora_down90_parts, bf16, ferrotune::bf16, 3)
