#include "rms_norm.cuh"

#define FERROTUNE_KERNEL(NAME, P, THREADS, BLOCKS, ...) \
    __global__ void __launch_bounds__(ferrotune::THREADS, BLOCKS) \
        NAME(const __grid_constant__ ferrotune::P p) { \
        ferrotune::begin(); \
        ferrotune::__VA_ARGS__(p); \
    }
#define FERROTUNE_NORMS(SUFFIX, T) \
    FERROTUNE_KERNEL(rms_norm_##SUFFIX, RmsNorm, NORM_THREADS, 4, rms_norm<T, 256, 4, false>) \
    FERROTUNE_KERNEL(rms_norm_half_##SUFFIX, RmsNorm, NORM_HALF, 9, rms_norm<T, 128, 4, true>) \
    FERROTUNE_KERNEL(rms_norm_short_##SUFFIX, RmsNorm, NORM_THREADS, 4, rms_norm<T, 32, 4, false>) \
    FERROTUNE_KERNEL(rms_norm_backward_##SUFFIX, RmsNorm, NORM_THREADS, 1, rms_norm_backward<T, 256, false>) \
    FERROTUNE_KERNEL(rms_norm_backward_short_##SUFFIX, RmsNorm, NORM_THREADS, 1, rms_norm_backward<T, 32, false>) \
    FERROTUNE_KERNEL(rms_norm_backward_weight_##SUFFIX, RmsNorm, NORM_THREADS, 1, rms_norm_backward<T, 256, true>) \
    FERROTUNE_KERNEL(rms_norm_backward_weight_short_##SUFFIX, RmsNorm, NORM_THREADS, 1, rms_norm_backward<T, 32, true>) \
    FERROTUNE_KERNEL(norm_weight_##SUFFIX, NormWeight, NORM_THREADS, 1, norm_weight<T>)

extern "C" {
FERROTUNE_NORMS(f32, float)
FERROTUNE_NORMS(f16, ferrotune::f16)
FERROTUNE_NORMS(bf16, ferrotune::bf16)
}
