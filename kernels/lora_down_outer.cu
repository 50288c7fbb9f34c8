#include "common/launch.cuh"
#include "lora_down_outer.cuh"

// lora_down_outer[_small]_{f16,bf16}_r{16,32,48,64}; `small`: tiles for chips with little shared memory.
#define DOWN_OUTER(name, T, r, columns, rows)                                                     \
    extern "C" __global__ void __launch_bounds__(256, 1)                                          \
        lora_down_outer_##name##_r##r(const __grid_constant__ ferrotune::LoraDownOuter p) {       \
        ferrotune::begin();                                                                       \
        ferrotune::lora_down_outer<T, r, columns, rows>(p);                                       \
    }
#define DOWN_OUTER_RANKS(name, T, columns, rows) \
    DOWN_OUTER(name, T, 16, columns, rows)       \
    DOWN_OUTER(name, T, 32, columns, rows)       \
    DOWN_OUTER(name, T, 48, columns, rows)       \
    DOWN_OUTER(name, T, 64, columns, rows)

DOWN_OUTER_RANKS(f16, ferrotune::f16, 256, 64)
DOWN_OUTER_RANKS(bf16, ferrotune::bf16, 256, 64)
DOWN_OUTER_RANKS(small_f16, ferrotune::f16, 128, 32)
DOWN_OUTER_RANKS(small_bf16, ferrotune::bf16, 128, 32)
