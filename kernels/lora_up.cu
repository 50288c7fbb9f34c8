#include "common/launch.cuh"
#include "lora_up.cuh"

// Three blocks a multiprocessor would spill there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define UP_BOUNDS __launch_bounds__(256, 2)
#else
#define UP_BOUNDS __launch_bounds__(256)
#endif

// lora_up[_onto]_{f16,bf16}; `onto`: added to what is in `out`.
#define UP(name, T, onto)                                                                               \
    extern "C" __global__ void UP_BOUNDS lora_up_##name(const __grid_constant__ ferrotune::LoraUp p) { \
        ferrotune::begin();                                                                             \
        ferrotune::lora_up<T, onto>(p);                                                                 \
    }

UP(f16, ferrotune::f16, false)
UP(bf16, ferrotune::bf16, false)
UP(onto_f16, ferrotune::f16, true)
UP(onto_bf16, ferrotune::bf16, true)
