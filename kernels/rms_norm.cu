#include "rms_norm.cuh"

#define FERROTUNE_NORM(NAME, CALL)                                                                                 \
    __global__ void __launch_bounds__(ferrotune::NORM_THREADS) NAME(const __grid_constant__ ferrotune::RmsNorm p) { \
        ferrotune::begin();                                                                                        \
        ferrotune::CALL(p);                                                                                        \
    }
#define FERROTUNE_NORMS(SUFFIX, T)                                                                                 \
    FERROTUNE_NORM(rms_norm_##SUFFIX, rms_norm<T COMMA 256>)                                                       \
    FERROTUNE_NORM(rms_norm_short_##SUFFIX, rms_norm<T COMMA 32>)                                                  \
    FERROTUNE_NORM(rms_norm_backward_##SUFFIX, rms_norm_backward<T COMMA 256 COMMA false>)                         \
    FERROTUNE_NORM(rms_norm_backward_short_##SUFFIX, rms_norm_backward<T COMMA 32 COMMA false>)                    \
    FERROTUNE_NORM(rms_norm_backward_weight_##SUFFIX, rms_norm_backward<T COMMA 256 COMMA true>)                   \
    FERROTUNE_NORM(rms_norm_backward_weight_short_##SUFFIX, rms_norm_backward<T COMMA 32 COMMA true>)
#define COMMA ,

extern "C" {
FERROTUNE_NORMS(f32, float)
FERROTUNE_NORMS(f16, ferrotune::f16)
FERROTUNE_NORMS(bf16, ferrotune::bf16)
}
