#include "lora_outer_sm90a.cuh"

// lora_outer90_{f16,bf16}_r{16,32,48,64}, lora_outer90_parts_.., lora_down_outer90_.., lora_down_outer90_parts_..
#define OUTER90(kernel, name, T, r, planes, down)                                       \
    extern "C" __global__ void __launch_bounds__(ferrotune::PASS_THREADS, 1)            \
        kernel##_##name##_r##r(const __grid_constant__ ferrotune::LoraOuter90 p) {      \
        ferrotune::lora_outer90<T, r, planes, down>(p);                                 \
    }
#define OUTER90_RANKS(kernel, name, T, planes, down) \
    OUTER90(kernel, name, T, 16, planes, down)       \
    OUTER90(kernel, name, T, 32, planes, down)       \
    OUTER90(kernel, name, T, 48, planes, down)       \
    OUTER90(kernel, name, T, 64, planes, down)

OUTER90_RANKS(lora_outer90, f16, ferrotune::f16, 1, false)
OUTER90_RANKS(lora_outer90, bf16, ferrotune::bf16, 1, false)
OUTER90_RANKS(lora_outer90_parts, f16, ferrotune::f16, 3, false)
OUTER90_RANKS(lora_outer90_parts, bf16, ferrotune::bf16, 3, false)
OUTER90_RANKS(lora_down_outer90, f16, ferrotune::f16, 1, true)
OUTER90_RANKS(lora_down_outer90, bf16, ferrotune::bf16, 1, true)
OUTER90_RANKS(lora_down_outer90_parts, f16, ferrotune::f16, 3, true)
OUTER90_RANKS(lora_down_outer90_parts, bf16, ferrotune::bf16, 3, true)
