#include "common/launch.cuh"
#include "lora_outer.cuh"

// lora_outer_{f16,bf16}_r{16,32,48,64}
#define OUTER(name, T, r)                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2)                             \
        lora_outer_##name##_r##r(const __grid_constant__ ferrotune::LoraOuter p) {   \
        ferrotune::begin(p.early);                                                   \
        ferrotune::lora_outer<T, r>(p);                                              \
        ferrotune::finish(p.early);                                                  \
    }
#define OUTER_RANKS(name, T) \
    OUTER(name, T, 16)       \
    OUTER(name, T, 32)       \
    OUTER(name, T, 48)       \
    OUTER(name, T, 64)

OUTER_RANKS(f16, ferrotune::f16)
OUTER_RANKS(bf16, ferrotune::bf16)
