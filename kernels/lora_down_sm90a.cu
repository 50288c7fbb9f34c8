#include "lora_down_sm90a.cuh"

// lora_down90_{f16,bf16}_r{16,32,48,64}
#define DOWN90(name, T, r)                                                             \
    extern "C" __global__ void __launch_bounds__(ferrotune::DOWN90_THREADS, 1)         \
        lora_down90_##name##_r##r(const __grid_constant__ ferrotune::LoraDown90 p) {   \
        ferrotune::lora_down90<T, r>(p);                                               \
    }
#define DOWN90_RANKS(name, T) \
    DOWN90(name, T, 16)       \
    DOWN90(name, T, 32)       \
    DOWN90(name, T, 48)       \
    DOWN90(name, T, 64)

DOWN90_RANKS(f16, ferrotune::f16)
DOWN90_RANKS(bf16, ferrotune::bf16)
