#include "lora_outer_sm90a.cuh"

// lora_outer90_{f16,bf16}_r{16,32,48,64}, lora_down_outer90_..
#define OUTER90(kernel, name, T, r, down)                                               \
    extern "C" __global__ void __launch_bounds__(ferrotune::OUTER90_THREADS, 1)         \
        kernel##_##name##_r##r(const __grid_constant__ ferrotune::LoraOuter90 p) {      \
        ferrotune::lora_outer90<T, r, down>(p);                                         \
    }
#define OUTER90_RANKS(kernel, name, T, down) \
    OUTER90(kernel, name, T, 16, down)       \
    OUTER90(kernel, name, T, 32, down)       \
    OUTER90(kernel, name, T, 48, down)       \
    OUTER90(kernel, name, T, 64, down)

OUTER90_RANKS(lora_outer90, f16, ferrotune::f16, false)
OUTER90_RANKS(lora_outer90, bf16, ferrotune::bf16, false)
OUTER90_RANKS(lora_down_outer90, f16, ferrotune::f16, true)
OUTER90_RANKS(lora_down_outer90, bf16, ferrotune::bf16, true)
