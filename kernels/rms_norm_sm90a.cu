#include "rms_norm_sm90a.cuh"

// rms_norm90_backward[_weight]_{f16,bf16}_{1..4}: vectors of a row that a thread keeps.
#define NORM90(NAME, ...)                                                                                     \
    extern "C" __global__ void __launch_bounds__(ferrotune::NORM_THREADS, 2)                                  \
        NAME(const __grid_constant__ ferrotune::RmsNorm p) {                                                  \
        ferrotune::__VA_ARGS__(p);                                                                            \
    }
#define NORM90_KEPT(SUFFIX, T, KEPT)                                                                          \
    NORM90(rms_norm90_backward_##SUFFIX##_##KEPT, rms_norm_backward90<T, KEPT, false>)                        \
    NORM90(rms_norm90_backward_weight_##SUFFIX##_##KEPT, rms_norm_backward90<T, KEPT, true>)
#define NORM90_TYPE(SUFFIX, T)  \
    NORM90_KEPT(SUFFIX, T, 1)   \
    NORM90_KEPT(SUFFIX, T, 2)   \
    NORM90_KEPT(SUFFIX, T, 4)

NORM90_TYPE(f16, ferrotune::f16)
NORM90_TYPE(bf16, ferrotune::bf16)
